"""From request fields to sampling parameters, and what of them does not go with the model, the prompt or a state."""

import secrets
from collections.abc import Sequence
from typing import TypeVar

from dijiang_model.checkpoints.default_sampling import DefaultSampling
from server.engine.types.requests import SamplingParams
from server.errors import ContextLengthError, InvalidRequestError
from server.generation.deadline import Deadline
from server.generation.logprobs import check_num_entries
from server.generation.prompts import require_tokenizer
from server.options import ServiceOptions
from server.protocol.sampling import GenerationFields, SamplingFields
from server.service import Service
from server.states.store import SnapshotRecord
from server.text.tokenizer import Tokenizer

LEAST_TOP_P = 1e-6
LEAST_TEMPERATURE = 1e-4
"""What is less is greedy: clients write 1e-8 for 0."""
SEED_RANGE = 2**64
T = TypeVar("T")


def sampling_params(
    fields: GenerationFields,
    defaults: DefaultSampling,
    *,
    max_tokens: int | None,
    number: int,
    bad_words: tuple[tuple[int, ...], ...],
) -> SamplingParams:
    """What the engine needs of the request; null means the default of each field.

    Args:
        defaults: of the fields that the model's authors, or the operator, have an opinion on.
        number: of the choice; its seed is `seed + number`.
    """
    seed = secrets.randbits(63) if fields.seed is None else _wrap(fields.seed + number)
    bias = {} if fields.logit_bias is None else fields.logit_bias
    temperature = given(fields.temperature, defaults.temperature)
    return SamplingParams(
        max_tokens=max_tokens,
        min_tokens=given(fields.min_tokens, 0),
        temperature=temperature if temperature >= LEAST_TEMPERATURE else 0.0,
        top_k=max(0, given(fields.top_k, defaults.top_k)),
        top_p=max(LEAST_TOP_P, given(fields.top_p, defaults.top_p)),  # 0 means: the most likely token alone
        min_p=given(fields.min_p, defaults.min_p) + 0.0,
        typical_p=max(LEAST_TOP_P, given(fields.typical_p, 1.0)),
        repetition_penalty=given(fields.repetition_penalty, defaults.repetition_penalty),
        presence_penalty=given(fields.presence_penalty, 0.0),
        frequency_penalty=given(fields.frequency_penalty, 0.0),
        logit_bias=tuple(sorted(bias.items())),
        seed=seed,
        stop_token_ids=tuple(fields.stop_token_ids or ()),
        ignore_eos=fields.ignore_eos is True,
        allowed_token_ids=tuple(sorted(set(fields.allowed_token_ids or ()))),
        bad_words=bad_words,
    )


async def bad_words_of(service: Service, owner: str, fields: GenerationFields) -> tuple[tuple[int, ...], ...]:
    """`bad_words` as tokens. Raises a 400 when the model has no tokenizer to spell them with."""
    if not fields.bad_words:
        return ()
    tokenizer, words = require_tokenizer(service, param="bad_words"), fields.bad_words
    return await service.texts.run(owner, sum(map(len, words)), lambda: bad_word_tokens(tokenizer, words))


