"""From a validated request to engine requests: tokens of the prompts, sampling parameters, and all limits.

Whatever depends on the model (vocabulary) or on the operator (limits) is checked here, before anything
is allocated.
"""

import asyncio
import secrets
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

from server.engine.types.requests import EngineInfo, GenerationRequest, GrammarSpec, SamplingParams
from server.errors import ContextLengthError, InvalidRequestError
from server.generation.bad_words import bad_word_tokens
from server.generation.checks import check_known_prompt, check_no_tokens, check_scored
from server.generation.choice import Plan
from server.generation.generation import Generation
from server.protocol.prompts import Prompt
from server.protocol.sampling import GenerationFields
from server.service import Service, ServiceOptions
from server.states.session import StateSession
from server.text.reasoning import Thinking, ThoughtCounter
from server.text.stream import TextStream
from server.text.template import ChatTemplate
from server.text.tokenizer import Tokenizer

MAX_INLINE_CHARACTERS = 4096
LEAST_TOP_P = 1e-6
SEED_RANGE = 2**64
T = TypeVar("T")


def require_tokenizer(service: Service, *, param: str | None, status: int = 400) -> Tokenizer:
    """Raises a 400 (or `status`) when the model has no tokenizer."""
    if service.tokenizer is None:
        raise InvalidRequestError(
            "this model has no tokenizer: send prompts as token ids to /v1/completions",
            param=param,
            code="no_tokenizer",
            status=status,
        )
    return service.tokenizer


def require_chat_template(service: Service) -> ChatTemplate:
    """Raises a 400 when the model has no chat template."""
    require_tokenizer(service, param="messages")
    if service.chat_template is None:
        raise InvalidRequestError(
            "this model has no chat template: use /v1/completions", param="messages", code="no_chat_template"
        )
    return service.chat_template


async def encode_prompts(
    service: Service, prompts: Sequence[Prompt], *, add_special_tokens: bool, continues: bool = False
) -> list[tuple[int, ...]]:
    """Token ids of each prompt.

    Args:
        continues: something comes before them, so they do not begin a text.

    Raises:
        InvalidRequestError: text without a tokenizer.
    """
    texts = [prompt for prompt in prompts if isinstance(prompt, str)]
    if not texts:
        return [tuple(prompt) for prompt in prompts if not isinstance(prompt, str)]
    tokenizer = require_tokenizer(service, param="prompt")

    def encode() -> list[tuple[int, ...]]:
        if continues and not add_special_tokens and tokenizer.vocabulary.num_leading_spaces:
            return [tuple(tokenizer.encode_plain(text, continues=True)) for text in texts]
        return [tuple(tokenizer.encode(text, add_special_tokens=add_special_tokens)) for text in texts]

    return await run_if_long(sum(map(len, texts)), encode)


async def run_if_long(num_characters: int, work: Callable[[], T]) -> T:
    """Runs `work` here if it is short, else in a thread, so that the event loop goes on."""
    return work() if num_characters <= MAX_INLINE_CHARACTERS else await asyncio.to_thread(work)


def check_counts(options: ServiceOptions, fields: GenerationFields, *, num_prompts: int) -> None:
    """Limits of the operator that need nothing but numbers; first of all, before anything is made."""
    n = fields.num_choices
    _at_most("n", n, options.max_n, "answers per prompt")
    _at_most("prompt", num_prompts, options.max_prompts, "prompts")
    _at_most("n", n * num_prompts, options.max_choices, "answers (prompts times n)")
    _at_most("stop", 0 if fields.stop is None else len(fields.stop), options.max_stop, "stop strings")


