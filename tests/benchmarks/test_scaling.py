"""The simulation behind docs/scaling.md: routing home reads little, and a lost zone is read once."""

from dataclasses import replace

from benchmarks.scaling import Fleet, Plan, rates

SMALL = Plan(replicas=9, per_replica=20, copies=40, seconds=400)


def test_conversations_that_stay_at_home_are_hardly_read() -> None:
    home, anywhere = (Fleet(replace(SMALL, routing=routing)).run() for routing in ("home", "random"))
    assert home.read_share() < 0.05 < 0.5 < anywhere.read_share()


def test_copies_that_do_not_suffice_are_read_again() -> None:
    assert Fleet(replace(SMALL, copies=10)).run().read_share() > 0.3


def test_a_lost_zone_is_read_and_then_it_is_calm() -> None:
    fleet = Fleet(replace(SMALL, seconds=800, zone_lost_s=500.0)).run()
    before, after, later = (sum(rates(fleet.reads, 800)[begin : begin + 10]) for begin in (40, 50, 70))
    assert after > 3 * before
    assert after > later
    assert not {number % 3 for number in fleet._alive} & {0}


def test_the_same_seed_is_the_same_simulation() -> None:
    assert Fleet(SMALL, 3).run().reads == Fleet(SMALL, 3).run().reads
