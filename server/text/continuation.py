"""New messages after a conversation that only its state remembers.

The template knows whole conversations, so it renders a stand-in of two messages with the new ones behind it; what
follows the stand-in is what follows any conversation. Nothing of the real past is needed, and nothing is fed again.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from dijiang_model.text.template import TemplateFailure
from server.text.template import NO_VARIABLES, ChatMessage, ChatTemplate, TemplateValue

# Words that no template writes by itself, so that the stand-in's end is found in the rendering.
_STAND_IN = (ChatMessage("user", "qzxjkv"), ChatMessage("assistant", "vkjxzq"))


def encode_continuation(
    template: ChatTemplate,
    messages: Sequence[ChatMessage],
    *,
    ends_open: bool,
    last_token: int,
    tools: Sequence[Mapping[str, Any]] = (),
    variables: Mapping[str, TemplateValue] = NO_VARIABLES,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
) -> list[int]:
    """Tokens to feed so that a conversation goes on with these messages.

    Args:
        template: the model's chat format.
        messages: the new ones.
        ends_open: whether the conversation ends inside an assistant's message, whose end is then written first (unless
            `last_token` is it already), or after whole messages.
        last_token: the last token of the conversation.
        tools: what may be called; told at the beginning of the conversation, so not once more.
        variables: further variables of the template.
        add_generation_prompt: open the assistant's turn at the end.
        continue_final_message: go on with the last of the new messages.

    Raises:
        TemplateFailure: the template refuses the messages, or writes the past differently because of them.
    """
    past = (
        template.encode(
            _STAND_IN, tools=tools, variables=variables, continue_final_message=True, add_generation_prompt=False
        )
        if ends_open
        else template.encode(_STAND_IN, tools=tools, variables=variables, add_generation_prompt=False)
    )
    whole = template.encode(
        [*_STAND_IN, *messages],
        tools=tools,
        variables=variables,
        add_generation_prompt=add_generation_prompt,
        continue_final_message=continue_final_message,
    )
    if whole[: len(past)] != past:
        raise TemplateFailure(
            "the model's chat template cannot continue with these messages: it rewrites what came before"
        )
    new = whole[len(past) :]
    return new[1:] if ends_open and new and new[0] == last_token else new