def bad_word_tokens(tokenizer: Tokenizer, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
    """The spellings of the words, each once: at the beginning of an answer, and behind a space.

    A word can still come about in other tokens than the tokenizer's own.
    """
    spellings: dict[tuple[int, ...], None] = {}
    for word in words:
        plain = tuple(tokenizer.encode_plain(word, continues=True))
        spellings[plain] = None
        spaced = tuple(tokenizer.encode_plain(f" {word.lstrip(' ')}", continues=True))
        if len(spaced) == len(plain) and spaced[:1] != plain[:1]:  # longer: a space, and then the word as it is
            spellings[spaced] = None
    return tuple(spelling for spelling in spellings if spelling)


def given(value: T | None, default: T) -> T:
    """The value, if there is one."""
    return default if value is None else value


def _wrap(seed: int) -> int:
    """Into the range of 64-bit signed integers."""
    return (seed + SEED_RANGE // 2) % SEED_RANGE - SEED_RANGE // 2


def within_limit(max_tokens: int | None, options: ServiceOptions) -> int | None:
    """Most tokens of an answer: those wanted, else the default, no more than the operator allows; None: any number."""
    wanted = given(max_tokens, options.default_answer_tokens or None)
    limits = [limit for limit in (wanted, options.max_answer_tokens or None) if limit is not None]
    return min(limits, default=None)


def deadline_of(fields: SamplingFields, options: ServiceOptions) -> Deadline:
    """Of a request that has just arrived."""
    limits = [fields.timeout, options.request_timeout_s if options.request_timeout_s > 0 else None]
    return Deadline.starting_now(min((limit for limit in limits if limit is not None), default=None))


def check_counts(options: ServiceOptions, fields: GenerationFields) -> None:
    """Limits of the operator that need nothing but numbers; first of all, before anything is made."""
    n, num_prompts = fields.num_choices, fields.num_prompts
    _at_most("n", n, options.max_n, "answers per prompt")
    _at_most("prompt", num_prompts, options.max_prompts, "prompts")
    _at_most("n", n * num_prompts, options.max_choices, "answers (prompts times n)")
    _at_most("stop", len(fields.stop or ()), options.max_stop, "stop strings")


def check_fields(
    service: Service,
    fields: GenerationFields,
    prompts: Sequence[tuple[int, ...]],
    *,
    vocab_size: int,
    base: SnapshotRecord | None,
    limit: int | None,
    has_grammar: bool,
) -> None:
    """What can be wrong with a request only in view of its tokens, its state and the model; `limit`: of new tokens."""
    for prompt in prompts:
        if prompt or base is None or not base.pending:
            _check_prompt(prompt, vocab_size, service.options.max_prompt_tokens, param=fields.prompt_field)
    _check_vocabulary(fields, vocab_size)
    if base is not None:
        _check_without_past(fields)
    if fields.stop and service.tokenizer is None:
        raise InvalidRequestError(
            "`stop` needs text, and this model has no tokenizer", param="stop", code="no_tokenizer"
        )
    _check_limits(fields, limit)
    _check_scored(fields, prompts)
    if has_grammar and fields.allowed_token_ids is not None:
        raise InvalidRequestError(
            "`allowed_token_ids` cannot be combined with tools or structured output", param="allowed_token_ids"
        )


def _check_prompt(prompt: tuple[int, ...], vocab_size: int, limit: int, *, param: str) -> None:
    """Refuses a prompt that is empty, over the limit (0: none), or outside the vocabulary."""
    if not prompt:
        raise InvalidRequestError("the prompt has no tokens; at least one is needed", param=param, code="invalid_value")
    if limit and len(prompt) > limit:
        raise ContextLengthError(f"the prompt has {len(prompt):,} tokens, the limit set here is {limit:,}", param=param)
    _check_token_id(max(prompt), vocab_size, param=param)


def _check_limits(fields: GenerationFields, limit: int | None) -> None:
    if limit is not None and fields.min_tokens is not None and fields.min_tokens > limit:
        raise InvalidRequestError(
            f"min_tokens is {fields.min_tokens:,}, more than the limit of {limit:,} tokens",
            param="min_tokens",
            code="invalid_value",
        )
    wants_prompt = fields.echoes or fields.prompt_logprobs is not None or fields.return_state is not None
    if limit == 0 and not wants_prompt:
        raise InvalidRequestError(
            "max_tokens is 0, which is of use only with `echo`, `prompt_logprobs` or `return_state`",
            param="max_tokens" if fields.max_completion_tokens is None else "max_completion_tokens",
            code="invalid_value",
        )


def _check_scored(fields: GenerationFields, prompts: Sequence[tuple[int, ...]]) -> None:
    """Refuses at once what would be refused when the whole prompt was scored."""
    options = fields.logprob_options
    if options.num_prompt is not None and not fields.stream:
        num_columns = 1 + options.num_prompt + len(options.token_ids)
        check_num_entries(sum(len(prompt) - 1 for prompt in prompts) * num_columns * fields.num_choices)


def _check_without_past(fields: GenerationFields) -> None:
    """Refuses what needs the tokens before a state, which nobody has."""
    if fields.repetition_penalty not in (None, 1):
        raise InvalidRequestError(
            "`repetition_penalty` covers the whole conversation, and a state does not say which tokens it has seen; "
            "use `presence_penalty` or `frequency_penalty`",
            param="repetition_penalty",
            code="unsupported_parameter",
        )
    if fields.echoes or fields.prompt_logprobs is not None:
        name = "echo" if fields.echoes else "prompt_logprobs"
        raise InvalidRequestError(
            f"`{name}` covers the whole prompt, and a state does not say which tokens it has seen",
            param=name,
            code="unsupported_parameter",
        )


def _check_vocabulary(fields: GenerationFields, vocab_size: int) -> None:
    for param in ("logit_bias", "stop_token_ids", "logprob_token_ids", "allowed_token_ids"):
        for token_id in getattr(fields, param) or ():
            _check_token_id(token_id, vocab_size, param=param)


def _check_token_id(token_id: int, vocab_size: int, *, param: str) -> None:
    if not 0 <= token_id < vocab_size:
        shown = str(token_id)[:24]
        raise InvalidRequestError(
            f"{param}: the token id {shown} is outside the vocabulary of {vocab_size:,} tokens",
            param=param,
            code="invalid_value",
        )


def _at_most(param: str, value: int, limit: int, noun: str) -> None:
    if value > limit:
        raise InvalidRequestError(
            f"{value:,} {noun} are more than the {limit:,} allowed here", param=param, code="invalid_value"
        )
