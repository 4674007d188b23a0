"""From a validated request to a plan: all that is settled before the engine sees any of it.

Every endpoint that generates comes through here, whatever its dialect. Whatever depends on the model or on the operator
is checked here, before anything is allocated.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from server.engine.types.requests import EngineInfo, GenerationRequest, GrammarSpec
from server.generation.deadline import Deadline
from server.generation.logprobs import LogprobFormat
from server.generation.prompts import encode_messages, encode_prompts, predicted_tokens, system_prefix
from server.generation.sampling import (
    bad_words_of,
    check_counts,
    check_fields,
    given,
    sampling_params,
    within_limit,
)
from server.generation.sessions import Past, cache_use
from server.generation.tools import call_token_ids, checked_grammar, form_of, template_tools
from server.protocol.chat import ChatRequest
from server.protocol.completions import CompletionRequest
from server.protocol.sampling import GenerationFields
from server.protocol.tools import ToolUse
from server.service import Service
from server.states.session import StateSession
from server.text.reasoning import AnswerParser, Thinking, ThoughtCounter, begin_of
from server.text.stream import TextStream
from server.text.tokenizer import Tokenizer

Body = ChatRequest | CompletionRequest


@dataclass(frozen=True, slots=True)
class RequestPlan:
    """One request as it will be generated.

    Attributes:
        owner: whose request it is.
        fields: how to generate, and what to tell.
        requests: what the engine gets for each choice; those of one prompt next to each other, as many for each.
        num_prompts: how many prompts they belong to.
        session: the states that they begin from and leave behind.
        deadline: when the whole request ends with an error.
        tokenizer: None if the model has none.
        tools: what may be called; None: nothing.
        thinking: how the answers begin; None: the model does not think.
        shown_token_ids: special tokens that are part of the text.
        counts_predicted: whether the usage says what became of guesses from a prediction.
    """

    owner: str
    fields: GenerationFields
    requests: tuple[GenerationRequest, ...]
    num_prompts: int
    session: StateSession
    deadline: Deadline
    tokenizer: Tokenizer | None
    tools: ToolUse | None = None
    thinking: Thinking | None = None
    shown_token_ids: frozenset[int] = frozenset()
    counts_predicted: bool = False

    @property
    def num_per_prompt(self) -> int:
        """Choices of each prompt."""
        return len(self.requests) // self.num_prompts

    def text_stream(self, index: int) -> TextStream | None:
        """Where the tokens of a choice become text; None without a tokenizer."""
        if self.tokenizer is None:
            return None
        fields, prompt = self.fields, self.requests[index].prompt_token_ids
        return TextStream(
            self.tokenizer.vocabulary,
            stop=fields.stop or (),
            include_stop=fields.include_stop_str_in_output is True,
            skip_special=fields.skip_special_tokens is not False,
            # No stop string is looked for in an echoed prompt.
            min_tokens=given(fields.min_tokens, 0) + (len(prompt) if fields.echoes else 0),
            at_start=self.session.base is None and (fields.echoes or self.tokenizer.is_all_special(prompt)),
            shown=self.shown_token_ids,
        )

    def thought_counter(self) -> ThoughtCounter | None:
        """Counts the tokens of one answer's thought; None: nothing is thought."""
        if self.thinking is None or self.tokenizer is None:
            return None
        return ThoughtCounter(self.thinking, self.tokenizer.vocabulary)

    def answer_parser(self) -> AnswerParser:
        """Takes one answer apart."""
        begin = None if self.thinking is None else self.thinking.begin
        if self.tools is None:
            return AnswerParser(begin, None)
        calls = form_of(self.tokenizer).parser([function.name for function in self.tools.callable])
        return AnswerParser(begin, calls, is_forced=self.tools.is_forced)

    def logprob_format(self) -> LogprobFormat:
        """How log-probabilities are written."""
        return LogprobFormat(
            None if self.tokenizer is None else self.tokenizer.vocabulary,
            names_tokens=bool(self.fields.logprob_token_ids),
            as_token_ids=self.fields.return_tokens_as_token_ids is True,
        )


