"""Outlines in its three dialects: any OpenAI server, vLLM, SGLang, and Ollama's."""

import ollama
import openai
import outlines
from common import BASE_URL, LONG, MODEL, NOBODY, QUESTION, ROOT_URL, SHORT, Place, report

client = openai.OpenAI(base_url=BASE_URL, api_key="any", max_retries=0)
models = {
    "openai": outlines.from_openai(client, MODEL),
    "vllm": outlines.from_vllm(client, MODEL),
    "sglang": outlines.from_sglang(client, MODEL),
}
texts, streams, structured = set(), set(), []
for model in models.values():
    texts.add(model(QUESTION, max_tokens=SHORT, temperature=0))
    streams.add("".join(model.stream(QUESTION, max_tokens=SHORT, temperature=0)))
    structured.append(model(QUESTION, Place, max_tokens=LONG))
for name in ("vllm", "sglang"):
    digits = models[name](QUESTION, outlines.types.Regex("[0-9]{3}"), max_tokens=LONG)
    assert digits.isdigit(), digits
    assert len(digits) == 3, digits
    choice = models[name](QUESTION, outlines.types.Choice(["yes", "no"]), max_tokens=LONG)
    assert choice in ("yes", "no"), choice
other = outlines.from_ollama(ollama.Client(ROOT_URL), MODEL)
options = {"num_predict": SHORT, "temperature": 0}
texts.add(other(QUESTION, options=options))
streams.add("".join(other.stream(QUESTION, options=options)))
structured.append(other(QUESTION, Place, options={"num_predict": LONG}))
try:
    outlines.from_vllm(client, NOBODY)(QUESTION)
    problem: object = None
except Exception as error:
    problem = error
(text,), (streamed,) = texts, streams
report(text=text, streamed=streamed, calls=[], structured=structured, usage=[], error=problem)
