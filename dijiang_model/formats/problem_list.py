"""One error text for many problems: all of them are found before anything is raised, the list is bounded."""

from collections.abc import Sequence

MAX_LISTED = 20
MAX_LINE_CHARACTERS = 300


def problem_list(title: str, problems: Sequence[str]) -> str:
    """`title` and one line per problem; beyond `MAX_LISTED` only their number is told."""
    lines = [f"  - {_shortened(problem)}" for problem in problems[:MAX_LISTED]]
    if len(problems) > MAX_LISTED:
        lines.append(f"  - and {len(problems) - MAX_LISTED:,} more")
    return "\n".join([f"{title}:", *lines])


def _shortened(text: str) -> str:
    return text if len(text) <= MAX_LINE_CHARACTERS else text[: MAX_LINE_CHARACTERS - 3] + "..."
