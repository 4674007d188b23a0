"""The start-up summary says what an operator wants to know."""

import socket
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from dijiang_model.formats.sizes import size_text
from server.hardware import Device
from server.keys import hash_key
from server.options import ServiceOptions
from server.startup.assemble import engine_config
from server.startup.notices import Notices
from server.startup.settings import Settings
from server.startup.summary import Summary
from tests.server.fake_engine import FakeEngine


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (4_613_734, "4.4 MiB"),
        (3 << 30, "3.0 GiB"),
        (5 << 40, "5120.0 GiB"),
    ],
)
def test_sizes_are_written_with_one_digit(num_bytes: int, text: str) -> None:
    assert size_text(num_bytes) == text


@pytest.mark.parametrize(("host", "shown"), [("127.0.0.1", "127.0.0.1"), ("0.0.0.0", "127.0.0.1")])
def test_model_capacity_keys_and_the_url_to_paste_are_told(tmp_path: Path, host: str, shown: str) -> None:
    settings = Settings(host=host)
    config = engine_config(settings, tmp_path, Device("cpu", 1 << 30))
    options = ServiceOptions(model_name="org/[tiny]", key_hashes=frozenset({hash_key(b"k")}))
    info = replace(FakeEngine().info, num_slots=512, state_bytes_per_slot=4_613_734, memory="284 places a head")
    console = Console(width=120)
    with socket.socket() as listener:
        listener.bind((host, 0))
        port = listener.getsockname()[1]
        summary = Summary(settings, config, options, "hybrid", None, listener)
    with console.capture() as captured:
        Notices(console).show("ready", summary.rows(info))
    text = captured.get()
    for part in ("org/[tiny]", "hybrid", "512 conversations of 4.4 MiB", "float32", "1 accepted", "token ids only",
                 "4.4 MiB: 284 places a head"):  # fmt: skip
        assert part in text
    assert f"http://{shown}:{port}/v1" in text
    assert "warning" not in text


def test_slow_steps_are_told_with_what_mends_them(tmp_path: Path) -> None:
    settings = Settings()
    config = engine_config(settings, tmp_path, Device("cpu", 1 << 30))
    info = replace(FakeEngine().info, slow_because="the kernels are old; `make kernels` mends it")
    console = Console(width=160)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        summary = Summary(settings, config, ServiceOptions(model_name="tiny"), "hybrid", None, listener)
    with console.capture() as captured:
        Notices(console).show("ready", summary.rows(info))
    assert "the kernels are old; `make kernels` mends it" in captured.get()
    assert "torch operations" in captured.get()
