"""dspy: its model directly, with tools and a schema, and a program that streams."""

import asyncio
from typing import Any

import dspy
from common import BASE_URL, LONG, MODEL, NOBODY, QUESTION, SHORT, TOOL, Place, report
from dspy.utils.exceptions import AdapterParseError

PLACE: dict[str, Any] = {"api_base": BASE_URL, "api_key": "any", "temperature": 0.0, "cache": False, "num_retries": 0}
MESSAGES = [{"role": "user", "content": QUESTION}]
short = dspy.LM(f"openai/{MODEL}", max_tokens=SHORT, **PLACE)
long = dspy.LM(f"openai/{MODEL}", max_tokens=LONG, **PLACE)


async def stream() -> tuple[str, str]:
    """What came in pieces, and the whole; the answer of a random model is none of the signature's."""
    pieces = ""
    try:
        async for chunk in dspy.streamify(dspy.Predict("question -> answer"))(question=QUESTION):
            pieces += chunk.choices[0].delta.content or ""
    except (AdapterParseError, BaseExceptionGroup) as problem:
        inner: BaseException = problem
        while isinstance(inner, BaseExceptionGroup):
            (inner,) = inner.exceptions
        assert isinstance(inner, AdapterParseError), inner
        return pieces, inner.lm_response
    raise AssertionError("a random model has followed a signature")


(text,) = short(messages=MESSAGES)
usage = short.history[-1]["usage"]["completion_tokens"]
((called),) = long(messages=MESSAGES, tools=[TOOL], tool_choice="required")
(place,) = long(messages=MESSAGES, response_format=Place)
dspy.configure(lm=short, adapter=dspy.ChatAdapter(use_json_adapter_fallback=False))
pieces, whole = asyncio.run(stream())
assert pieces == whole != ""
try:
    dspy.LM(f"openai/{NOBODY}", **PLACE)("Hello")
    problem: object = None
except Exception as error:
    problem = error
calls = [call.function.arguments for call in called["tool_calls"]]
report(text=text, streamed=text, calls=calls, structured=[place], usage=[usage], error=problem)
