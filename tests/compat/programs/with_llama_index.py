"""llama-index with its OpenAI-like model."""

from typing import Any

import openai
from common import BASE_URL, LONG, MODEL, NOBODY, QUESTION, SHORT, Place, report
from llama_index.core.llms import ChatMessage
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike


def model(name: str, max_tokens: int) -> Any:
    options = {"is_chat_model": True, "is_function_calling_model": True, "should_use_structured_outputs": True}
    return OpenAILike(
        model=name, api_base=BASE_URL, api_key="any", max_tokens=max_tokens, temperature=0, max_retries=0, **options
    )


question = [ChatMessage(role="user", content=QUESTION)]
short, long = model(MODEL, SHORT), model(MODEL, LONG)
whole = short.chat(question)
streamed = "".join(chunk.delta or "" for chunk in short.stream_chat(question))
tool = FunctionTool.from_defaults(lambda **place: str(place), name="look_up", description="Looks up.", fn_schema=Place)
called = long.chat_with_tools([tool], user_msg=QUESTION, tool_required=True)
calls = [call.tool_kwargs for call in long.get_tool_calls_from_response(called)]
structured = long.as_structured_llm(Place).chat(question).raw
try:
    model(NOBODY, SHORT).chat(question)
    problem: object = None
except openai.NotFoundError as error:
    problem = error
report(
    text=whole.message.content,
    streamed=streamed,
    calls=calls,
    structured=[structured],
    usage=[whole.raw.usage.completion_tokens],
    error=problem,
)
