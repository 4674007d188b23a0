"""`dijiang top`: what is computed of two looks at a server, one frame of a real one, and what is said without one."""

import io
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from clients.scrape import Interval, Scrape
from clients.top import frame
from tests.e2e.serving import serving
from tests.ports import free_port
from tests.tiny_models import write_tiny_model
from tests.waiting import PATIENCE_S

BEFORE = """
dijiang_engine_up 1.0
dijiang_engine_restarts_total 2.0
dijiang_slots 32.0
dijiang_slots_free 20.0
dijiang_num_requests_running 12.0
dijiang_num_requests_waiting 3.0
dijiang_engine_decode_tokens_total 1000.0
dijiang_saved_states 2.0
dijiang_state_store_up 0.0
dijiang_inter_token_latency_seconds_bucket{le="0.01"} 5.0
dijiang_inter_token_latency_seconds_bucket{le="0.02"} 5.0
dijiang_inter_token_latency_seconds_bucket{le="+Inf"} 5.0
dijiang_tenant_requests_running{tenant="ann"} 1.0
dijiang_tenant_requests_waiting{tenant="ann"} 0.0
dijiang_tenant_requests_running{tenant="bob"} 11.0
dijiang_tenant_requests_waiting{tenant="bob"} 3.0
dijiang_tenant_requests_finished_total{finished_reason="stop",tenant="bob"} 5.0
"""
NOW = (
    BEFORE.replace("total 1000.0", "total 1400.0")
    .replace('{le="0.02"} 5.0', '{le="0.02"} 15.0')
    .replace('{le="+Inf"} 5.0', '{le="+Inf"} 15.0')
    .replace('tenant="bob"} 5.0', 'tenant="bob"} 9.0')
)


def scrape(text: str, at_s: float) -> Scrape:
    return Scrape(at_s, Scrape.call().parse(text.encode()).samples)


@pytest.fixture
def interval() -> Interval:
    return Interval(scrape(BEFORE, 10.0), scrape(NOW, 12.0))


def shown(interval: Interval) -> str:
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(frame("http://there", interval))
    return console.export_text()


def test_rates_and_quantiles_are_of_the_interval_alone(interval: Interval) -> None:
    assert interval.rate("dijiang_engine_decode_tokens_total") == 200
    assert interval.quantile(0.5, "dijiang_inter_token_latency_seconds") == pytest.approx(0.015)
    assert interval.quantile(0.5, "dijiang_time_to_first_token_seconds") is None
    still = Interval(interval.now, interval.now)
    assert still.quantile(0.5, "dijiang_inter_token_latency_seconds") is None


def test_counters_that_began_anew_count_from_nothing(interval: Interval) -> None:
    restarted = Interval(interval.now, scrape("dijiang_engine_decode_tokens_total 30.0", 13.0))
    assert restarted.rate("dijiang_engine_decode_tokens_total") == 30


def test_values_beyond_the_last_bound_are_told_as_that(interval: Interval) -> None:
    late = NOW.replace('{le="+Inf"} 15.0', '{le="+Inf"} 100.0')
    found = Interval(interval.before, scrape(late, 12.0)).quantile(0.95, "dijiang_inter_token_latency_seconds")
    assert found == 0.02


def test_a_frame_shows_slots_queue_keys_speed_and_restarts(interval: Interval) -> None:
    text = shown(interval)
    for expected in (
        "http://there   engine up   restarts 2",
        "12 of 32 in use, 20 free, 3 waiting",
        "answers 200.0",
        "half within 15.0 ms",
        "STORE AWAY",
    ):
        assert expected in text
    lines = text.splitlines()
    rows = [line.split() for line in lines if line.startswith(("ann", "bob"))]
    assert [row[0] for row in rows] == ["bob", "ann"], "who has most comes first"
    assert rows[0][1:4] == ["11", "3", "2.0"]


def test_a_frame_says_that_the_engine_is_down(interval: Interval) -> None:
    down = scrape(NOW.replace("engine_up 1.0", "engine_up 0.0"), 12.0)
    assert "engine down" in shown(Interval(interval.before, down))


def top(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "server", "top", "--once", "--interval", "0.1", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=False)


def test_one_frame_of_a_running_server(tmp_path: Path) -> None:
    with serving(write_tiny_model(tmp_path / "tiny"), "--max-conversations", "4") as server:
        server.greedy("x", max_tokens=2)
        result = top("--base-url", f"{server.base_url}/v1")
    assert result.returncode == 0, result.stderr
    assert "0 of 4 in use, 4 free, 0 waiting" in result.stdout
    assert "everybody" in result.stdout


def test_without_a_server_there_is_one_clear_line() -> None:
    result = top("--base-url", f"http://127.0.0.1:{free_port()}")
    assert result.returncode == 1
    assert result.stderr.startswith("error: ")
    assert "dijiang serve" in result.stderr
    assert "Traceback" not in result.stderr
