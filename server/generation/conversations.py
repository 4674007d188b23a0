"""From messages to tokens: conversations in the model's chat format, alone or after a state."""

from collections.abc import Mapping, Sequence
from typing import Any

from dijiang_model.text.template import TemplateFailure
from server.errors import InvalidRequestError
from server.generation.planning import MAX_INLINE_CHARACTERS, require_chat_template, run_if_long
from server.protocol.chat import MessageIn, ReasoningEffort
from server.service import Service
from server.states.store import SnapshotRecord, Turn
from server.text.continuation import encode_continuation
from server.text.template import NO_VARIABLES, ChatMessage, TemplateValue


async def encode_messages(
    service: Service,
    messages: Sequence[MessageIn],
    *,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
    add_special_tokens: bool = False,
    base: SnapshotRecord | None = None,
    tools: Sequence[Mapping[str, Any]] = (),
    variables: Mapping[str, TemplateValue] = NO_VARIABLES,
    param: str = "messages",
) -> tuple[int, ...]:
    """Token ids of a conversation in the model's chat format.

    Args:
        base: the state that the messages come after; None: they are the whole conversation.
        tools: what may be called, as chat templates expect it.
        variables: further variables of the chat template.
        param: the field that the messages come from.

    Raises:
        InvalidRequestError: no chat template, or one that refuses these messages.
    """
    template = require_chat_template(service)
    if not messages and base is not None:
        _check_cut_off(service, base, param)
        return ()
    conversation = [chat_message(message) for message in messages]

    def encode() -> tuple[int, ...]:
        if base is not None:
            token_ids = encode_continuation(
                template,
                conversation,
                ends_open=base.turn is Turn.OPEN,
                last_token=base.last_token,
                tools=tools,
                variables=variables,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
            )
        else:
            token_ids = template.encode(
                conversation,
                tools=tools,
                variables=variables,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                add_special_tokens=add_special_tokens,
            )
        return tuple(token_ids)

    try:
        return await run_if_long(_size(conversation), encode)
    except TemplateFailure as error:
        raise InvalidRequestError(str(error), param=param, code="chat_template_error") from error


def _check_cut_off(service: Service, base: SnapshotRecord, param: str) -> None:
    """Raises a 400 unless the state ends in the middle of an answer."""
    ends = () if service.engine.info is None else service.engine.info.eos_token_ids
    if base.turn is not Turn.OPEN or base.last_token in ends:
        raise InvalidRequestError(
            "there is no answer to continue: the state does not end inside one, so at least one message is needed",
            param=param,
            code="invalid_value",
        )


def chat_message(message: MessageIn) -> ChatMessage:
    """A message as chat templates expect it."""
    calls = [
        {
            "id": call.id,
            "type": "function",
            "function": {"name": call.function.name, "arguments": call.function.arguments_value},
        }
        for call in message.tool_calls or ()
    ]
    return ChatMessage(
        message.role,
        message.text,
        message.name,
        tuple(calls),
        message.tool_call_id,
        message.thought,
    )


def template_variables(
    service: Service,
    given: Mapping[str, TemplateValue] | None,
    effort: ReasoningEffort | None,
    *,
    param: str = "reasoning_effort",
) -> Mapping[str, TemplateValue]:
    """Further variables of the chat template.

    Args:
        given: those that the request names.
        effort: how much to think; told in the way in which the template asks for it.
        param: the field that it comes from.

    Raises:
        InvalidRequestError: the model does not know how to think, or how much.
    """
    variables = NO_VARIABLES if given is None else given
    known = frozenset[str]() if service.chat_template is None else service.chat_template.variables
    if effort is None:
        return variables
    if "reasoning_effort" in known:
        return {**variables, "reasoning_effort": effort}
    if effort == "none":
        return {**variables, "enable_thinking": False} if "enable_thinking" in known else variables
    raise InvalidRequestError(
        f"`{param}`: the chat template of this model knows no degrees of reasoning",
        param=param,
        code="unsupported_parameter",
    )


def _size(conversation: Sequence[ChatMessage]) -> int:
    """About how many characters there are to encode."""
    return sum(len(message.content) + MAX_INLINE_CHARACTERS * bool(message.tool_calls) for message in conversation)
