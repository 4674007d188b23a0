"""From a request of the Responses API to its generation, when it begins and when it is resumed after a stop."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from server.engine.types.requests import EngineInfo
from server.errors import InvalidRequestError, NotFoundError, renamed_fields
from server.generation.deadline import Deadline
from server.generation.generation import Generation
from server.generation.planning import plan_request
from server.generation.sampling import deadline_of
from server.generation.sessions import Past, check_fingerprint, require_store
from server.generation.tools import form_of, template_tools
from server.protocol.chat import ChatRequest, MessageIn
from server.protocol.response_items import chat_messages
from server.protocol.responses import FIELD_NAMES, ResponseRequest
from server.protocol.wire import translated
from server.responses.conversations import OpenConversation
from server.responses.output import ResponseOutput
from server.responses.run import ResponseRun
from server.service import Service
from server.states.session import Rescue
from server.states.store import ResponseRecord


async def plan_response(
    service: Service, info: EngineInfo, body: ResponseRequest, run: ResponseRun, *, deadline: Deadline
) -> Generation:
    """Gives a run its output and its generation.

    Args:
        deadline: see `plan_request`.

    Raises:
        ServiceError: it can never be made, or not now.
    """
    previous = await _previous(service, info, body.previous_response_id, run.owner)
    messages = body.messages
    if body.conversation is not None:
        previous, messages = await _in_conversation(service, info, body, run)
    base = None if previous is None else previous.snapshot
    run.unfinished = replace(run.unfinished, base=base)
    with renamed_fields(FIELD_NAMES), translated():
        chat = body.chat(seed=run.unfinished.seed, messages=messages)
        past = Past(base=base, base_of=previous)
        if previous is not None and chat.tools and previous.body.get("tools") != body.echoed_tools:
            # Tools stand at the beginning of a conversation, and nothing can be added to the beginning of a state.
            past = replace(past, shows_tools=False)
            chat = chat.model_copy(update={"messages": [_tools_message(service, chat), *chat.messages]})
        return await _planned(service, info, body, run, chat, past, deadline)


async def plan_resumed(service: Service, info: EngineInfo, body: ResponseRequest, run: ResponseRun) -> Generation:
    """Likewise, of one that was suspended at `run.snapshot`."""
    before, deadline = run.unfinished, deadline_of(body, service.options)
    async with deadline.kept():
        if body.conversation is not None:
            await _in_conversation(service, info, body, run)
        # The cache is for prompts, and what is resumed has an answer behind its own.
        past = Past(base=before.base, cut_off_at=run.snapshot, prompts=[before.prompt_token_ids], uses_cache=False)
        with renamed_fields(FIELD_NAMES):
            chat = body.chat(seed=before.seed, messages=body.messages)
            return await _planned(service, info, body, run, chat, past, deadline)


async def _planned(
    service: Service,
    info: EngineInfo,
    body: ResponseRequest,
    run: ResponseRun,
    chat: ChatRequest,
    past: Past,
    deadline: Deadline,
) -> Generation:
    if body.store is not False and service.states is not None:
        rescue = Rescue(run.keep_state, is_own=body.background is True, in_any_form=True)
        past = replace(past, keep=run.keep_state, rescue=rescue)
    plan = await plan_request(service, info, run.owner, chat, past, deadline=deadline)
    run.output = ResponseOutput(plan.answer_parser(), with_logprobs=chat.logprobs is True)
    run.logprobs = plan.logprob_format() if chat.logprobs else None
    run.generation = Generation(service, plan)
    return run.generation


def _tools_message(service: Service, chat: ChatRequest) -> MessageIn:
    tools: tuple[Mapping[str, Any], ...] = template_tools(chat.tool_use)
    return MessageIn(role="system", content=form_of(service.tokenizer).told(tools))


async def _in_conversation(
    service: Service, info: EngineInfo, body: ResponseRequest, run: ResponseRun
) -> tuple[ResponseRecord | None, list[MessageIn]]:
    """The response that has read the beginning of the conversation, if there is one, and the messages behind it."""
    store, name = require_store(service, param="conversation"), str(body.conversation)
    found = await OpenConversation.find(store, run.owner, name, instructions=body.instructions)
    previous = None
    try:
        previous = await _previous(service, info, found.tip, run.owner)
    except (NotFoundError, InvalidRequestError):  # deleted, or of another model
        found = found.without_tip()
    run.conversation = found
    with renamed_fields(FIELD_NAMES), translated():
        told = chat_messages([*found.items, *body.input])
    return previous, told if previous is not None else [*body.instruction_messages, *told]


async def _previous(service: Service, info: EngineInfo, response_id: str | None, owner: str) -> ResponseRecord | None:
    """The response that another comes after."""
    if response_id is None:
        return None
    store = require_store(service, param="previous_response_id")
    try:
        record = await store.get_response(owner, response_id)
    except NotFoundError as error:
        raise NotFoundError(error.message, param="previous_response_id", code="previous_response_not_found") from error
    if record.snapshot is None or not record.has_ended:
        raise InvalidRequestError(
            f"the previous response is {record.body['status']} and cannot be continued",
            param="previous_response_id",
            code="invalid_value",
        )
    check_fingerprint(record.snapshot, info)
    await store.use_response(record.id)
    return record
