"""A full disk costs what is new, and nothing that is there: a small file system that something else fills."""

import os
import secrets
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from server.states.errors import DiskFullError, StoreError
from server.states.files.local import SPARE_FILE
from tests.server.states.postgres_server import PostgresServer
from tests.server.states.running import Running, start
from tests.server.states.stores import EmbeddedKind, SharedKind, make, put_response
from tests.waiting import until

pytestmark = pytest.mark.anyio
SIZE_BYTES = 16 << 20


@dataclass
class SmallDisk:
    """A file system of its own."""

    folder: Path

    def fill(self) -> None:
        """Up to its last byte."""
        with (self.folder / "filler").open("wb", buffering=0) as file:
            for size in (1 << 20, 1 << 12, 1):
                try:
                    while True:
                        file.write(b"\0" * size)
                except OSError:
                    continue

    def clear(self) -> None:
        (self.folder / "filler").unlink()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk]:
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={SIZE_BYTES}", "none", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("file systems may not be mounted here")
    try:
        yield SmallDisk(folder)
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


async def test_a_full_disk_still_reads_deletes_and_tells_how_responses_ended(disk: SmallDisk) -> None:
    kind = EmbeddedKind(disk.folder / "states")
    content = b"x" * (1 << 20)
    store = kind.open(max_bytes=1 << 30)
    states = [await make(store, content=content, ttl_s=1000.0) for _ in range(3)]
    response = await put_response(store, "resp_1", "in_progress")
    await put_response(store, "resp_2", "in_progress")
    disk.fill()
    for _ in range(50):
        with pytest.raises(DiskFullError):
            await make(store, content=content)
    for _ in range(20):
        assert (await store.use("ann", states[0].id)).head == states[0].head
    async with store.hold(states[0].head, of=states[0]) as path:
        assert path.read_bytes() == content
    assert len(await store.list_states("ann", limit=9, after=None, name=None)) == 3
    assert (await store.get_response("ann", "resp_1")).body["status"] == "in_progress"
    await store.put_response(response.failed(code="state_storage_full", message="no room"))
    assert (await store.cancel_response("ann", "resp_2")).body["status"] == "cancelled"
    await store.delete("ann", states[1].id)
    await make(store)
    await store.heartbeat()
    await store.close()
    disk.clear()
    store = kind.open(max_bytes=1 << 30)
    assert (await store.get_response("ann", "resp_1")).body["error"]["code"] == "state_storage_full"
    assert len(await store.list_states("ann", limit=9, after=None, name=None)) == 3
    await store.close()


async def test_a_store_opens_on_a_full_disk_and_reads_and_deletes(disk: SmallDisk) -> None:
    kind = EmbeddedKind(disk.folder / "states")
    store = kind.open(max_bytes=1 << 30)
    states = [await make(store, content=b"x" * 1000) for _ in range(3)]
    await store.close()
    disk.fill()
    for number in range(5):
        store = kind.open(max_bytes=1 << 30)
        assert (await store.use("ann", states[0].id)).head == states[0].head
        if number == 0:
            await store.delete("ann", states[1].id)
        await store.close()
        disk.fill()


async def test_a_start_without_spare_space_on_a_full_disk_says_what_it_needs(disk: SmallDisk) -> None:
    kind = EmbeddedKind(disk.folder / "states")
    store = kind.open(max_bytes=1 << 30)
    state = await make(store)
    await store.close()
    (disk.folder / "states" / SPARE_FILE).unlink()
    disk.fill()
    with pytest.raises(StoreError, match="is full: 1,048,576 bytes are needed to start"):
        kind.open(max_bytes=1 << 30)
    disk.clear()
    store = kind.open(max_bytes=1 << 30)
    assert (await store.use("ann", state.id)).head == state.head
    await store.close()