def plan_generation(
    service: Service,
    info: EngineInfo,
    fields: GenerationFields,
    prompts: Sequence[tuple[int, ...]],
    *,
    param: str,
    max_tokens: int | None,
    session: StateSession,
    grammar: GrammarSpec | None = None,
    shown_token_ids: frozenset[int] = frozenset(),
    thinking: Thinking | None = None,
    predicted: tuple[int, ...] | None = None,
) -> Generation:
    """The engine requests for every prompt and choice.

    Args:
        param: the field that the prompts come from.
        session: the states that they begin from and leave behind.
        max_tokens: when the request sets none; None: no limit.
        grammar: the language of the answers; None: any text.
        shown_token_ids: special tokens that are part of the text.
        thinking: how the answers begin; None: nothing is thought.
        predicted: what the answers may well be; None: nothing is predicted.

    Raises:
        InvalidRequestError: token ids outside the vocabulary, prompts too long or empty.
    """
    if fields.truncate_prompt_tokens is not None:
        prompts = [prompt[-fields.truncate_prompt_tokens :] for prompt in prompts]
    limit = fields.token_limit if fields.token_limit is not None else max_tokens
    _check_plan(service, info, fields, prompts, param=param, limit=limit, session=session, grammar=grammar)
    bad_words = _bad_words(service, fields)
    name, logprobs = fields.own_id, fields.logprob_options
    plans: list[Plan] = []
    for number, prompt in enumerate(prompts):
        for choice in range(fields.num_choices):
            # The first answer computes the prompt for all, and scores it for all.
            scored_by = len(plans) - choice if choice > 0 and logprobs.num_prompt is not None else None
            sampling = sampling_params(fields, max_tokens=limit, number=len(plans))
            request = GenerationRequest(
                f"{name}-{len(plans)}",
                prompt,
                replace(sampling, bad_words=bad_words),
                grammar=grammar,
                logprobs=logprobs if scored_by is None else replace(logprobs, num_prompt=None),
                group=f"{name}-{number}" if fields.num_choices > 1 else None,
                priority=_given(fields.priority, 0),
                predicted_token_ids=_given(predicted, ()),
            )
            is_start = session.base is None
            text = _text_stream(service.tokenizer, fields, prompt, is_start=is_start, shown=shown_token_ids)
            thought = _thought_counter(service, thinking)
            plans.append(Plan(request, text, echoes=fields.echoes, scored_by=scored_by, thought=thought))
    return Generation(
        service,
        plans,
        counts_predicted=predicted is not None,
        session=session,
        num_prompts=len(prompts),
        timeout_s=_timeout(fields, service.options),
    )


def _check_plan(
    service: Service,
    info: EngineInfo,
    fields: GenerationFields,
    prompts: Sequence[tuple[int, ...]],
    *,
    param: str,
    limit: int | None,
    session: StateSession,
    grammar: GrammarSpec | None,
) -> None:
    """What can be wrong with a request only in view of its tokens, its state and the model; `limit`: of new tokens."""
    for prompt in prompts:
        if prompt or session.base is None or not session.base.pending:
            check_prompt(prompt, info.vocab_size, service.options.max_prompt_tokens, param=param)
    _check_vocabulary(fields, info.vocab_size)
    if session.base is not None:
        _check_without_past(fields)
        check_known_prompt(fields)
    if fields.stop and service.tokenizer is None:
        raise InvalidRequestError(
            "`stop` needs text, and this model has no tokenizer", param="stop", code="no_tokenizer"
        )
    _check_min_tokens(fields, limit)
    check_no_tokens(fields, limit)
    check_scored(fields, prompts)
    if grammar is not None and fields.allowed_token_ids is not None:
        raise InvalidRequestError(
            "`allowed_token_ids` cannot be combined with tools or structured output", param="allowed_token_ids"
        )


def sampling_params(fields: GenerationFields, *, max_tokens: int | None, number: int) -> SamplingParams:
    """What the engine needs of the request; null means the default of each field.

    Args:
        number: of the choice; its seed is `seed + number`.
    """
    seed = secrets.randbits(63) if fields.seed is None else _wrap(fields.seed + number)
    bias = {} if fields.logit_bias is None else fields.logit_bias
    return SamplingParams(
        max_tokens=max_tokens,
        min_tokens=_given(fields.min_tokens, 0),
        temperature=_given(fields.temperature, 1.0) + 0.0,  # -0.0 becomes 0.0
        top_k=max(0, _given(fields.top_k, 0)),
        top_p=max(LEAST_TOP_P, _given(fields.top_p, 1.0)),  # 0 means: the likeliest token alone
        min_p=_given(fields.min_p, 0.0) + 0.0,
        typical_p=max(LEAST_TOP_P, _given(fields.typical_p, 1.0)),
        repetition_penalty=_given(fields.repetition_penalty, 1.0),
        presence_penalty=_given(fields.presence_penalty, 0.0),
        frequency_penalty=_given(fields.frequency_penalty, 0.0),
        logit_bias=tuple(sorted(bias.items())),
        seed=seed,
        stop_token_ids=() if fields.stop_token_ids is None else tuple(fields.stop_token_ids),
        ignore_eos=fields.ignore_eos is True,
        allowed_token_ids=() if fields.allowed_token_ids is None else tuple(sorted(set(fields.allowed_token_ids))),
    )


