"""langchain-openai: invoke, stream, log-probabilities, structured output, tools. Writes what it got as JSON."""

import json
import os
import sys
from typing import Literal

from langchain_openai import ChatOpenAI
from pydantic import BaseModel, ConfigDict, Field

model = ChatOpenAI(
    base_url=os.environ["BASE_URL"], api_key="none", model=sys.argv[1], temperature=0, max_tokens=8, max_retries=0
)


class Place(BaseModel):
    """A place."""

    model_config = ConfigDict(extra="forbid")  # or a random model never comes to the end of an object

    city: Literal["Paris", "Tokyo"]
    size: int = Field(ge=0, le=9)


whole = model.invoke("Hé?")
scored = model.bind(logprobs=True, top_logprobs=1).invoke("Hé?")
longer = model.model_copy(update={"max_tokens": 400})
print(  # noqa: T201
    json.dumps(
        {
            "whole": whole.content,
            "usage": whole.usage_metadata["output_tokens"],
            "streamed": "".join(chunk.content for chunk in model.stream("Hé?")),
            "logprobs": [entry["logprob"] for entry in scored.response_metadata["logprobs"]["content"]],
            "parsed": longer.with_structured_output(Place, method="json_schema").invoke("Where?").model_dump(),
            "arguments": [
                call["args"] for call in longer.bind_tools([Place], tool_choice="Place").invoke("Go").tool_calls
            ],
        }
    )
)
