"""Mirascope, with its OpenAI provider for another address."""

from common import BASE_URL, LONG, MODEL, NOBODY, QUESTION, SHORT, Place, report
from mirascope import llm

llm.register_provider("openai:completions", scope="openai/", base_url=BASE_URL, api_key="any")


def model(name: str, max_tokens: int) -> llm.Model:
    return llm.Model(f"openai/{name}", max_tokens=max_tokens, temperature=0)


@llm.tool
def look_up(place: Place) -> str:
    """Looks up."""
    return place.city


question = [llm.messages.user(QUESTION)]
short, long = model(MODEL, SHORT), model(MODEL, LONG)
whole = short.call(question)
streamed = "".join(short.stream(question).text_stream())
structured = long.call(question, format=llm.format(Place, mode="strict")).parse()
called = long.call(question, format=llm.format(Place, mode="tool")).parse()
try:
    model(NOBODY, SHORT).call(question)
    problem: object = None
except llm.NotFoundError as error:
    problem = error
report(
    text=whole.text(),
    streamed=streamed,
    calls=[called],
    structured=[structured],
    usage=[whole.usage.output_tokens],
    error=problem,
)
