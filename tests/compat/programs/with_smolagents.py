"""smolagents: its OpenAI model, and an agent that calls a tool."""

import openai
from common import BASE_URL, LONG, MODEL, NOBODY, QUESTION, SCHEMA, SHORT, report
from smolagents import ChatMessage, MessageRole, OpenAIModel, Tool


class LookUp(Tool):
    name = "look_up"
    description = "Looks up."
    inputs = {name: {"description": "Which.", **SCHEMA["properties"][name]} for name in ("city", "size")}  # noqa: RUF012
    output_type = "string"

    def forward(self, city: str, size: int) -> str:
        return f"{city} {size}"


def model(name: str, max_tokens: int) -> OpenAIModel:
    kwargs = {"max_retries": 0}
    return OpenAIModel(
        name, api_base=BASE_URL, api_key="any", client_kwargs=kwargs, retry=False, max_tokens=max_tokens, temperature=0
    )


question = [ChatMessage(role=MessageRole.USER, content=[{"type": "text", "text": QUESTION}])]
short, long = model(MODEL, SHORT), model(MODEL, LONG)
whole = short(question)
streamed = "".join(delta.content or "" for delta in short.generate_stream(question))
called = long(question, tools_to_call_from=[LookUp()])
calls = [call.function.arguments for call in called.tool_calls]
form = {"type": "json_schema", "json_schema": {"name": "place", "schema": SCHEMA}}
structured = long(question, response_format=form).content
try:
    model(NOBODY, SHORT)(question)
    problem: object = None
except openai.NotFoundError as error:
    problem = error
report(
    text=whole.content,
    streamed=streamed,
    calls=calls,
    structured=[structured],
    usage=[whole.token_usage.output_tokens],
    error=problem,
)
