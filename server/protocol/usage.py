"""Token counts."""

from server.protocol.wire import ResponseModel


class PromptTokensDetails(ResponseModel):
    """Where prompt tokens came from."""

    cached_tokens: int
    """Prompt tokens that were not computed again: those of the state that was resumed, and of cached prefixes."""


class CompletionTokensDetails(ResponseModel):
    """What generated tokens were for, and where they came from."""

    reasoning_tokens: int
    """Tokens of what was thought before the answers, the marks around it included."""
    accepted_prediction_tokens: int = 0
    """With `prediction`: tokens of the answers that were guessed from it."""
    rejected_prediction_tokens: int = 0
    """With `prediction`: guesses from it that were wrong; they are in no other count."""


class Usage(ResponseModel):
    """What a request cost."""

    prompt_tokens: int
    """Tokens of all prompts, each prompt counted once, with the conversation of `state_id` before it."""
    completion_tokens: int
    """Tokens generated for all choices, end-of-sequence tokens included."""
    total_tokens: int
    """The sum of both."""
    prompt_tokens_details: PromptTokensDetails
    """Details of the prompt tokens."""
    completion_tokens_details: CompletionTokensDetails | None = None
    """Details of the generated tokens, of models that think before they answer and of answers with a `prediction`."""

    @classmethod
    def of(
        cls,
        *,
        prompt_tokens: int,
        completion_tokens: int,
        cached_tokens: int = 0,
        reasoning_tokens: int | None = None,
        predicted: tuple[int, int] | None = None,
    ) -> "Usage":
        """Counts of one request.

        Args:
            reasoning_tokens: None where nothing is thought.
            predicted: guesses from the prediction that were right, and wrong; None where nothing is predicted.
        """
        counts: dict[str, int] = {}
        if predicted is not None:
            counts["accepted_prediction_tokens"], counts["rejected_prediction_tokens"] = predicted
        details = {}
        if reasoning_tokens is not None or counts:
            thought = 0 if reasoning_tokens is None else reasoning_tokens
            details["completion_tokens_details"] = CompletionTokensDetails(reasoning_tokens=thought, **counts)
        return cls(
            prompt_tokens=prompt_tokens,
            completion_tokens=completion_tokens,
            total_tokens=prompt_tokens + completion_tokens,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=cached_tokens),
            **details,
        )