def _bad_words(service: Service, fields: GenerationFields) -> tuple[tuple[int, ...], ...]:
    """Raises a 400 when the model has no tokenizer to spell them with."""
    if not fields.bad_words:
        return ()
    return bad_word_tokens(require_tokenizer(service, param="bad_words"), fields.bad_words)


def _given(value: T | None, default: T) -> T:
    return default if value is None else value


def _wrap(seed: int) -> int:
    """Into the range of 64-bit signed integers."""
    return (seed + SEED_RANGE // 2) % SEED_RANGE - SEED_RANGE // 2


def _text_stream(
    tokenizer: Tokenizer | None,
    fields: GenerationFields,
    prompt: tuple[int, ...],
    *,
    is_start: bool,
    shown: frozenset[int],
) -> TextStream | None:
    if tokenizer is None:
        return None
    return TextStream(
        tokenizer.vocabulary,
        stop=() if fields.stop is None else fields.stop,
        include_stop=fields.include_stop_str_in_output is True,
        skip_special=fields.skip_special_tokens is not False,
        # No stop string is looked for in an echoed prompt.
        min_tokens=_given(fields.min_tokens, 0) + (len(prompt) if fields.echoes else 0),
        at_start=is_start and (fields.echoes or tokenizer.is_all_special(prompt)),
        shown=shown,
    )


def _thought_counter(service: Service, thinking: Thinking | None) -> ThoughtCounter | None:
    if thinking is None or service.tokenizer is None:
        return None
    return ThoughtCounter(thinking, service.tokenizer.vocabulary)


def _timeout(fields: GenerationFields, options: ServiceOptions) -> float | None:
    limits = [fields.timeout, options.request_timeout_s if options.request_timeout_s > 0 else None]
    return min((limit for limit in limits if limit is not None), default=None)


def check_prompt(prompt: tuple[int, ...], vocab_size: int, limit: int, *, param: str) -> None:
    """Raises `InvalidRequestError` for a prompt that is empty, over the limit (0: none), or outside the vocabulary."""
    if not prompt:
        raise InvalidRequestError("the prompt has no tokens; at least one is needed", param=param, code="invalid_value")
    if limit and len(prompt) > limit:
        raise ContextLengthError(f"the prompt has {len(prompt):,} tokens, the limit set here is {limit:,}", param=param)
    _check_token_id(max(prompt), vocab_size, param=param)


def _check_min_tokens(fields: GenerationFields, limit: int | None) -> None:
    if limit is not None and fields.min_tokens is not None and fields.min_tokens > limit:
        raise InvalidRequestError(
            f"min_tokens is {fields.min_tokens:,}, more than the limit of {limit:,} tokens",
            param="min_tokens",
            code="invalid_value",
        )


def _check_without_past(fields: GenerationFields) -> None:
    """Refuses what needs the tokens before a state, which nobody has."""
    if fields.repetition_penalty not in (None, 1):
        raise InvalidRequestError(
            "`repetition_penalty` covers the whole conversation, and a state does not say which tokens it has seen; "
            "use `presence_penalty` or `frequency_penalty`",
            param="repetition_penalty",
            code="unsupported_parameter",
        )


def _check_vocabulary(fields: GenerationFields, vocab_size: int) -> None:
    for token_id in fields.logit_bias if fields.logit_bias is not None else ():
        _check_token_id(token_id, vocab_size, param="logit_bias")
    for token_id in fields.stop_token_ids if fields.stop_token_ids is not None else ():
        _check_token_id(token_id, vocab_size, param="stop_token_ids")
    for token_id in fields.logprob_options.token_ids:
        _check_token_id(token_id, vocab_size, param="logprob_token_ids")
    for token_id in fields.allowed_token_ids if fields.allowed_token_ids is not None else ():
        _check_token_id(token_id, vocab_size, param="allowed_token_ids")


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
