"""A server process whose answers are scripted, to be killed.

`python -m tests.server.playground.scripted_server PORT FOLDER` answers `word 1 word 2 ...` and stops in the middle,
until a file `FOLDER/go` is there.
"""

import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import uvicorn

from server.app import create_app
from server.engine.types.requests import GenerationRequest, TokenEvent
from server.service import Service
from server.text.tokenizer import load_tokenizer
from tests.byte_tokenizer import write_byte_tokenizer
from tests.server.conftest import OPTIONS
from tests.server.fake_engine import EOS_TOKEN_ID, FakeEngine
from tests.waiting import until, until_async

WORDS = " ".join(f"word {number}" for number in range(40))
HELD_AFTER = 100


class _HeldEngine(FakeEngine):
    """Stops in the middle of an answer until a file appears."""

    folder: Path

    async def _released(self, request_id: str) -> None:
        await until_async((self.folder / "go").exists)

    async def _events(self, request: GenerationRequest) -> AsyncIterator[TokenEvent]:
        prompt = bytes(token for token in request.prompt_token_ids if token < 256).decode()
        self.hold_after = HELD_AFTER
        rest = WORDS[HELD_AFTER:] if WORDS[:20] in prompt else WORDS
        self.script = lambda _: [*rest.encode(), EOS_TOKEN_ID]
        async for event in super()._events(request):
            yield event


def main() -> None:
    port, folder = int(sys.argv[1]), Path(sys.argv[2])
    write_byte_tokenizer(folder)
    engine = _HeldEngine()
    engine.folder = folder
    app = create_app(Service(engine, OPTIONS, load_tokenizer(folder)))
    uvicorn.run(app, port=port, log_level="warning", lifespan="off")


@contextmanager
def scripted(port: int, folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Such a process, ready; ended at the end if it was not killed before."""
    command = [sys.executable, "-m", "tests.server.playground.scripted_server", str(port), str(folder)]
    process = subprocess.Popen(command)

    def is_ready() -> bool:
        assert process.poll() is None
        try:
            return httpx.get(f"http://127.0.0.1:{port}/ready", trust_env=False).status_code == 200
        except httpx.TransportError:
            return False

    try:
        until(is_ready)
        yield process
    finally:
        process.kill()
        process.wait()


if __name__ == "__main__":
    main()
