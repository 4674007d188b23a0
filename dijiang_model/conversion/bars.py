"""The progress bars of the commands that write models."""

from collections.abc import Callable

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from dijiang_model.formats.sizes import size_text


def bars(console: Console) -> Progress:
    """Bars for `counted`; to be entered."""
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[done]}"), TimeElapsedColumn())
    return Progress(*columns, console=console)


def sizes(done: int, total: int) -> str:
    """`2.0 MiB of 4.4 GiB`."""
    return f"{size_text(done)} of {size_text(total)}"


def counted(progress: Progress, description: str, text: Callable[[int, int], str]) -> Callable[[int, int], None]:
    """Returns what is called with what is done and of how much; the bar appears with the first call.

    Args:
        text: the two for people.
    """
    task = progress.add_task(description, total=None, visible=False, done="")

    def show(done: int, total: int) -> None:
        progress.update(task, completed=done, total=total, visible=True, done=text(done, total))

    return show
