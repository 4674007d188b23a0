"""A long conversation outlives `kill -9` of the whole service: what the next turn costs, and whether it says the same.

    python -m benchmarks.experiments.long_conversation --tokens 30000

Starts the real command, holds a conversation of that many tokens through the official client, once as a stored response
and once as a saved state, and takes the next turn of each. Then every process of the service is killed, the command is
started again on the same folder of states, and the same turns are taken there. Greedy. Ends with one JSON line; the
exit status is 1 if a token differs or a turn has cost more than its own tokens.
"""

import contextlib
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import httpx
import openai
import psutil
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.machine import this_machine, write_result
from benchmarks.report import ModelFolder, model_folder

START_TIMEOUT_S, REQUEST_TIMEOUT_S, POLL_S = 300.0, 3600.0, 0.02
QUESTION = "Which of these things would you try first, and why?"
MODEL = "conversation"
PREFILLED = "dijiang_engine_prefill_tokens_total"


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn as its client sees it.

    Attributes:
        first_token_s: from the request to the first text.
        input_tokens: of the whole conversation up to the answer.
        cached_tokens: those that were not computed again.
        prefilled_tokens: that the engine has computed for it, by its own count.
        output: the answer: its text, or its token ids where they are told.
    """

    first_token_s: float
    input_tokens: int
    cached_tokens: int
    prefilled_tokens: int
    output: str

    @property
    def cost_only_its_own(self) -> bool:
        """Whether what was computed is what the client was told was new, and the past is not in it."""
        return self.prefilled_tokens == self.input_tokens - self.cached_tokens < self.input_tokens // 10


class Service:
    """`dijiang serve` on a folder of states, to be killed."""

    def __init__(self, model: Path, states: Path, options: list[str]) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        base_url = f"http://127.0.0.1:{port}"
        command = [sys.executable, "-m", "server", "serve", str(model), "--port", str(port)]
        command += ["--states-folder", str(states), "--served-model-name", MODEL, *options]
        begin = time.perf_counter()
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        self.http = httpx.Client(base_url=base_url, timeout=REQUEST_TIMEOUT_S, trust_env=False)
        self.client = openai.OpenAI(base_url=f"{base_url}/v1", api_key="none", max_retries=0, timeout=REQUEST_TIMEOUT_S)
        self._wait_ready()
        self.ready_s = time.perf_counter() - begin

    def kill(self) -> None:
        """`kill -9` of every process of the service."""
        with contextlib.suppress(psutil.NoSuchProcess):
            parent = psutil.Process(self._process.pid)
            for process in (*parent.children(recursive=True), parent):
                process.kill()
        self._process.wait()
        self.http.close()
        self.client.close()

    def prefilled(self) -> int:
        """Prompt tokens that the engine has computed since its start."""
        lines = self.http.get("/metrics").text.splitlines()
        return int(float(next((line.split()[1] for line in lines if line.startswith(f"{PREFILLED} ")), "0")))

    def _wait_ready(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                raise RuntimeError(f"the server ended with status {self._process.returncode}")
            with contextlib.suppress(httpx.TransportError):
                if self.http.get("/ready").status_code == 200:
                    return
            time.sleep(POLL_S)
        raise RuntimeError(f"the server was not ready after {START_TIMEOUT_S:.0f} s")


@contextlib.contextmanager
def serving(model: Path, states: Path, options: list[str]) -> Iterator[Service]:
    """A service that is killed in every case."""
    service = Service(model, states, options)
    try:
        yield service
    finally:
        service.kill()


def long_text(service: Service, num_tokens: int) -> str:
    """About so many tokens of this project's own documentation, over and over under running numbers."""
    folder = Path(__file__).parents[2]
    pages = [
        path.read_text(encoding="utf-8") for path in (folder / "README.md", *sorted((folder / "docs").glob("*.md")))
    ]
    tokens: list[int] = []
    number = 0
    while len(tokens) < num_tokens:
        text = f"\n\n# Reading {number + 1}\n\n{pages[number % len(pages)]}"
        tokens += service.http.post("/tokenize", json={"prompt": text, "add_special_tokens": False}).json()["tokens"]
        number += 1
    text_of: str = service.http.post("/detokenize", json={"tokens": tokens[:num_tokens]}).json()["prompt"]
    return text_of


def measured(service: Service, ask: Callable[[], Iterator[tuple[str | None, Any]]]) -> tuple[Turn, Any]:
    """Takes one turn.

    Args:
        ask: pieces of the answer with None, and at last None with the id and the usage of the whole.
    """
    before, begin = service.prefilled(), time.perf_counter()
    first_s, output = 0.0, list[str]()
    last: Any = None
    for piece, ended in ask():
        if piece is not None:
            first_s = time.perf_counter() - begin if not output else first_s
            output.append(piece)
        last = ended
    num_input, num_cached = last["usage"]
    # The engine's count comes with its last message before it idles.
    return Turn(first_s, num_input, num_cached, service.prefilled() - before, "".join(output)), last["id"]