async def test_copies_that_nobody_uses_make_way_on_a_full_disk(disk: SmallDisk, shared_kind: SharedKind) -> None:
    content = b"x" * (3 << 20)
    there = shared_kind.open(max_bytes=1 << 30)
    shared_kind.folder = disk.folder / "copies"
    here = shared_kind.open(max_bytes=1 << 30)
    states = [await make(there, content=content) for _ in range(9)]
    for state in (*states, *states):
        async with here.hold(state.head) as path:
            assert path.stat().st_size == len(content)
    await make(here, content=content)
    disk.fill()
    async with here.hold(states[0].head):
        await make(here, content=content)
        disk.fill()
        for path in here.files_folder.iterdir():
            if path.name != states[0].head.file:
                here._files.drop([path.name])
        disk.fill()
        with pytest.raises(DiskFullError):
            await make(here, content=content)
    await here.close()
    await there.close()


@pytest.fixture
def server(disk: SmallDisk, tiny: Path) -> Iterator[Running]:
    server = start(tiny, disk.folder)  # its log is beside it
    yield server
    server.close()


def test_on_a_full_disk_answers_end_properly(disk: SmallDisk, server: Running) -> None:
    state = server.post("/v1/states", prompt="Kept")["id"]
    ask: dict[str, Any] = {"input": "Hi", "temperature": 0, "max_output_tokens": 4}
    kept = server.post("/v1/responses", **ask)["id"]
    long = {**ask, "max_output_tokens": 500}
    started = server.post("/v1/responses", **long, background=True)["id"]
    disk.fill()
    for path, body in (
        ("/v1/states", {"prompt": "x"}),
        ("/v1/completions", {"prompt": "x", "return_state": True}),
        ("/v1/responses", ask),
        ("/v1/responses", {**ask, "background": True}),
    ):
        assert server.refused("POST", path, json=body)[:2] == (507, "state_storage_full")
    assert server.complete("!", state_id=state)["finish_reason"] == "length"
    assert server.get(f"/v1/responses/{kept}")["id"] == kept
    until(lambda: server.get(f"/v1/responses/{started}")["status"] in ("incomplete", "failed"))
    assert server.http.delete(f"/v1/states/{state}").status_code == 200
    assert server.http.delete(f"/v1/responses/{kept}").status_code == 200
    disk.clear()
    assert server.post("/v1/responses", **ask)["status"] == "incomplete"


def test_a_disk_that_fills_up_under_an_answer_costs_its_state_alone(disk: SmallDisk, server: Running) -> None:
    events = []
    body = {"input": "Hi", "temperature": 0, "max_output_tokens": 500, "stream": True}
    with server.http.stream("POST", "/v1/responses", json=body) as response:
        for line in response.iter_lines():
            if line.startswith("event: "):
                events.append(line.removeprefix("event: "))
                if len(events) == 10:
                    disk.fill()
    assert events[-1] == "response.incomplete"
    disk.clear()
    chunks = []
    body = {"prompt": "Hi", "temperature": 0, "max_tokens": 20_000, "ignore_eos": True, "return_state": True}
    with server.http.stream("POST", "/v1/completions", json={**body, "stream": True}) as response:
        for line in response.iter_lines():
            if line.startswith("data: {"):
                chunks.append(line)
                if len(chunks) == 10:
                    disk.fill()
    assert '"state_error"' in chunks[-1]
    assert '"code":"state_storage_full"' in chunks[-1]


@pytest.mark.slow
def test_copies_of_a_shared_store_make_way_on_a_full_disk_and_then_it_says_so(
    disk: SmallDisk, tiny: Path, postgres: PostgresServer
) -> None:
    schema = f"test_{secrets.token_hex(8)}"
    server = start(tiny, disk.folder, "--state-store", postgres.url, "--state-store-schema", schema)
    try:
        states = [server.post("/v1/states", prompt=f"State {number}")["id"] for number in range(40)]
        disk.fill()
        states.append(server.post("/v1/states", prompt="One more, where copies were")["id"])
        for state in states:  # each comes back where another one makes way
            assert server.complete("!", state_id=state)["finish_reason"] == "length"
        disk.fill()
        more_than_all_copies = {"prompt": "x", "n": 16, "max_tokens": 1, "return_state": True}
        refused = server.refused("POST", "/v1/completions", json=more_than_all_copies)
        assert refused[:2] == (507, "state_storage_full")
        for state in states:
            assert server.complete("!", state_id=state)["finish_reason"] == "length"
        disk.clear()
        assert len(server.post("/v1/completions", **more_than_all_copies)["choices"]) == 16
    finally:
        server.close()
