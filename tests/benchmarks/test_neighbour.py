"""What `dijiang bench neighbour` makes of what it has seen."""

from dataclasses import replace

from benchmarks.resilience.neighbour import ALONE, Noticed, Row, judged

QUIET = Row.of(ALONE, Noticed(firsts=[0.1], gaps=[0.02, 0.03], health=[0.01]))


def test_a_row_is_judged_by_the_slower_of_the_values_alone_around_it() -> None:
    slower = replace(QUIET, first_ms=200.0)
    row = replace(QUIET, name="slots", first_ms=500.0)
    assert judged([QUIET, row, slower]) == {"slots": []}
    assert judged([QUIET, row, QUIET]) == {"slots": ["first token"]}


def test_every_target_that_is_missed_is_named() -> None:
    bad = replace(QUIET, name="queue", first_ms=900.0, gap_ms=151.0, worst_health_ms=600.0, refused={503: 1})
    assert judged([QUIET, bad, QUIET]) == {"queue": ["first token", "gaps", "/health", "refused"]}
    assert judged([QUIET, replace(QUIET, name="queue", gap_ms=149.0), QUIET]) == {"queue": []}
