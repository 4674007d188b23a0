"""litellm as a library, by three of its providers: any OpenAI server, vLLM, Anthropic."""

import os
from typing import Any

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"
import litellm
from common import BASE_URL, LONG, MODEL, NOBODY, QUESTION, ROOT_URL, SHORT, TOOL, Place, report

litellm.telemetry = False
MESSAGES = [{"role": "user", "content": QUESTION}]
WHERE: dict[str, Any] = {"api_key": "any", "temperature": 0, "max_retries": 0}
OPENAI = [("openai", BASE_URL), ("hosted_vllm", BASE_URL)]


def ask(provider: str, address: str, model: str = MODEL, **more: Any) -> Any:
    options = {"max_tokens": SHORT, **WHERE, **more}
    return litellm.completion(model=f"{provider}/{model}", api_base=address, messages=MESSAGES, **options)


wholes, streams, calls, structured = [], [], [], []
for provider, address in [*OPENAI, ("anthropic", ROOT_URL)]:
    wholes.append(ask(provider, address))
    chunks = ask(provider, address, stream=True)
    streams.append("".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices))
    called = ask(provider, address, tools=[TOOL], tool_choice="required", max_tokens=LONG)
    calls += [call.function.arguments for call in called.choices[0].message.tool_calls]
for provider, address in OPENAI:
    structured.append(ask(provider, address, response_format=Place, max_tokens=LONG).choices[0].message.content)
try:
    ask(*OPENAI[0], model=NOBODY)
    problem: object = None
except litellm.NotFoundError as error:
    problem = error
(text,) = {whole.choices[0].message.content for whole in wholes}
(streamed,) = set(streams)
usage = [whole.usage.completion_tokens for whole in wholes]
report(text=text, streamed=streamed, calls=calls, structured=structured, usage=usage, error=problem)
