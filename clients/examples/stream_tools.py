"""The official Python client: a response that calls a tool, streamed; the answer to its result goes on from it.

    pip install openai
    BASE_URL=http://127.0.0.1:8000/v1 python stream_tools.py "What is the weather in Oslo?"

The server keeps the conversation's state, so the second request sends the tool's result and nothing else. Small models
that were never trained on tools hardly call them by themselves: this forces the first answer to be a call.
"""

import json
import os
import sys
from typing import Any

import openai

TOOL: Any = {
    "type": "function",
    "name": "get_weather",
    "description": "The weather in a city",
    "strict": True,
    "parameters": {
        "type": "object",
        "properties": {
            "city": {"enum": ["Oslo", "Paris", "Tokyo"]},
            "days": {"type": "integer", "minimum": 1, "maximum": 7},
        },
        "required": ["city", "days"],
        "additionalProperties": False,
    },
}


def weather(city: str, days: int) -> str:
    """What the tool answers."""
    return f"{city}: sunny for {days} days"


def streamed(client: openai.OpenAI, **request: Any) -> Any:
    """Writes a response to standard output while it grows; returns it."""
    for event in client.responses.create(**request, stream=True):
        if event.type in ("response.output_text.delta", "response.function_call_arguments.delta"):
            sys.stdout.write(event.delta)
        elif event.type == "response.output_item.added" and event.item.type == "function_call":
            sys.stdout.write(f"[{event.item.name} ")
        elif event.type in ("response.completed", "response.incomplete", "response.failed"):
            sys.stdout.write("\n")
            return event.response
    raise RuntimeError("the stream ended before its response")


def main() -> None:
    """Asks, calls, answers."""
    client = openai.OpenAI(base_url=os.environ["BASE_URL"], api_key=os.environ.get("API_KEY", "none"))
    model = os.environ.get("MODEL") or client.models.list().data[0].id
    question = sys.argv[1] if len(sys.argv) > 1 else "What is the weather in Oslo?"
    common = {"model": model, "temperature": 0, "tools": [TOOL]}
    first = streamed(client, input=question, tool_choice="required", parallel_tool_calls=False, **common)
    results = []
    for call in first.output:
        result = weather(**json.loads(call.arguments))
        sys.stdout.write(f"-> {result}\n")
        results.append({"type": "function_call_output", "call_id": call.call_id, "output": result})
    limit = int(os.environ.get("MAX_TOKENS", "64"))
    second = streamed(
        client, input=results, previous_response_id=first.id, tool_choice="none", max_output_tokens=limit, **common
    )
    details = second.usage.input_tokens_details
    sys.stdout.write(f"{second.usage.input_tokens} tokens, {details.cached_tokens} of them not computed again\n")


if __name__ == "__main__":
    main()
