"""The loss curve of a run as a picture, where matplotlib is installed (the `train` extra)."""

import importlib.util
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dijiang_model.formats.atomic_file import write_atomically

SMOOTHED_STEPS = 10


def plot_losses(lines: Sequence[Mapping[str, Any]], path: Path) -> bool:
    """Writes a PNG of the losses by tokens, one panel per stage.

    Args:
        lines: of the log.

    Returns:
        False where matplotlib is not installed or there is nothing to draw.
    """
    if importlib.util.find_spec("matplotlib") is None or not lines:
        return False
    from matplotlib.figure import Figure

    stages = sorted({line["stage"] for line in lines})
    figure = Figure(figsize=(5 * len(stages), 3.5), layout="constrained")
    for place, stage in enumerate(stages, start=1):
        axes = figure.add_subplot(1, len(stages), place)
        chosen = [line for line in lines if line["stage"] == stage]
        tokens = [line["tokens"] / 1000 for line in chosen]
        losses = [line["loss"] for line in chosen]
        axes.plot(tokens, losses, linewidth=0.5, alpha=0.5)
        axes.plot(tokens, _smoothed(losses), linewidth=1.5)
        axes.set_title("attention error (relative)" if stage == 1 else "KL to the teacher (nats per token)")
        axes.set_xlabel("thousand tokens")
    save_figure(figure, path)
    return True


def save_figure(figure: Any, path: Path) -> None:
    """Writes a matplotlib figure as PNG.

    Raises:
        CheckpointError: the folder cannot be written.
    """
    picture = io.BytesIO()
    figure.savefig(picture, dpi=120, format="png")
    write_atomically(path, picture.getvalue())


def _smoothed(values: Sequence[float]) -> list[float]:
    means = []
    for index in range(len(values)):
        part = values[max(0, index - SMOOTHED_STEPS + 1) : index + 1]
        means.append(sum(part) / len(part))
    return means
