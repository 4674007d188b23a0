"""OpenAI's agents SDK over chat completions and responses, and with conversations that the server keeps."""

import asyncio
from typing import Any

import openai
from agents import (
    Agent,
    ModelSettings,
    OpenAIChatCompletionsModel,
    OpenAIConversationsSession,
    OpenAIResponsesModel,
    Runner,
    function_tool,
    set_tracing_disabled,
)
from common import BASE_URL, LONG, MODEL, NOBODY, QUESTION, SHORT, Place, report

set_tracing_disabled(True)
client = openai.AsyncOpenAI(base_url=BASE_URL, api_key="any", max_retries=0)
CALLS: list[Place] = []
ENDING = {"min_tokens": SHORT, "logit_bias": {"258": 100}}
"""An end of the text after SHORT tokens: the SDK takes a response that was cut off for an error."""


@function_tool
def look_up(place: Place) -> str:
    """Looks up."""
    CALLS.append(place)
    return "found"


def agent(kind: Any, name: str = MODEL, max_tokens: int = SHORT, **more: Any) -> Agent[Any]:
    settings = ModelSettings(temperature=0, tool_choice=more.pop("tool_choice", None))
    if kind is OpenAIResponsesModel:
        settings.extra_body = ENDING
    else:
        settings.max_tokens = max_tokens
    return Agent(name="one", model=kind(name, client), model_settings=settings, **more)


async def main() -> None:
    texts, streams, structured, usage, problem = set(), set(), [], [], None
    for kind in (OpenAIChatCompletionsModel, OpenAIResponsesModel):
        whole = await Runner.run(agent(kind), QUESTION)
        texts.add(whole.final_output)
        num_tokens = whole.context_wrapper.usage.output_tokens
        usage.append(num_tokens - (kind is OpenAIResponsesModel))  # the end is a token
        running = Runner.run_streamed(agent(kind), QUESTION)
        pieces = [
            event.data.delta
            async for event in running.stream_events()
            if event.type == "raw_response_event" and event.data.type == "response.output_text.delta"
        ]
        streams.add("".join(pieces))
        structured.append((await Runner.run(agent(kind, max_tokens=LONG, output_type=Place), QUESTION)).final_output)
        await Runner.run(agent(kind, max_tokens=LONG, tools=[look_up], tool_choice="required"), QUESTION)
        try:
            await Runner.run(agent(kind, NOBODY), QUESTION)
        except openai.NotFoundError as error:
            problem = error
    session = OpenAIConversationsSession(openai_client=client)
    for _ in range(2):
        await Runner.run(agent(OpenAIResponsesModel), QUESTION, session=session)
    kept = await session.get_items()
    assert [item["role"] for item in kept] == ["user", "assistant"] * 2, kept
    popped = await session.pop_item()
    assert popped is not None
    assert popped["role"] == "assistant"
    assert len(await session.get_items()) == 3
    await session.clear_session()
    (text,), (streamed,) = texts, streams
    report(text=text, streamed=streamed, calls=CALLS, structured=structured, usage=usage, error=problem)


asyncio.run(main())