def respond(service: Service, said: str, previous: str | None, num_tokens: int) -> tuple[Turn, str]:
    """A turn of the Responses API, and the response's id."""

    def ask() -> Iterator[tuple[str | None, Any]]:
        options: dict[str, Any] = {} if previous is None else {"previous_response_id": previous}
        events = service.client.responses.create(
            model=MODEL, input=said, temperature=0, max_output_tokens=num_tokens, stream=True, **options
        )
        for event in events:
            if event.type == "response.output_text.delta":
                yield event.delta, None
            elif event.type in ("response.completed", "response.incomplete"):
                usage = event.response.usage
                assert usage is not None
                counts = (usage.input_tokens, usage.input_tokens_details.cached_tokens)
                yield None, {"id": event.response.id, "usage": counts}

    return measured(service, ask)


def chat(service: Service, said: str, state_id: str | None, num_tokens: int, *, keep: bool) -> tuple[Turn, str | None]:
    """A turn of a chat that goes on from a state, and the id of the state after it if that is kept."""
    more: dict[str, Any] = {"return_token_ids": True} | ({"return_state": {"name": "talk"}} if keep else {})
    more |= {} if state_id is None else {"state_id": state_id}

    def ask() -> Iterator[tuple[str | None, Any]]:
        chunks = service.client.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": said}],
            temperature=0,
            max_tokens=num_tokens,
            stream=True,
            stream_options={"include_usage": True},
            extra_body=more,
        )
        kept = None
        for chunk in chunks:
            extra = chunk.choices[0].model_extra or {} if chunk.choices else {}
            kept = extra.get("state_id", kept)
            for token_id in extra.get("token_ids") or ():
                yield f"{token_id} ", None
            if chunk.usage is not None:
                details = chunk.usage.prompt_tokens_details
                counts = (chunk.usage.prompt_tokens, (details.cached_tokens if details else None) or 0)
                yield None, {"id": kept, "usage": counts}

    return measured(service, ask)


def run(model: Path, num_tokens: int, num_answered: int, options: list[str], console: Console) -> dict[str, Any]:
    """The whole experiment."""
    with tempfile.TemporaryDirectory() as folder:
        states = Path(folder) / "states"
        with serving(model, states, options) as service:
            text = long_text(service, num_tokens)
            console.print(f"ready after {service.ready_s:.2f} s; reading {num_tokens:,} tokens")
            first, response_id = respond(service, text, None, num_answered)
            console.print(f"read in {first.first_token_s:.1f} s")
            kept, state_id = chat(service, text, None, num_answered, keep=True)
            turns = {
                "response": respond(service, QUESTION, response_id, num_answered)[0],
                "state": chat(service, QUESTION, state_id, num_answered, keep=False)[0],
            }
            restarted_at = time.perf_counter()
        with serving(model, states, options) as service:
            ready_s = time.perf_counter() - restarted_at
            again = {
                "response": respond(service, QUESTION, response_id, num_answered)[0],
                "state": chat(service, QUESTION, state_id, num_answered, keep=False)[0],
            }
    return {
        "num_tokens": num_tokens,
        "options": options,
        "first_turn": asdict(first),
        "first_turn_as_state": asdict(kept),
        "killed_to_ready_s": ready_s,
        "before": {name: asdict(turn) for name, turn in turns.items()},
        "after": {name: asdict(turn) for name, turn in again.items()},
        "same_tokens": {name: turns[name].output == again[name].output for name in turns},
        "cost_only_its_own": {name: again[name].cost_only_its_own for name in again},
    }


def show(found: dict[str, Any], console: Console) -> None:
    """The turns for the eye."""
    table = Table("turn", "time to first token, s", "conversation, tokens", "cached", "computed")
    rows = {"the conversation, read": found["first_turn"]}
    rows |= {f"next turn, {name}, before the kill": turn for name, turn in found["before"].items()}
    rows |= {f"next turn, {name}, after it": turn for name, turn in found["after"].items()}
    for name, turn in rows.items():
        numbers = (turn["input_tokens"], turn["cached_tokens"], turn["prefilled_tokens"])
        table.add_row(name, f"{turn['first_token_s']:.3f}", *(f"{number:,}" for number in numbers))
    console.print(table)


def main(
    folder: ModelFolder = None,
    tokens: Annotated[int, typer.Option(min=100, help="Length of the conversation before the kill.")] = 30_000,
    answered: Annotated[int, typer.Option(min=1, help="Most tokens of an answer.")] = 64,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads of the server.")] = None,
    dtype: Annotated[str, typer.Option(help="Numbers of the weights, as of `dijiang serve`.")] = "auto",
) -> None:
    """See the module."""
    console = Console()
    options = ["--dtype", dtype, *([] if threads is None else ["--threads", str(threads)])]
    found = run(model_folder(folder), tokens, answered, options, console)
    show(found, console)
    console.print(f"the same tokens: {found['same_tokens']}; only its own tokens: {found['cost_only_its_own']}")
    sys.stdout.write(write_result("long-conversation", this_machine(), found) + "\n")
    if not all((*found["same_tokens"].values(), *found["cost_only_its_own"].values())):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
