"""Plots of results, where matplotlib is installed (the `bench` extra)."""

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path

Series = Mapping[str, Sequence[float | None]]
"""By name, a value for each group or place; None: none."""


def is_available() -> bool:
    """Whether plots can be drawn."""
    return importlib.util.find_spec("matplotlib") is not None


def bars(path: Path, *, title: str, unit: str, groups: Sequence[str], series: Series) -> None:
    """Groups of bars, each with its value on top, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(6.0, 1.2 * len(groups) * max(1, len(series)) * 0.8), 4.5), layout="constrained")
    axes = figure.add_subplot()
    width = 0.8 / max(1, len(series))
    for place, (name, values) in enumerate(series.items()):
        at = [group + (place - (len(series) - 1) / 2) * width for group in range(len(values))]
        drawn = axes.bar(at, [0.0 if value is None else value for value in values], width, label=name)
        axes.bar_label(drawn, ["" if value is None else f"{value:.3g}" for value in values], fontsize=7)
    axes.set_xticks(range(len(groups)), groups)
    axes.set_ylabel(unit)
    axes.set_title(title)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120, format="png")


def lines(
    path: Path, *, title: str, x_label: str, x: Sequence[float], panels: Mapping[str, Series], logarithmic: bool = True
) -> None:
    """One panel for each unit, lines over the same places, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5 * len(panels), 4.2), layout="constrained")
    for place, (unit, series) in enumerate(panels.items(), start=1):
        axes = figure.add_subplot(1, len(panels), place)
        for name, values in series.items():
            kept = [(at, value) for at, value in zip(x, values, strict=True) if value is not None]
            axes.plot([at for at, _ in kept], [value for _, value in kept], marker="o", label=name)
        if logarithmic:
            axes.set_xscale("log", base=2)
            axes.set_xticks(list(x), [f"{at:,g}" for at in x])
            axes.minorticks_off()
        axes.set_ylim(bottom=0)
        axes.set_xlabel(x_label)
        axes.set_ylabel(unit)
        axes.legend(fontsize=8)
    figure.suptitle(title)
    figure.savefig(path, dpi=120, format="png")
