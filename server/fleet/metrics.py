"""The metrics of many replicas as one text in Prometheus's format."""

from collections.abc import Mapping


def merged_metrics(texts: Mapping[str, bytes]) -> bytes:
    """Every sample of every replica, with a label `replica`; help and types once, samples of a metric together.

    Args:
        texts: by the name of the replica.
    """
    heads: dict[str, list[str]] = {}
    samples: dict[str, list[str]] = {}
    for name, text in texts.items():
        family = ""
        is_first: set[str] = set()
        for line in text.decode().splitlines():
            if line.startswith("# "):
                family = line.split(" ", 3)[2]
                if family not in heads or family in is_first:
                    heads.setdefault(family, []).append(line)
                    is_first.add(family)
            elif line:
                samples.setdefault(family, []).append(_labelled(line, name))
    lines = [line for family, lines in samples.items() for line in (*heads.get(family, ()), *lines)]
    return ("\n".join(lines) + "\n").encode()


def _labelled(line: str, name: str) -> str:
    series, _, value = line.partition("} ") if "{" in line else line.partition(" ")
    metric, brace, labels = series.partition("{")
    more = f",{labels}" if brace and labels else ""
    return f'{metric}{{replica="{name}"{more}}} {value}'
