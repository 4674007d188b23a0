"""What is refused of requests that want log-probabilities, an echo, or no tokens at all."""

from collections.abc import Sequence

from server.errors import InvalidRequestError
from server.generation.logprobs import check_num_entries
from server.protocol.sampling import GenerationFields


def check_no_tokens(fields: GenerationFields, limit: int | None) -> None:
    """Raises a 400 for a request that generates nothing and wants nothing else."""
    wants_prompt = fields.echoes or fields.prompt_logprobs is not None or fields.return_state is not None
    if limit == 0 and not wants_prompt:
        raise InvalidRequestError(
            "max_tokens is 0, which is of use only with `echo`, `prompt_logprobs` or `return_state`",
            param="max_tokens" if fields.max_completion_tokens is None else "max_completion_tokens",
            code="invalid_value",
        )


def check_scored(fields: GenerationFields, prompts: Sequence[tuple[int, ...]]) -> None:
    """Refuses at once what would be refused when the whole prompt was scored."""
    options = fields.logprob_options
    if options.num_prompt is not None and not fields.stream:
        num_columns = 1 + options.num_prompt + len(options.token_ids)
        check_num_entries(sum(len(prompt) - 1 for prompt in prompts) * num_columns * fields.num_choices)


def check_known_prompt(fields: GenerationFields) -> None:
    """Raises a 400 for what shows the prompt of a request that goes on from a state."""
    if fields.echoes or fields.prompt_logprobs is not None:
        name = "echo" if fields.echoes else "prompt_logprobs"
        raise InvalidRequestError(
            f"`{name}` covers the whole prompt, and a state does not say which tokens it has seen",
            param=name,
            code="unsupported_parameter",
        )
