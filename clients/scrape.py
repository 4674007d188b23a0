"""Numbers of a running server, from `/metrics`, and what lies between two looks at them."""

import time
from collections.abc import Mapping
from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families

from clients.calls import Call

Labels = frozenset[tuple[str, str]]


@dataclass(frozen=True)
class Scrape:
    """All samples of one moment.

    Attributes:
        at_s: the moment, of `time.monotonic`.
        samples: name -> labels -> value.
    """

    at_s: float
    samples: Mapping[str, Mapping[Labels, float]]

    @classmethod
    def call(cls) -> "Call[Scrape]":
        """The request for one."""
        return Call("GET", "/metrics", cls._parsed)

    @classmethod
    def _parsed(cls, answer: object) -> "Scrape":
        """Raises `ValueError`: these are no metrics."""
        if not isinstance(answer, bytes):
            raise ValueError("these are no metrics")
        samples: dict[str, dict[Labels, float]] = {}
        for family in text_string_to_metric_families(answer.decode()):
            for sample in family.samples:
                samples.setdefault(sample.name, {})[frozenset(sample.labels.items())] = sample.value
        return cls(time.monotonic(), samples)

    def value(self, name: str, **labels: str) -> float:
        """One sample; 0 if there is none."""
        return self.samples.get(name, {}).get(frozenset(labels.items()), 0.0)

    def labelled(self, label: str) -> set[str]:
        """The values of a label, anywhere."""
        return {value for of_name in self.samples.values() for pairs in of_name for key, value in pairs if key == label}


@dataclass(frozen=True)
class Interval:
    """What happened between two scrapes of the same server."""

    before: Scrape
    now: Scrape

    @property
    def seconds(self) -> float:
        """Its length."""
        return max(1e-9, self.now.at_s - self.before.at_s)

    def rate(self, name: str, **labels: str) -> float:
        """Of a counter, a second; from 0 on if it has begun anew."""
        return self._more(name, frozenset(labels.items())) / self.seconds

    def quantile(self, share: float, name: str, **labels: str) -> float | None:
        """Of a histogram's observations in the interval; None if there were none.

        Within a bucket they are taken to be spread evenly, as Prometheus does.
        """
        wanted = frozenset(labels.items())
        bounds = sorted(
            (float(bound), pairs)
            for pairs in self.now.samples.get(f"{name}_bucket", {})
            for key, bound in pairs
            if key == "le" and pairs - {(key, bound)} == wanted
        )
        counts = [(bound, self._more(f"{name}_bucket", pairs)) for bound, pairs in bounds]
        if not counts or counts[-1][1] <= 0:
            return None
        rank, lower, below = share * counts[-1][1], 0.0, 0.0
        for bound, count in counts:
            if count >= rank:
                return lower if bound == float("inf") else lower + (bound - lower) * (rank - below) / (count - below)
            lower, below = bound, count
        return lower

    def _more(self, name: str, labels: Labels) -> float:
        now = self.now.samples.get(name, {}).get(labels, 0.0)
        before = self.before.samples.get(name, {}).get(labels, 0.0)
        return now - before if now >= before else now
