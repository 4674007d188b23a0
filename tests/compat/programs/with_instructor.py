"""instructor: answers as pydantic objects, by tools and by JSON schema. Writes what it got as JSON."""

import json
import os
import sys
from typing import Literal

import instructor
import openai
from pydantic import BaseModel, ConfigDict, Field


class Place(BaseModel):
    model_config = ConfigDict(extra="forbid")  # or a random model never comes to the end of an object

    city: Literal["Paris", "Tokyo"]
    size: int = Field(ge=0, le=9)


answers = {}
for mode in (instructor.Mode.TOOLS, instructor.Mode.JSON_SCHEMA):
    official = openai.OpenAI(base_url=os.environ["BASE_URL"], api_key="none", max_retries=0)
    client = instructor.from_openai(official, mode=mode)
    place = client.chat.completions.create(
        model=sys.argv[1],
        messages=[{"role": "user", "content": "Where?"}],
        response_model=Place,
        max_retries=0,
        max_tokens=400,
        temperature=0,
    )
    answers[mode.value] = place.model_dump()
print(json.dumps(answers))  # noqa: T201
