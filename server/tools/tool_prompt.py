"""How tools are told to models whose chat template has no place for them: in the words of Hermes models.

The tools stand in the system message; calls of the assistant are written as `server.tools.tool_calls` reads them; the
tools' answers come as a message of the user.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from server.tools.tool_calls import CLOSE, OPEN

Message = Mapping[str, Any]
_INTRODUCTION = (
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>\n"
)
_INSTRUCTION = (
    "\n</tools>\n\nFor each function call, return a json object with function name and arguments within "
    f"{OPEN}{CLOSE} XML tags:\n"
    f'{OPEN}\n{{"name": <function-name>, "arguments": <args-json-object>}}\n{CLOSE}'
)


def without_tools(messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]) -> list[Message]:
    """Messages of plain text that say the same."""
    plain: list[Message] = []
    for message in messages:
        written = _plain(message)
        if message["role"] == "tool" and plain and plain[-1].get("is_answer"):
            plain[-1] = {**plain[-1], "content": f"{plain[-1]['content']}\n{written['content']}"}
        else:
            plain.append({**written, "is_answer": message["role"] == "tool"})
    plain = [{key: value for key, value in message.items() if key != "is_answer"} for message in plain]
    return _with_system(plain, tools) if tools else plain


def _plain(message: Message) -> Message:
    if message["role"] == "tool":
        return {"role": "user", "content": f"<tool_response>\n{message['content']}\n</tool_response>"}
    calls = message.get("tool_calls")
    if not calls:
        return message
    written = [f"{OPEN}\n{json.dumps(_in_order(call['function']), ensure_ascii=False)}\n{CLOSE}" for call in calls]
    content = [message["content"]] if message["content"] else []
    rest = {key: value for key, value in message.items() if key != "tool_calls"}
    return {**rest, "content": "\n".join((*content, *written))}


def _in_order(function: Mapping[str, Any]) -> dict[str, Any]:
    return {"name": function["name"], "arguments": function["arguments"]}


def _with_system(messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]) -> list[Message]:
    listed = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
    told = _INTRODUCTION + listed + _INSTRUCTION
    if messages and messages[0]["role"] in ("system", "developer"):
        first = {**messages[0], "content": f"{messages[0]['content']}\n\n{told}"}
        return [first, *messages[1:]]
    return [{"role": "system", "content": told}, *messages]
