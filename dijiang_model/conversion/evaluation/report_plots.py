"""The pictures of an evaluation, where matplotlib is installed (the `train` extra)."""

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dijiang_model.conversion.evaluation.measured import LONG_RANGES, RANGES, Evaluation
from dijiang_model.conversion.training.loss_plot import save_figure

Lines = Mapping[str, Sequence[float | None]]


def write_plots(evaluation: Evaluation, folder: Path) -> list[str]:
    """Writes a PNG for each thing that was measured; answers their names, none without matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        return []
    loss = "negative log-likelihood, nats per token"
    drawn = {"nll.png": _figure({name: s.means for name, s in evaluation.scores.items()}, RANGES, "position", loss)}
    if evaluation.long_scores:
        lines = {name: score.means for name, score in evaluation.long_scores.items()}
        drawn["long.png"] = _figure(lines, LONG_RANGES, "position", loss)
    if evaluation.recall:
        places = [result.distance for result in evaluation.recall]
        shares = {
            name: [100 * result.right[name] for result in evaluation.recall] for name in evaluation.recall[0].right
        }
        drawn["recall.png"] = _figure(shares, places, "tokens back", "facts answered rightly, %", from_zero=True)
    if len(evaluation.by_size) > 1:
        drawn["sizes.png"] = _sizes(evaluation)
    for name, figure in drawn.items():
        save_figure(figure, folder / name)
    return list(drawn)


def _figure(lines: Lines, places: Sequence[str], x_label: str, y_label: str, *, from_zero: bool = False) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    for name, values in lines.items():
        measured = [(place, value) for place, value in enumerate(values) if value is not None]
        axes.plot([place for place, _ in measured], [value for _, value in measured], marker="o", label=name)
    axes.set_xticks(range(len(places)), places)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    if from_zero:
        axes.set_ylim(bottom=0)
    axes.legend()
    return figure


def _sizes(evaluation: Evaluation) -> Any:
    """Likelihood and facts by the bytes of a state, and how a cache of keys and values grows beside it."""
    from matplotlib.figure import Figure

    points = evaluation.by_size
    sizes = [point.state_bytes / 1e6 for point in points]
    figure = Figure(figsize=(11, 4), layout="constrained")
    axes, growth = figure.subplots(1, 2)
    axes.plot(sizes, [point.gap for point in points], marker="o", color="tab:blue")
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [f"{size:.3g}" for size in sizes])
    axes.set_xlabel("state of a conversation, MB")
    axes.set_ylabel("nats per token behind the teacher", color="tab:blue")
    axes.set_ylim(bottom=0)
    facts = [(size, 100 * point.facts) for size, point in zip(sizes, points, strict=True) if point.facts is not None]
    if facts:
        right = axes.twinx()
        right.plot(*zip(*facts, strict=True), marker="s", color="tab:orange")
        right.set_ylabel("facts of the teacher's, %", color="tab:orange")
        right.set_ylim(0, 105)
    lengths = [2**power for power in range(7, 18)]
    growth.plot(lengths, [length * evaluation.cache_bytes / 1e6 for length in lengths], label="16-bit keys and values")
    for size in sizes:
        growth.axhline(size, linestyle="--", color="tab:gray")
        growth.annotate(f"{size:.3g} MB", (lengths[-1], size), ha="right", va="bottom")
    growth.set_xscale("log", base=2)
    growth.set_yscale("log")
    growth.set_xticks(lengths[::2], [f"{length:,}" for length in lengths[::2]])
    growth.set_xlabel("tokens of a conversation")
    growth.set_ylabel("memory, MB")
    growth.legend()
    return figure
