"""The official Python client: whole, streamed, log-probabilities, tools, parsed answers. Writes what it got as JSON."""

import json
import os
import sys
from typing import Literal

import openai
from pydantic import BaseModel, ConfigDict, Field

MODEL = sys.argv[1]
client = openai.OpenAI(base_url=os.environ["BASE_URL"], api_key="none", max_retries=0)
messages = [{"role": "user", "content": "Hé?"}]
plain = {"model": MODEL, "messages": messages, "max_tokens": 8, "temperature": 0}


class Place(BaseModel):
    model_config = ConfigDict(extra="forbid")  # or a random model never comes to the end of an object

    city: Literal["Paris", "Tokyo"]
    size: int = Field(ge=0, le=9)


whole = client.chat.completions.create(**plain, logprobs=True, top_logprobs=2)
chunks = client.chat.completions.create(**plain, stream=True)
streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
parsed = client.chat.completions.parse(**{**plain, "max_tokens": 400}, response_format=Place)
tool = {
    "type": "function",
    "function": {"name": "look_up", "parameters": Place.model_json_schema(), "strict": True},
}
called = client.chat.completions.create(**{**plain, "max_tokens": 400}, tools=[tool], tool_choice="required")
first = client.responses.create(model=MODEL, input="Hé?", max_output_tokens=8, temperature=0)
second = client.responses.create(
    model=MODEL, input="And?", previous_response_id=first.id, max_output_tokens=8, temperature=0
)
print(  # noqa: T201
    json.dumps(
        {
            "models": [model.id for model in client.models.list()],
            "whole": whole.choices[0].message.content,
            "logprobs": [entry.logprob for entry in whole.choices[0].logprobs.content],
            "streamed": streamed,
            "parsed": parsed.choices[0].message.parsed.model_dump(),
            "arguments": [json.loads(call.function.arguments) for call in called.choices[0].message.tool_calls],
            "response": first.output_text,
            "cached": second.usage.input_tokens_details.cached_tokens,
        }
    )
)
