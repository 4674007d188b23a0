"""A short soak of a tiny model on real processes, and what it would report."""

from pathlib import Path

import httpx
import pytest

from benchmarks.resilience.soak import Footprint, SoakReport, compare, run_soak
from benchmarks.resilience.soak_load import Load
from tests.tiny_models import write_tiny_model


def test_a_short_soak_loses_nothing_and_leaves_nothing_behind(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "tiny")
    report = run_soak(
        model, seconds=16, num_clients=6, kill_every_s=5, options=("--threads", "1", "--max-conversations", "4")
    )
    assert report.problems == []
    assert report.server_kills == 1
    assert report.engine_kills >= 1
    for kind in ("answer", "left", "deadline", "bad input", "saved", "resumed", "response"):
        assert report.done[kind] > 0, kind
    assert report.states > 0
    assert report.responses > 0


@pytest.mark.anyio
async def test_wrong_tokens_and_unexpected_ends_are_problems_and_refusals_are_none() -> None:
    load = Load("http://none", "key")
    await load.http.aclose()
    answers = iter(
        [
            httpx.Response(200, json={"choices": [{"token_ids": [1, 3]}]}),
            httpx.Response(503, json={}),
            httpx.Response(500, json={}),
            httpx.Response(200, json={"choices": [{"token_ids": [1, 2]}]}),
        ]
    )
    load.http = httpx.AsyncClient(base_url="http://none", transport=httpx.MockTransport(lambda _: next(answers)))
    load.right = [[1, 2]] * len(load.prompts)
    for _ in range(4):
        await load.answer()
    await load.http.aclose()
    assert len(load.notes.problems) == 2
    assert "wrong tokens" in load.notes.problems[0]
    assert "status 500" in load.notes.problems[1]
    assert load.notes.done == {"answer": 2, "refused with 503": 1}


def test_memory_and_descriptors_beyond_those_of_a_fresh_server_are_problems() -> None:
    report = SoakReport(after=Footprint(100 << 20, 50), fresh=Footprint(90 << 20, 45))
    compare(report)
    assert report.problems == []
    report.after = Footprint(400 << 20, 500)
    compare(report)
    assert [problem.split(":")[0] for problem in report.problems] == ["memory", "descriptors"]
