"""What a token costs the service: CPU time from the engine's report to the bytes of a stream, without an engine.

    python -m benchmarks.experiments.service_tokens [--streams 32] [--tokens 200]

Every step has one token for each stream, all of them chats of the byte tokenizer of the tests. The time is that of the
process, so that what else runs on the machine does not count.
"""

import argparse
import asyncio
import json
import tempfile
import time
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any

from server.app import create_app
from server.engine.process.messages import AbortRequest, AddRequests, StepDone
from server.engine.types.requests import EngineConfig, EngineInfo, FinishReason, TokenEvent
from server.engine_client.client import EngineClient, EngineStatus
from server.service import Service, ServiceOptions
from server.text.tokenizer import load_tokenizer
from tests.byte_tokenizer import write_byte_tokenizer

CONFIG = EngineConfig("none", "cpu", "float32", 1, 1 << 20, 1024, 8, 1024)
INFO = EngineInfo(
    num_slots=1024,
    state_bytes_per_slot=1,
    vocab_size=260,
    eos_token_ids=(258,),
    device="cpu",
    device_name="none",
    weights_dtype="float32",
    num_parameters=1,
    load_s=0.1,
    kv_cache_bytes_per_token=1,
)


class ScriptedClient(EngineClient):
    """An engine client whose engine says `a` to everybody."""

    def __init__(self) -> None:
        super().__init__(CONFIG)
        self._info, self._status = INFO, EngineStatus.READY
        self.left: dict[str, int] = {}

    def _send(self, command: Any) -> None:
        if isinstance(command, AddRequests):
            self.left |= {one.request_id: one.sampling.max_tokens or 0 for one in command.requests}
        elif isinstance(command, AbortRequest):
            self.left.pop(command.request_id, None)

    def step(self) -> None:
        """One token for everybody."""
        events = []
        for name, left in [*self.left.items()]:
            self.left[name] = left - 1
            reason = FinishReason.LENGTH if left == 1 else None
            if reason is not None:
                del self.left[name]
            events.append(TokenEvent(name, (97,), finish_reason=reason))
        self._take(StepDone(events))


async def stream(app: Any, body: bytes) -> int:
    """Bytes of one stream."""
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    path = "/v1/chat/completions"
    scope = {"type": "http", "method": "POST", "path": path, "raw_path": path.encode(), "query_string": b""}
    scope |= {"headers": headers, "http_version": "1.1", "scheme": "http", "server": ("localhost", 80)}
    messages: list[MutableMapping[str, Any]] = [{"type": "http.request", "body": body}]
    num_bytes = 0

    async def receive() -> MutableMapping[str, Any]:
        if messages:
            return messages.pop()
        await asyncio.Event().wait()
        raise AssertionError

    async def send(message: MutableMapping[str, Any]) -> None:
        nonlocal num_bytes
        num_bytes += len(message.get("body", b""))

    await app(scope, receive, send)
    return num_bytes


async def measure(*, num_streams: int, num_tokens: int) -> float:
    """Microseconds of CPU for a token."""
    with tempfile.TemporaryDirectory() as folder:
        write_byte_tokenizer(Path(folder))
        tokenizer = load_tokenizer(Path(folder))
    engine = ScriptedClient()
    app = create_app(Service(engine, ServiceOptions(model_name="m"), tokenizer))
    chat = {"messages": [{"role": "user", "content": "Hi"}], "stream": True, "max_tokens": num_tokens}
    body = json.dumps(chat).encode()
    streams = [asyncio.create_task(stream(app, body)) for _ in range(num_streams)]
    while len(engine.left) < num_streams:  # noqa: ASYNC110 (nobody sets an event)
        await asyncio.sleep(0)
    begin = time.process_time()
    while engine.left:
        engine.step()
        for _ in range(10):
            await asyncio.sleep(0)
    await asyncio.gather(*streams)
    return (time.process_time() - begin) / (num_streams * num_tokens) * 1e6


def main() -> None:
    """Prints one line of JSON."""
    parser = argparse.ArgumentParser(description="What a token costs the service.")
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    runs = [asyncio.run(measure(num_streams=args.streams, num_tokens=args.tokens)) for _ in range(args.repeats)]
    print(json.dumps({"cpu_us_per_token": [round(run, 1) for run in runs], "best": round(min(runs), 1)}))


if __name__ == "__main__":
    main()
