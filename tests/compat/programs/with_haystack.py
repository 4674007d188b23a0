"""Haystack's chat generator."""

import openai
from common import BASE_URL, LONG, MODEL, NOBODY, QUESTION, SCHEMA, SHORT, Place, report
from haystack.components.generators.chat import OpenAIChatGenerator
from haystack.dataclasses import ChatMessage, StreamingChunk
from haystack.tools import Tool
from haystack.utils import Secret


def generator(name: str, max_tokens: int, **more: object) -> OpenAIChatGenerator:
    options = {"max_tokens": max_tokens, "temperature": 0, **more}
    return OpenAIChatGenerator(
        api_key=Secret.from_token("any"), model=name, api_base_url=BASE_URL, generation_kwargs=options, max_retries=0
    )


question = [ChatMessage.from_user(QUESTION)]
pieces: list[StreamingChunk] = []
short = generator(MODEL, SHORT)
(whole,) = short.run(question)["replies"]
(again,) = short.run(question, streaming_callback=pieces.append)["replies"]
assert again.text == whole.text
tool = Tool(name="look_up", description="Looks up.", parameters=SCHEMA, function=lambda **place: str(place))
(called,) = generator(MODEL, LONG, tool_choice="required").run(question, tools=[tool])["replies"]
(structured,) = generator(MODEL, LONG, response_format=Place).run(question)["replies"]
try:
    generator(NOBODY, SHORT).run(question)
    problem: object = None
except openai.NotFoundError as error:
    problem = error
report(
    text=whole.text,
    streamed="".join(piece.content for piece in pieces),
    calls=[call.arguments for call in called.tool_calls],
    structured=[structured.text],
    usage=[whole.meta["usage"]["completion_tokens"]],
    error=problem,
)
