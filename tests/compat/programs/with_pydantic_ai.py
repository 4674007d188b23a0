"""pydantic-ai over chat completions, responses and Anthropic's messages."""

import asyncio
from typing import Any

from anthropic import AsyncAnthropic
from common import BASE_URL, LONG, MODEL, NOBODY, QUESTION, ROOT_URL, SHORT, Place, report
from openai import AsyncOpenAI
from pydantic_ai import Agent, NativeOutput, ToolOutput
from pydantic_ai.exceptions import ModelHTTPError
from pydantic_ai.models.anthropic import AnthropicModel
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.anthropic import AnthropicProvider
from pydantic_ai.providers.openai import OpenAIProvider

OPENAI = OpenAIProvider(openai_client=AsyncOpenAI(base_url=BASE_URL, api_key="any", max_retries=0))
CLAUDE = AnthropicProvider(anthropic_client=AsyncAnthropic(base_url=ROOT_URL, api_key="any", max_retries=0))
KINDS = {OpenAIChatModel: OPENAI, OpenAIResponsesModel: OPENAI, AnthropicModel: CLAUDE}


async def main() -> None:
    texts, streams, calls, structured, usage, problem = set(), set(), [], [], [], None
    for kind, provider in KINDS.items():
        model: Any = kind(MODEL, provider=provider)  # type: ignore[call-arg,arg-type]
        short = {"max_tokens": SHORT, "temperature": 0}
        agent = Agent(model, model_settings=short)
        whole = await agent.run(QUESTION)
        texts.add(whole.output)
        usage.append(whole.usage.output_tokens)
        async with agent.run_stream(QUESTION) as stream:
            streams.add("".join([piece async for piece in stream.stream_text(delta=True)]))
        long = {"max_tokens": LONG, "temperature": 0}
        if kind is not AnthropicModel:
            structured.append(
                (await Agent(model, output_type=NativeOutput(Place)).run(QUESTION, model_settings=long)).output
            )
        called = await Agent(model, output_type=ToolOutput(Place)).run(QUESTION, model_settings=long)
        calls.append(called.output)
        try:
            await Agent(kind(NOBODY, provider=provider)).run(QUESTION)  # type: ignore[call-arg,arg-type]
        except ModelHTTPError as error:
            problem = error
    (text,), (streamed,) = texts, streams
    report(text=text, streamed=streamed, calls=calls, structured=structured, usage=usage, error=problem)


asyncio.run(main())
