"""Anthropic's official client: whole, streamed, tools, counts, errors. Prints what it got, JSON."""

import json
import os
import sys
from typing import Any

import anthropic

MODEL = sys.argv[1]
GREEDY = {"temperature": 0}
HELLO: list[Any] = [{"role": "user", "content": "Hé?"}]
TOOL: Any = {
    "name": "look_up",
    "description": "Looks something up",
    "input_schema": {
        "type": "object",
        "properties": {"key": {"type": "string", "maxLength": 5}},
        "required": ["key"],
        "additionalProperties": False,
    },
}

client = anthropic.Anthropic(base_url=os.environ["BASE_URL"].removesuffix("/v1"), api_key="any", max_retries=0)
whole = client.messages.create(model=MODEL, messages=HELLO, max_tokens=8, extra_body=GREEDY)
with client.messages.stream(model=MODEL, messages=HELLO, max_tokens=8, extra_body=GREEDY) as stream:
    streamed = "".join(stream.text_stream)
    last = stream.get_final_message()
choice: Any = {"type": "tool", "name": "look_up"}
called = client.messages.create(model=MODEL, messages=HELLO, max_tokens=2000, tools=[TOOL], tool_choice=choice)
with client.messages.stream(model=MODEL, messages=HELLO, max_tokens=2000, tools=[TOOL], tool_choice=choice) as stream:
    streamed_call = stream.get_final_message()
counted = client.messages.count_tokens(model=MODEL, messages=HELLO)
try:
    client.messages.create(model="nobody", messages=HELLO, max_tokens=8)
    error = ""
except anthropic.NotFoundError as problem:
    error = problem.body["error"]["type"]  # type: ignore[index,call-overload]
(block,) = called.content
(streamed_block,) = streamed_call.content
assert block.type == streamed_block.type == "tool_use"
usage = whole.usage
got = {
    "text": "".join(block.text for block in whole.content if block.type == "text"),
    "streamed": streamed,
    "stop_reasons": [whole.stop_reason, last.stop_reason, called.stop_reason],
    "usage": [usage.output_tokens, last.usage.output_tokens],
    "calls": [[block.name, [*block.input]], [streamed_block.name, [*streamed_block.input]]],
    "input_tokens": [usage.input_tokens + (usage.cache_read_input_tokens or 0), counted.input_tokens],
    "error": error,
}
sys.stdout.write(json.dumps(got))
