"""The engine's loop: one message a step, silence when idle, and an end when it must."""

import io
import json
import subprocess
import sys
from dataclasses import replace

import msgspec
import pytest
import zmq

from server.engine.failures import log_failure
from server.engine.process.main import EngineLoop
from server.engine.process.messages import AbortRequest, AddRequests, Alive, Begun, Command, Heartbeat, Report, StepDone
from server.engine.types.requests import FinishReason
from tests.server.engine.fakes import FakeRunner, engine, expected_output, request


class FakeSocket:
    """Hands out what was put in, keeps what was sent, and knows whether anybody waited."""

    def __init__(self, *commands: Command) -> None:
        self.incoming = [msgspec.msgpack.encode(command) for command in commands]
        self.sent: list[StepDone] = []
        self.reports: list[Report] = []
        self.num_waits = 0

    def recv(self, flags: int = 0) -> bytes:
        self.num_waits += flags != zmq.NOBLOCK
        if not self.incoming:
            assert flags == zmq.NOBLOCK, "an idle loop waits here until the next command"
            raise zmq.Again
        return self.incoming.pop(0)

    def send(self, message: bytes) -> None:
        self.reports.append(msgspec.msgpack.decode(message, type=Report))  # type: ignore[arg-type]
        self.sent = [report for report in self.reports if isinstance(report, StepDone)]


def new_loop(*commands: Command) -> tuple[EngineLoop, FakeSocket]:
    socket = FakeSocket(*commands)
    loop = EngineLoop(engine(FakeRunner(), max_waiting=1), commands=socket, events=socket)  # type: ignore[arg-type]
    return loop, socket


def test_all_events_of_a_step_travel_in_one_message() -> None:
    loop, socket = new_loop(
        *AddRequests.of([request("a", max_tokens=2)]), *AddRequests.of([request("b", max_tokens=2)])
    )
    loop.turn()
    loop.turn()
    assert [[event.request_id for event in message.events] for message in socket.sent] == [["a", "b"], ["a", "b"]]
    assert [event.finish_reason for event in socket.sent[1].events] == [FinishReason.LENGTH] * 2


def test_it_waits_for_a_command_only_when_idle() -> None:
    loop, socket = new_loop(*AddRequests.of([request("a", max_tokens=3)]))
    for _ in range(3):
        loop.turn()
    assert socket.num_waits == 1
    with pytest.raises(AssertionError, match="waits here"):
        loop.turn()


def test_the_last_message_before_idling_says_that_nothing_runs() -> None:
    loop, socket = new_loop(*AddRequests.of([request("a", max_tokens=2)]))
    loop.turn()
    loop.turn()
    stats = socket.sent[-1].stats
    assert stats is not None
    assert (stats.num_running, stats.num_free_slots, stats.num_steps) == (0, 2, 2)


def test_statistics_come_about_once_a_second_and_not_with_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = 100.0
    monkeypatch.setattr("server.engine.process.main.time.monotonic", lambda: clock)
    loop, socket = new_loop(*AddRequests.of([request("a")]))
    for seconds in (0.0, 0.5, 0.49, 0.02, 0.5):
        clock += seconds
        loop.turn()
    assert [message.stats is not None for message in socket.sent] == [True, False, False, True, False]


def test_a_refused_request_is_answered_in_the_same_turn() -> None:
    loop, socket = new_loop(*AddRequests.of(request(name) for name in "abcd"))
    loop.turn()
    refused = [event for event in socket.sent[0].events if event.finish_reason is FinishReason.ERROR]
    assert [event.request_id for event in refused] == ["d"]


def test_an_abort_is_answered_once_and_an_unknown_one_not_at_all() -> None:
    commands = [*AddRequests.of([request("a")]), AbortRequest("a"), AbortRequest("a"), AbortRequest("never seen")]
    loop, socket = new_loop(*commands)
    loop.turn()
    assert [(event.request_id, event.finish_reason) for event in socket.sent[0].events] == [("a", FinishReason.ABORT)]


def test_a_request_is_said_to_have_begun_before_its_first_step_and_only_then() -> None:
    loop, socket = new_loop(*AddRequests.of([request("a", max_tokens=2)]), *AddRequests.of([request("b")]))
    for _ in range(3):
        loop.turn()
    assert socket.reports[0] == Begun(["a", "b"])
    assert sum(isinstance(report, Begun) for report in socket.reports) == 1


def test_a_heartbeat_is_answered_by_a_busy_and_by_an_idle_engine() -> None:
    loop, socket = new_loop(Heartbeat(), *AddRequests.of([request("a", max_tokens=1)]))
    loop.turn()
    assert socket.reports[0] == Alive()
    assert socket.sent[-1].events[0].finish_reason is FinishReason.LENGTH


def test_requests_of_one_prompt_cross_in_one_message_and_share_it_in_memory() -> None:
    prompt = tuple(range(48)) * 1_000
    group = [replace(request(f"g{number}", max_tokens=1), prompt_token_ids=prompt) for number in range(16)]
    messages = AddRequests.of([*group, request("other")])
    assert len(messages) == 2
    wire = msgspec.msgpack.encode(messages[0])
    assert len(wire) < 2 * len(msgspec.msgpack.encode(prompt))
    arrived = msgspec.msgpack.decode(wire, type=AddRequests).whole()
    assert arrived == group
    assert len({id(one.prompt_token_ids) for one in arrived}) == 1


def test_tokens_survive_the_wire() -> None:
    loop, socket = new_loop(*AddRequests.of([request("a", 4, 5, max_tokens=3)]))
    for _ in range(3):
        loop.turn()
    tokens = [token for message in socket.sent for event in message.events for token in event.token_ids]
    assert tokens == expected_output((4, 5), 3)


def test_the_process_starts_without_torch_and_can_so_report_a_broken_one() -> None:
    program = "import sys, server.engine.process.main; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_a_failure_is_logged_in_one_line_without_values(monkeypatch: pytest.MonkeyPatch) -> None:
    stderr = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stderr)

    def step(prompt: tuple[int, ...]) -> None:
        raise RuntimeError("device\nlost")

    try:
        step((4815162342,))
    except RuntimeError as error:
        log_failure("engine_step_failed", error)
    lines = stderr.getvalue().splitlines()
    assert len(lines) == 1
    logged = json.loads(lines[0])
    assert (logged["event"], logged["error"], logged["message"]) == (
        "engine_step_failed",
        "RuntimeError",
        "device\nlost",
    )
    assert [frame.split(" ")[1] for frame in logged["frames"]] == [
        "test_a_failure_is_logged_in_one_line_without_values",
        "step",
    ]
    assert "4815162342" not in lines[0]


def test_requests_that_share_a_prompt_cross_in_one_message_with_one_prompt() -> None:
    prompt = tuple(range(1, 2_000))
    group = [replace(request(f"r{number}", *prompt), group="g") for number in range(16)]
    other = request("other", 1, 2)
    messages = AddRequests.of([*group, other])
    assert len(messages) == 2
    encoded = msgspec.msgpack.encode(messages[0])
    assert len(encoded) < 2 * len(msgspec.msgpack.encode(prompt)) + 16 * 1_000
    whole = msgspec.msgpack.decode(encoded, type=AddRequests).whole()
    assert whole == group
    assert all(one.prompt_token_ids is whole[0].prompt_token_ids for one in whole), "in memory it is there once, too"
