"""Ollama's official client."""

import ollama
from common import LONG, MODEL, NOBODY, QUESTION, ROOT_URL, SCHEMA, SHORT, TOOL, report

client = ollama.Client(ROOT_URL)
MESSAGES = [{"role": "user", "content": QUESTION}]
short, long = {"num_predict": SHORT, "temperature": 0}, {"num_predict": LONG}
whole = client.chat(MODEL, MESSAGES, options=short)
streamed = "".join(part.message.content or "" for part in client.chat(MODEL, MESSAGES, options=short, stream=True))
structured = [
    client.chat(MODEL, MESSAGES, format=SCHEMA, options=long).message.content,
    client.generate(MODEL, QUESTION, format=SCHEMA, options=long).response,
]
client.chat(MODEL, MESSAGES, tools=[TOOL], options=short)
assert [model.model for model in client.list().models] == [MODEL]
client.show(MODEL)
try:
    client.chat(NOBODY, MESSAGES)
    problem: object = None
except ollama.ResponseError as error:
    problem = error
report(
    text=whole.message.content or "",
    streamed=streamed,
    calls=[],  # this API has no way to force one, and a random model calls none
    structured=structured,
    usage=[whole.eval_count],
    error=problem,
)
