"""What a request's answers think before they are answers: where that begins, and what finds it."""

from collections.abc import Sequence

from server.generation.tools import call_parser, call_token_ids
from server.protocol.chat import MessageIn
from server.protocol.tools import ToolUse
from server.service import Service
from server.text.reasoning import AnswerParser, Thinking, begin_of


def thinking_of(
    service: Service,
    prompt: Sequence[int],
    messages: Sequence[MessageIn] = (),
    *,
    continue_final_message: bool = False,
) -> Thinking | None:
    """How the answers to a rendered conversation begin; None: the model does not think.

    Args:
        messages: of the conversation.
        continue_final_message: whether the answers go on with the last of them.
    """
    if service.thoughts is None:
        return None
    assert service.tokenizer is not None
    continued = messages[-1].text if continue_final_message else ""
    return Thinking(service.thoughts, begin_of(prompt, service.tokenizer, continued=continued))


def answer_parser(service: Service, thinking: Thinking | None, use: ToolUse | None) -> AnswerParser:
    """Takes one answer apart."""
    return AnswerParser(None if thinking is None else thinking.begin, call_parser(service, use))


def shown_token_ids(service: Service, thinking: Thinking | None, use: ToolUse | None) -> frozenset[int]:
    """Special tokens that are text here, for they tell the parts of an answer apart."""
    calls = frozenset[int]() if use is None else call_token_ids(service.tokenizer)
    return calls if thinking is None else calls | thinking.form.token_ids
