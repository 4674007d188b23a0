"""litellm's proxy in front of the server, asked by the official client."""

import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import httpx
import openai
from common import BASE_URL, LONG, MODEL, NOBODY, QUESTION, SHORT, TOOL, Place, report

MESSAGES = [{"role": "user", "content": QUESTION}]
TRIES = 600
KEY = "sk-0123456789abcdef0123456789abcdef"

with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
route = {"model_name": "*", "litellm_params": {"model": "hosted_vllm/*", "api_base": BASE_URL, "api_key": "any"}}
folder = Path(tempfile.mkdtemp())
(folder / "config.yaml").write_text(json.dumps({"model_list": [route], "litellm_settings": {"num_retries": 0}}))
command = [str(Path(sys.executable).with_name("litellm")), "--config", str(folder / "config.yaml"), "--port", str(port)]
quiet = {**os.environ, "LITELLM_MASTER_KEY": KEY}
log = (folder / "log").open("w")
proxy = subprocess.Popen([*command, "--host", "127.0.0.1"], env=quiet, stdout=log, stderr=log)
try:
    alive = httpx.Client(transport=httpx.HTTPTransport(retries=0), timeout=5)
    for _ in range(TRIES):
        assert proxy.poll() is None, (folder / "log").read_text()[-2000:]
        try:
            if alive.get(f"http://127.0.0.1:{port}/health/liveliness").status_code == 200:
                break
        except httpx.TransportError:
            pass
        try:
            proxy.wait(0.2)
        except subprocess.TimeoutExpired:
            continue
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=KEY, max_retries=0)
    plain = {"model": MODEL, "messages": MESSAGES, "temperature": 0}
    whole = client.chat.completions.create(**plain, max_tokens=SHORT)
    options = {"include_usage": True}
    chunks = list(client.chat.completions.create(**plain, max_tokens=SHORT, stream=True, stream_options=options))
    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    called = client.chat.completions.create(**plain, max_tokens=LONG, tools=[TOOL], tool_choice="required")
    parsed = client.chat.completions.parse(**plain, max_tokens=LONG, response_format=Place)
    try:
        client.chat.completions.create(**{**plain, "model": NOBODY})
        problem: object = None
    except openai.NotFoundError as error:
        problem = error
finally:
    proxy.terminate()
    proxy.wait()
report(
    text=whole.choices[0].message.content or "",
    streamed=streamed,
    calls=[call.function.arguments for call in called.choices[0].message.tool_calls or ()],
    structured=[parsed.choices[0].message.parsed],
    usage=[whole.usage.completion_tokens, *(chunk.usage.completion_tokens for chunk in chunks if chunk.usage)],
    error=problem,
)
