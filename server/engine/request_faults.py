"""What would break a step for everybody. Standard library only."""

from server.engine.types.requests import GenerationRequest


def fault_of(request: GenerationRequest, vocab_size: int, *, checks_prompt: bool = True) -> str | None:
    """Why a request cannot be in a step; the service has checked before. None: it can."""
    sampling = request.sampling
    if not request.prompt_token_ids:
        return "the prompt has no tokens"
    if sampling.max_tokens is not None and sampling.max_tokens < 0:
        return f"max_tokens is {sampling.max_tokens}, and must be at least 0"
    bias_ids = (token_id for token_id, _ in sampling.logit_bias)
    for name, token_ids in (
        ("prompt", request.prompt_token_ids if checks_prompt else ()),
        ("stop_token_ids", sampling.stop_token_ids),
        ("logit_bias", tuple(bias_ids)),
        ("predicted_token_ids", request.predicted_token_ids),
        ("logprob_token_ids", request.logprobs.token_ids),
        ("allowed_token_ids", sampling.allowed_token_ids),
        ("bad_words", tuple(token_id for word in sampling.bad_words for token_id in word)),
    ):
        if token_ids and not (min(token_ids) >= 0 and max(token_ids) < vocab_size):
            return f"{name} has a token id outside of the vocabulary (0 to {vocab_size - 1})"
    return None
