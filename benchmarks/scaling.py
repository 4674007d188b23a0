"""A thousand replicas on paper: what routing, copies and the loss of a zone cost the store of states.

    python -m benchmarks.scaling --out docs/scaling.svg

Simulates conversations over replicas with SimPy: each thinks, sends a turn to a replica and waits for a slot; its state
is read from the store unless the replica has a copy, and written there at the end. Per replica nothing depends on their
number, so a hundred stand for a thousand.
"""

import random
from collections import OrderedDict
from collections.abc import Generator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import simpy
import typer

Routing = Literal["home", "random"]


@dataclass(frozen=True, slots=True)
class Plan:
    """What is simulated.

    Attributes:
        replicas / zones: engines, and zones that they are spread over.
        slots: of each engine.
        per_replica: conversations that are going on, for each replica.
        think_s / answer_s: mean times between an answer and the next turn, and of a turn in its slot; exponential.
        copies: states of which a replica keeps a copy.
        seconds: simulated.
        zone_lost_s: when the first zone is lost; None: never.
    """

    replicas: int = 100
    zones: int = 3
    slots: int = 16
    per_replica: int = 100
    think_s: float = 60.0
    answer_s: float = 5.0
    copies: int = 127
    seconds: float = 600.0
    zone_lost_s: float | None = None
    routing: Routing = "home"


class Replica:
    """One engine: slots, and copies of the states that were used last."""

    def __init__(self, env: simpy.Environment, plan: Plan) -> None:
        self.slots = simpy.Resource(env, plan.slots)
        self._copies: OrderedDict[int, None] = OrderedDict()
        self._max = plan.copies

    @property
    def load(self) -> int:
        return int(self.slots.count) + len(self.slots.queue)

    def use(self, conversation: int) -> bool:
        """Whether a copy was here; there is one now."""
        was_here = conversation in self._copies
        self._copies[conversation] = None
        self._copies.move_to_end(conversation)
        if len(self._copies) > self._max:
            self._copies.popitem(last=False)
        return was_here


class Fleet:
    """See the module.

    Attributes:
        turns / reads: times at which turns ended, and states were read from the store.
        waits: seconds that turns have waited for a slot.
    """

    def __init__(self, plan: Plan, seed: int = 0) -> None:
        self.plan = plan
        self._dice = random.Random(seed)
        self._env = simpy.Environment()
        self._replicas = [Replica(self._env, plan) for _ in range(plan.replicas)]
        self._alive = list(range(plan.replicas))
        self.turns: list[float] = []
        self.reads: list[float] = []
        self.waits: list[float] = []

    def run(self) -> "Fleet":
        for conversation in range(self.plan.per_replica * self.plan.replicas):
            self._env.process(self._talk(conversation))
        if self.plan.zone_lost_s is not None:
            self._env.process(self._lose_zone(self.plan.zone_lost_s))
        self._env.run(until=self.plan.seconds)
        return self

    def _talk(self, conversation: int) -> Generator[Any, Any, None]:
        home: int | None = None
        while True:
            yield self._env.timeout(self._dice.expovariate(1 / self.plan.think_s))
            home = self._chosen(home)
            replica, begin = self._replicas[home], self._env.now
            with replica.slots.request() as slot:
                yield slot
                self.waits.append(self._env.now - begin)
                if not replica.use(conversation):
                    self.reads.append(self._env.now)
                yield self._env.timeout(self._dice.expovariate(1 / self.plan.answer_s))
            self.turns.append(self._env.now)

    def _chosen(self, home: int | None) -> int:
        """The home unless it is gone or full, else the better of two."""
        stays = home is not None and self.plan.routing == "home" and self._is_alive(home)
        if home is not None and stays and self._replicas[home].load < self.plan.slots:
            return home
        one, two = self._dice.choice(self._alive), self._dice.choice(self._alive)
        return min(one, two, key=lambda number: self._replicas[number].load)

    def _is_alive(self, number: int) -> bool:
        lost_s = self.plan.zone_lost_s
        return lost_s is None or self._env.now < lost_s or number % self.plan.zones != 0

    def _lose_zone(self, at_s: float) -> Generator[Any, Any, None]:
        yield self._env.timeout(at_s)
        self._alive = [number for number in self._alive if number % self.plan.zones != 0]

    def read_share(self, after_s: float = 200.0) -> float:
        """States read from the store for each turn, once the caches are warm."""
        turns = sum(time > after_s for time in self.turns)
        return sum(time > after_s for time in self.reads) / max(1, turns)


def sweep(plan: Plan, sizes: list[int]) -> dict[Routing, list[float]]:
    """Reads for each turn, by conversations for each replica."""
    small = replace(plan, replicas=30)
    routings: tuple[Routing, ...] = ("home", "random")
    return {
        routing: [Fleet(replace(small, per_replica=size, routing=routing)).run().read_share() for size in sizes]
        for routing in routings
    }


def rates(times: list[float], seconds: float, bucket_s: float = 10.0) -> list[float]:
    """Events a second, by bucket."""
    counts = [0] * int(seconds / bucket_s)
    for time in times:
        if time < seconds:
            counts[int(time / bucket_s)] += 1
    return [count / bucket_s for count in counts]


def main(out: Annotated[Path, typer.Option(help="SVG with the plots.")] = Path("docs/scaling.svg")) -> None:
    """Prints the numbers of docs/scaling.md and draws its figure."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    plan, sizes = Plan(), [25, 50, 100, 150, 190]
    shares = sweep(plan, sizes)
    lost = Fleet(replace(plan, replicas=99, per_replica=80, zone_lost_s=300.0)).run()
    print("conversations/replica", sizes)
    for routing, values in shares.items():
        print(f"reads/turn, {routing:6}", [round(value, 3) for value in values])
    reads, turns = (rates(times, lost.plan.seconds) for times in (lost.reads, lost.turns))
    print("zone lost at 300 s: reads/s before", round(sum(reads[20:30]) / 10, 1), "peak", max(reads[30:]))
    print("turns/s before", round(sum(turns[20:30]) / 10, 1), "after", round(sum(turns[-10:]) / 10, 1))
    waits = sorted(lost.waits)
    print("wait for a slot, 99th percentile:", round(waits[int(0.99 * len(waits))], 2), "s")
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    for routing, values in shares.items():
        left.plot(sizes, values, marker="o", label=routing)
    left.axvline(plan.copies, color="grey", linestyle=":", label=f"{plan.copies} copies")
    left.set(xlabel="conversations for each replica", ylabel="states read for each turn", ylim=(0, 1.05))
    left.legend()
    times = [10.0 * number for number in range(len(reads))]
    right.plot(times, turns, label="turns/s (states written/s)")
    right.plot(times, reads, label="states read/s")
    right.axvline(300, color="grey", linestyle=":", label="a zone of three is lost")
    right.set(xlabel="seconds, 99 replicas", ylim=(0, None))
    right.legend()
    figure.savefig(out)


if __name__ == "__main__":
    typer.run(main)