async def plan_request(
    service: Service, info: EngineInfo, owner: str, body: Body, past: Past, *, deadline: Deadline
) -> RequestPlan:
    """The one builder of plans.

    Args:
        info: of the engine, which has let the request in.
        past: where the conversation begins, and what becomes of its states.
        deadline: of the request, kept by the caller until the plan is made.

    Raises:
        ServiceError: the request can never work, or not now.
    """
    check_counts(service.options, body)
    tools = template_tools(body.tool_use) if past.shows_tools else ()
    prompts = past.prompts if past.prompts is not None else await _encode(service, owner, body, past, tools)
    if body.truncate_prompt_tokens is not None:
        num = body.truncate_prompt_tokens
        from_left = body.truncation_side != "right"
        prompts = [prompt[-num:] if from_left else prompt[:num] for prompt in prompts]
    thinking = _thinking(service, body, prompts[0])
    points: tuple[int, ...] = ()
    if isinstance(body, ChatRequest) and past.base is None and past.uses_cache:
        points = await system_prefix(service, owner, body.messages, prompts[0], tools=tools)
    grammar, wanted = None, body.wanted_grammar
    if wanted is not None or body.tool_use is not None:
        grammar = await checked_grammar(service, info, wanted, owner=owner, use=body.tool_use, thinking=thinking)
    limit = within_limit(given(body.token_limit, body.default_max_tokens), service.options)
    check_fields(
        service,
        body,
        prompts,
        vocab_size=info.vocab_size,
        base=past.base,
        limit=limit,
        has_grammar=grammar is not None,
    )
    calls = call_token_ids(service.tokenizer) if body.tool_use is not None else frozenset()
    return RequestPlan(
        owner=owner,
        fields=body,
        requests=await _requests(service, owner, body, prompts, grammar=grammar, limit=limit),
        num_prompts=len(prompts),
        session=_session(service, info, owner, body, past, points),
        deadline=deadline,
        tokenizer=service.tokenizer,
        tools=body.tool_use,
        thinking=thinking,
        shown_token_ids=calls if thinking is None else calls | thinking.form.token_ids,
        counts_predicted=isinstance(body, ChatRequest) and body.prediction is not None,
    )


def _session(
    service: Service, info: EngineInfo, owner: str, body: Body, past: Past, points: tuple[int, ...]
) -> StateSession:
    """Of the states of a request; `points`: see `CacheUse`."""
    return StateSession(
        service.engine,
        owner=owner,
        store=service.states,
        layout=info.state_layout,
        base=past.base,
        base_of=past.base_of,
        keep=past.keep,
        turn=body.turn,
        cache=cache_use(owner, body, points=points) if past.uses_cache else None,
        rescue=past.rescue,
        cut_off_at=past.cut_off_at,
        tenant=service.tenant_of(owner),
    )


async def _encode(
    service: Service, owner: str, body: Body, past: Past, tools: Sequence[Mapping[str, Any]]
) -> list[tuple[int, ...]]:
    if isinstance(body, ChatRequest):
        return [await encode_messages(service, owner, body, base=past.base, tools=tools)]
    is_start = past.base is None
    with_special = is_start if body.add_special_tokens is None else body.add_special_tokens
    return await encode_prompts(service, owner, body.prompts, add_special_tokens=with_special, continues=not is_start)


def _thinking(service: Service, body: Body, prompt: Sequence[int]) -> Thinking | None:
    """How the answers to a rendered conversation begin; None: the model does not think, or this is none."""
    if service.thoughts is None or not isinstance(body, ChatRequest):
        return None
    assert service.tokenizer is not None
    continued = body.messages[-1].text if body.continue_final_message else ""
    return Thinking(service.thoughts, begin_of(prompt, service.tokenizer, continued=continued))


async def _requests(
    service: Service,
    owner: str,
    body: Body,
    prompts: Sequence[tuple[int, ...]],
    *,
    grammar: GrammarSpec | None,
    limit: int | None,
) -> tuple[GenerationRequest, ...]:
    """What the engine gets for every prompt and choice."""
    bad_words = await bad_words_of(service, owner, body)
    predicted = await predicted_tokens(service, owner, body.prediction) if isinstance(body, ChatRequest) else None
    name, logprobs, num = body.own_id, body.logprob_options, body.num_choices
    return tuple(
        GenerationRequest(
            f"{name}-{index}",
            prompts[index // num],
            sampling_params(body, service.options.sampling, max_tokens=limit, number=index, bad_words=bad_words),
            grammar=grammar,
            # The first answer scores the prompt for all, as it computes it for all.
            logprobs=logprobs if index % num == 0 else replace(logprobs, num_prompt=None),
            group=f"{name}-{index // num}" if num > 1 else None,
            priority=given(body.priority, 0),
            predicted_token_ids=given(predicted, ()),
        )
        for index in range(len(prompts) * num)
    )
