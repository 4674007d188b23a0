"""AutoGen: its OpenAI client, and an assistant."""

import asyncio
import json

import openai
from autogen_agentchat.agents import AssistantAgent
from autogen_core.models import UserMessage
from autogen_core.tools import FunctionTool
from autogen_ext.models.openai import OpenAIChatCompletionClient
from common import BASE_URL, LONG, MODEL, NOBODY, QUESTION, SHORT, Place, report

INFO = {
    "vision": False,
    "function_calling": True,
    "json_output": True,
    "structured_output": True,
    "family": "unknown",
    "multiple_system_messages": True,
}

OPTIONS = {"api_key": "any", "max_retries": 0}


def client(name: str, max_tokens: int) -> OpenAIChatCompletionClient:
    return OpenAIChatCompletionClient(
        model=name,
        base_url=BASE_URL,
        max_tokens=max_tokens,
        temperature=0,
        model_info=INFO,
        **OPTIONS,
    )


def look_up(place: Place) -> str:
    """Looks up."""
    return place.city


async def main() -> None:
    question = [UserMessage(content=QUESTION, source="user")]
    short, long = client(MODEL, SHORT), client(MODEL, LONG)
    whole = await short.create(question)
    pieces = [piece async for piece in short.create_stream(question)]
    tool = FunctionTool(look_up, description="Looks up.", strict=True)
    called = await long.create(question, tools=[tool], tool_choice="required")
    structured = await long.create(question, json_output=Place)
    told = await AssistantAgent("one", short).run(task=QUESTION)
    assert len(told.messages) == 2
    problem: object = None
    try:
        await client(NOBODY, SHORT).create(question)
    except openai.NotFoundError as error:
        problem = error
    report(
        text=str(whole.content),
        streamed="".join(piece for piece in pieces if isinstance(piece, str)),
        calls=[json.loads(call.arguments)["place"] for call in called.content],
        structured=[structured.content],
        usage=[whole.usage.completion_tokens],
        error=problem,
    )


asyncio.run(main())
