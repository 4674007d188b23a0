"""Training in the terminal: progress bars with tokens a second and time left; signals end a run after its step."""

import signal
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from dijiang_model.conversion.training.train import Trainer, train


class _Stop:
    """Remembers that the user or the system asked to stop; the run ends after the step."""

    def __init__(self) -> None:
        self.is_asked = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._ask)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.is_asked = True

    def __call__(self) -> bool:
        return self.is_asked


def run(trainer: Trainer, out: Path, console: Console, save_every_s: float) -> bool:
    """Trains with a progress bar; whether the run is done. See `train` for what it raises."""
    if trainer.is_done:
        console.print(f"The run is done already: {trainer.progress.tokens:,} tokens", highlight=False)
        return True
    stop = _Stop()
    columns = (
        TextColumn("stage {task.fields[stage]}"),
        BarColumn(),
        TextColumn("{task.fields[tokens]:,} tokens, {task.fields[speed]}"),
        TimeElapsedColumn(),
        TextColumn("{task.fields[left]} left"),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("train", total=1.0, stage=1, tokens=0, speed="first step", left="?")

        def show(line: dict[str, Any]) -> None:
            done = trainer.share_done
            seconds = line["seconds"] * (1 - done) / max(done, 1e-9)
            progress.update(
                task,
                completed=done,
                stage=line["stage"],
                tokens=line["tokens"],
                speed=f"{line['tokens_per_s']:,.0f}/s, loss {line['loss']:.4f}",
                left=f"{seconds / 60:.0f} min",
            )

        return train(trainer, out, save_every_s=save_every_s, on_step=show, should_stop=stop)


def replay(trainer: Trainer, out: Path, epochs: int, console: Console) -> bool:
    """Stage 1 on a record of the teacher, saved after each layer; see `layer_fit`."""
    stop = _Stop()
    with Progress(*Progress.get_default_columns(), console=console) as progress:
        reading = progress.add_task("teacher reads", total=trainer.num_steps)
        fitting = progress.add_task("layers learn", total=trainer.model.config.num_layers)
        return trainer.replay(
            out,
            epochs=epochs,
            on_segment=lambda: progress.advance(reading),
            on_layer=lambda layer: progress.update(fitting, completed=layer + 1),
            should_stop=stop,
        )
