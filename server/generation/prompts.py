"""From texts and messages to the tokens of prompts, alone or after a state."""

from collections.abc import Mapping, Sequence
from typing import Any

from dijiang_model.text.template import TemplateFailure
from server.engine.speculation.index import MAX_PREDICTED
from server.errors import InvalidRequestError
from server.protocol.chat import ConversationFields, MessageIn
from server.protocol.prompts import Prediction, Prompt
from server.service import Service
from server.states.store import SnapshotRecord, TurnEnd
from server.text.continuation import encode_continuation
from server.text.template import NO_VARIABLES, ChatMessage, ChatTemplate, TemplateValue
from server.text.threads import MAX_INLINE_CHARACTERS
from server.text.tokenizer import Tokenizer


def require_tokenizer(service: Service, *, param: str | None) -> Tokenizer:
    """Raises a 400 when the model has no tokenizer."""
    if service.tokenizer is None:
        raise InvalidRequestError(
            "this model has no tokenizer: send prompts as token ids to /v1/completions",
            param=param,
            code="no_tokenizer",
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
    service: Service, owner: str, prompts: Sequence[Prompt], *, add_special_tokens: bool, continues: bool = False
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

    return await service.texts.run(owner, sum(map(len, texts)), encode)


async def encode_messages(
    service: Service,
    owner: str,
    body: ConversationFields,
    *,
    base: SnapshotRecord | None = None,
    tools: Sequence[Mapping[str, Any]] = (),
) -> tuple[int, ...]:
    """Token ids of a conversation in the model's chat format.

    Args:
        base: the state that the messages come after; None: they are the whole conversation.
        tools: what may be called, as chat templates expect it.

    Raises:
        InvalidRequestError: no chat template, or one that refuses these messages.
    """
    template = require_chat_template(service)
    if not body.messages and base is not None:
        _check_cut_off(service, base)
        return ()
    conversation = [chat_message(message) for message in body.messages]
    how: dict[str, Any] = {
        "tools": tools,
        "variables": template_variables(service, body),
        "add_generation_prompt": body.add_generation_prompt is not False,
        "continue_final_message": body.continue_final_message is True,
    }

    def encode() -> tuple[int, ...]:
        if base is None:
            how["add_special_tokens"] = body.add_special_tokens is True
            return tuple(template.encode(conversation, **how))
        ends_open = base.turn is TurnEnd.OPEN
        return tuple(
            encode_continuation(template, conversation, ends_open=ends_open, last_token=base.last_token, **how)
        )

    try:
        return await service.texts.run(owner, _size(conversation, tools), encode)
    except TemplateFailure as error:
        raise InvalidRequestError(str(error), param="messages", code="chat_template_error") from error


def _check_cut_off(service: Service, base: SnapshotRecord) -> None:
    """Raises a 400 unless the state ends in the middle of an answer."""
    ends = () if service.engine.info is None else service.engine.info.eos_token_ids
    if base.turn is not TurnEnd.OPEN or base.last_token in ends:
        raise InvalidRequestError(
            "there is no answer to continue: the state does not end inside one, so at least one message is needed",
            param="messages",
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


def template_variables(service: Service, body: ConversationFields) -> Mapping[str, TemplateValue]:
    """Further variables of the chat template: those that the request names, and how much to think.

    Raises:
        InvalidRequestError: the model cannot be told to think, or not to.
    """
    variables = dict(NO_VARIABLES if body.chat_template_kwargs is None else body.chat_template_kwargs)
    known = frozenset[str]() if service.chat_template is None else service.chat_template.variables
    effort, thinks = body.reasoning_effort, body.thinks
    if thinks is not None:
        _check_thinking(service, thinks, can_tell="enable_thinking" in known)
    if effort is not None and "reasoning_effort" in known:
        variables["reasoning_effort"] = effort
    elif effort == "none" and thinks is None:
        thinks = False  # a template without degrees of reasoning has no use for the others
    if thinks is not None and "enable_thinking" in known:
        variables["enable_thinking"] = thinks
    return variables


def _check_thinking(service: Service, thinks: bool, *, can_tell: bool) -> None:
    does_anyway = (service.thoughts is not None) == thinks
    if not can_tell and not does_anyway:
        what = "does not think before it answers" if thinks else "cannot be told not to think"
        raise InvalidRequestError(
            f"`enable_thinking`: this model {what}", param="enable_thinking", code="unsupported_parameter"
        )


async def system_prefix(
    service: Service,
    owner: str,
    messages: Sequence[MessageIn],
    prompt: Sequence[int],
    *,
    tools: Sequence[Mapping[str, Any]] = (),
) -> tuple[int, ...]:
    """Where the system prompt ends in a prompt, if the template makes it visible: no number, or one."""
    template, first = service.chat_template, messages[0]
    if template is None or first.role not in ("system", "developer") or len(messages) == 1:
        return ()
    system = ChatMessage(first.role, first.text, first.name)
    try:
        prefix = await service.texts.run(
            owner, _size([system], tools), lambda: template.encode([system], tools=tools, add_generation_prompt=False)
        )
    except TemplateFailure:
        return ()  # a template that wants a user's message first
    return (len(prefix),) if tuple(prompt[: len(prefix)]) == tuple(prefix) else ()


async def predicted_tokens(service: Service, owner: str, prediction: Prediction | None) -> tuple[int, ...] | None:
    """The tokens that the answer may well have; None: nothing is predicted.

    Raises:
        InvalidRequestError: the prediction is too long.
    """
    if prediction is None:
        return None
    tokenizer = require_tokenizer(service, param="prediction")
    text = prediction.content
    token_ids = await service.texts.run(owner, len(text), lambda: tokenizer.encode_plain(text, continues=True))
    if len(token_ids) > MAX_PREDICTED:
        raise InvalidRequestError(
            f"the prediction has {len(token_ids):,} tokens, the limit is {MAX_PREDICTED:,}",
            param="prediction",
            code="invalid_value",
        )
    return tuple(token_ids)


def _size(conversation: Sequence[ChatMessage], tools: Sequence[Mapping[str, Any]]) -> int:
    """About how many characters there are to encode; tools and calls are taken for many."""
    has_objects = bool(tools) or any(message.tool_calls for message in conversation)
    return sum(len(message.content) for message in conversation) + (MAX_INLINE_CHARACTERS + 1) * has_objects
