"""Semantic Kernel's chat completion service."""

import asyncio
from typing import Annotated, Any

import openai
from common import BASE_URL, LONG, MODEL, NOBODY, QUESTION, SHORT, Place, report
from semantic_kernel import Kernel
from semantic_kernel.connectors.ai import FunctionChoiceBehavior
from semantic_kernel.connectors.ai.open_ai import OpenAIChatCompletion, OpenAIChatPromptExecutionSettings
from semantic_kernel.contents import ChatHistory, FunctionCallContent
from semantic_kernel.exceptions import ServiceResponseException
from semantic_kernel.functions import kernel_function


class Looking:
    @kernel_function(name="look_up", description="Looks up.")
    def look_up(self, is_large: Annotated[bool, "Which."]) -> str:
        return str(is_large)


def service(name: str) -> OpenAIChatCompletion:
    return OpenAIChatCompletion(
        ai_model_id=name, async_client=openai.AsyncOpenAI(base_url=BASE_URL, api_key="any", max_retries=0)
    )


def settings(max_tokens: int, **more: Any) -> OpenAIChatPromptExecutionSettings:
    return OpenAIChatPromptExecutionSettings(max_tokens=max_tokens, temperature=0, **more)


async def main() -> None:
    history = ChatHistory()
    history.add_user_message(QUESTION)
    chat = service(MODEL)
    whole = await chat.get_chat_message_content(history, settings(SHORT))
    stream = chat.get_streaming_chat_message_content(history, settings(SHORT))
    streamed = "".join([str(piece) async for piece in stream if piece is not None])
    kernel = Kernel()
    kernel.add_plugin(Looking(), "looking")
    forced = settings(LONG, function_choice_behavior=FunctionChoiceBehavior.Required(auto_invoke=False))
    called = await chat.get_chat_message_content(history, forced, kernel=kernel)
    arguments = [item.parse_arguments() for item in called.items if isinstance(item, FunctionCallContent)]
    calls = [Place(city="Paris", size=int(given["is_large"])) for given in arguments if given is not None]
    structured = await chat.get_chat_message_content(history, settings(LONG, response_format=Place))
    problem: object = None
    try:
        await service(NOBODY).get_chat_message_content(history, settings(SHORT))
    except ServiceResponseException as error:
        problem = error
    report(
        text=str(whole),
        streamed=streamed,
        calls=calls,
        structured=[str(structured)],
        usage=[whole.metadata["usage"].completion_tokens],
        error=problem,
    )


asyncio.run(main())
