"""What is exported, what the documentation and the dashboard speak of: the same, and in the form that is read."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from server.engine.types.position_stats import NORM_BUCKETS, STEP_BUCKETS_S, PositionRecorder
from server.engine.types.requests import EngineStats, GenerationRequest, SamplingParams
from server.engine_client.submissions import TenantLoad
from server.generation.measures import Measures
from server.keys import MAX_LABELS, OTHERS, KeyLabels
from server.metrics import Metrics
from server.states.store import StoreTotals
from server.tracing import NO_TRACE
from tests.server.fake_engine import FakeEngine

DOCS = Path(__file__).parents[2] / "docs"
DASHBOARD = json.loads((DOCS / "grafana" / "dijiang.json").read_text(encoding="utf-8"))
QUERIES = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
NAME = re.compile(r"\b(?:dijiang|process)_[a-z0-9_]+")


class BusyEngine(FakeEngine):
    """Has numbers of everything."""

    @property
    def stats(self) -> EngineStats:
        times, norms = PositionRecorder(STEP_BUCKETS_S), PositionRecorder(NORM_BUCKETS)
        for position in (3, 1_000, 1_000_000):
            times.observe(position, 0.0175)
            norms.observe(position, 500.0)
        return replace(
            super().stats,
            token_times=times.histogram(),
            state_norms=norms.histogram(),
            largest_state_norm=500.0,
            num_not_finite=2,
        )

    @property
    def loads(self) -> dict[str, TenantLoad]:
        return {"ann": TenantLoad(2, 3), "bob": TenantLoad(1, 0), "carl": TenantLoad(4, 5)}


class Totals:
    totals = StoreTotals(num_states=1, num_bytes=2, max_bytes=3)


@pytest.fixture(scope="module")
def exported() -> str:
    metrics = Metrics(BusyEngine())
    metrics.watch_states(Totals())
    metrics.finished.labels("stop").inc()
    metrics.connections_cut.labels("unread").inc()
    metrics.http_requests.labels("GET", "/health", "200").inc()
    measures = Measures(metrics, NO_TRACE, "ann", GenerationRequest("r", (1, 2), SamplingParams()))
    measures.begun()
    measures.tokens(1)
    measures.end(num_tokens=1)
    metrics.tenant_prompt_tokens.labels("ann").inc(2)
    return metrics.render()[0].decode()


def samples(text: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if not sample.name.endswith("_created")
    }


def test_times_of_tokens_are_a_histogram_for_each_range_of_positions(exported: str) -> None:
    found = samples(exported)
    name = "dijiang_decode_token_seconds"
    for position, count in (("0-1k", 2), ("512k-", 1)):
        labels = ("position", position)
        assert found[f"{name}_count", (labels,)] == count
        assert found[f"{name}_sum", (labels,)] == pytest.approx(0.0175 * count)
        assert found[f"{name}_bucket", (("le", "0.015"), labels)] == 0
        assert found[f"{name}_bucket", (("le", "0.02"), labels)] == count
        assert found[f"{name}_bucket", (("le", "+Inf"), labels)] == count
    assert (f"{name}_count", (("position", "8k-64k"),)) not in found
    assert found["dijiang_state_norm_bucket", (("le", "1000.0"), ("position", "0-1k"))] == 2
    assert found["dijiang_state_norm_largest", ()] == 500
    assert found["dijiang_requests_not_finite_total", ()] == 2


def test_every_metric_of_the_dashboard_is_exported_with_the_labels_it_asks_for(exported: str) -> None:
    labels: dict[str, set[str]] = {}
    for name, pairs in samples(exported):
        labels.setdefault(name, {"job", "instance"}).update(key for key, _ in pairs)
    expressions = [target["expr"] for panel in QUERIES for target in panel["targets"]]
    expressions += [variable["definition"] for variable in DASHBOARD["templating"]["list"] if "definition" in variable]
    for expression in expressions:
        names = NAME.findall(expression)
        assert names, expression
        assert set(names) <= set(labels), expression
        grouped = {word for group in re.findall(r"by \(([^)]*)\)", expression) for word in group.split(", ")}
        assert grouped <= set().union(*(labels[name] for name in names)), expression
    assert {re.sub("_(bucket|sum|count)$", "", name) for name in labels if name.startswith("dijiang_")} == {
        re.sub("_(bucket|sum|count)$", "", name)
        for expression in expressions
        for name in NAME.findall(expression)
        if name.startswith("dijiang_")
    }, "the dashboard shows everything"


def test_the_dashboard_is_well_formed() -> None:
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids)
    cells: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        place: dict[str, int] = panel["gridPos"]
        covered = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not covered & cells, panel["title"]
        assert max(x for x, _ in covered) < 24
        cells |= covered
    for panel in QUERIES:
        assert panel["title"]
        assert panel["description"]
        assert all(_is_balanced(target) for target in panel["targets"])


def _is_balanced(target: dict[str, Any]) -> bool:
    expression = target["expr"]
    return all(expression.count(left) == expression.count(right) for left, right in ("()", "{}", "[]"))


def test_every_metric_is_documented_and_nothing_else(exported: str) -> None:
    families = {family.name: family for family in text_string_to_metric_families(exported)}
    ours = {
        f"{name}_total" if family.type == "counter" else name: family.type
        for name, family in families.items()
        if name.startswith("dijiang_") and not name.endswith("_created")
    }
    documented = {}
    for line in (DOCS / "metrics.md").read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.split("|")]
        if len(cells) == 5 and cells[1].startswith("`"):
            documented.update(dict.fromkeys(NAME.findall(cells[1]), cells[2]))
    assert documented == ours


def test_keys_of_one_label_are_added_up() -> None:
    metrics = Metrics(BusyEngine(), lambda owner: owner if owner == "ann" else OTHERS)
    found = samples(metrics.render()[0].decode())
    for state, ann, others in (("running", 2, 5), ("waiting", 3, 5)):
        name = f"dijiang_tenant_requests_{state}"
        assert found[name, (("tenant", "ann"),)] == ann
        assert found[name, (("tenant", OTHERS),)] == others


def test_labels_of_keys_are_of_bounded_number() -> None:
    labels = KeyLabels()
    first = labels.of("first")
    assert len({labels.of(f"{number:08d}") for number in range(10 * MAX_LABELS)}) == MAX_LABELS
    assert labels.of("one more") == OTHERS
    assert labels.of("first") == first, "who was there stays"
