"""A thousand streams of a tiny model: all are whole, those that wait too.

How long any of them is silent, `dijiang bench streams` says, on a quiet machine.
"""

import asyncio
from pathlib import Path

from benchmarks.resilience.streams import StreamsReport, all_at_once
from tests.e2e.serving import serving
from tests.tiny_models import write_tiny_model


def test_a_thousand_streams_at_once_are_all_whole(tmp_path: Path) -> None:
    options = ("--max-conversations", "64", "--keepalive-s", "0.2")
    with serving(write_tiny_model(tmp_path / "tiny"), *options) as server:
        report = StreamsReport.of(asyncio.run(all_at_once(server.base_url, 1_000, 12)), 1.0)
        assert report.outcomes == {"whole": 1_000}
        assert report.num_comments > 0, "who waits hears something"
        assert server.gauge("dijiang_num_requests_waiting") == 0


def test_a_stream_that_is_refused_is_told_as_it_is(tmp_path: Path) -> None:
    with serving(write_tiny_model(tmp_path / "tiny"), "--max-conversations", "1", "--max-queue", "3") as server:
        report = StreamsReport.of(asyncio.run(all_at_once(server.base_url, 40, 300)), 1.0)
        assert report.has_failed
        assert report.outcomes.keys() == {"whole", "HTTP/1.1 503 Service Unavailable"}
