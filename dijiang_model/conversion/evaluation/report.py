"""An evaluation as Markdown, as tables for the model card, and as one line of JSON."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from dijiang_model.conversion.evaluation.evaluate import FAR_FROM
from dijiang_model.conversion.evaluation.measured import LONG_RANGES, RANGES, Evaluation
from dijiang_model.conversion.evaluation.recall import Recall
from dijiang_model.conversion.evaluation.report_plots import write_plots
from dijiang_model.conversion.evaluation.wanted import LONG_EDGES
from dijiang_model.errors import CheckpointError, ConfigError
from dijiang_model.formats.atomic_file import write_atomically
from dijiang_model.formats.json_fields import read_json_object

REPORT_FILE, JSON_FILE, TABLES_FILE = "report.md", "report.json", "tables.md"
REPORT_FILES = (JSON_FILE, TABLES_FILE, REPORT_FILE, "nll.png", "long.png", "recall.png", "sizes.png")
TOLD_ALL_ALONG = "Facts of eight kinds, told between passages of the text and asked for at the end of the chat."
TOLD_FIRST = "Three facts told in the first turn, then passages of the text, and all asked for at the end."
_JSON_MEMBERS = {"model", "teacher", "title", "scores", "state_bytes"}


def json_line(evaluation: Evaluation) -> str:
    """One line, for tables over many evaluations."""
    measured = ("scores", "recall", "first_turn", "long_scores")
    plain = {name: getattr(evaluation, name) for name in evaluation.__dataclass_fields__ if name not in measured}
    scores = {
        name: {"by_position": dict(zip(RANGES, score.means, strict=True)), f"from_{FAR_FROM}": score.far}
        for name, score in evaluation.scores.items()
    }
    long_scores = {
        name: {"by_position": dict(zip(LONG_RANGES, score.means, strict=True)), "fresh": score.fresh}
        for name, score in evaluation.long_scores.items()
    }
    facts = {
        name: [asdict(result) for result in found]
        for name, found in (("recall", evaluation.recall), ("first_turn", evaluation.first_turn))
    }
    return json.dumps({**plain, "scores": scores, "long_scores": long_scores, **facts})


def card_table(evaluation: Evaluation) -> str:
    """What the model card must say first (condition 4): likelihoods and ablations."""
    header = ["", *RANGES, f"from {FAR_FROM}", "state, bytes"]
    rows = []
    for name, score in evaluation.scores.items():
        state = evaluation.state_bytes[name]
        cells = [*map(_number, score.means), _number(score.far), "grows" if state is None else f"{state:,}"]
        rows.append([name, *cells])
    return _table(header, rows)


def tables(evaluation: Evaluation) -> str:
    """All tables with what they show, without a title: the model card's section on evaluation."""
    parts = [
        f"Mean negative log-likelihood per token in nats, by position, over {evaluation.num_windows} windows of "
        f"{evaluation.window_tokens:,} tokens of held-out text: {', '.join(evaluation.text)}.",
        card_table(evaluation),
        _gap(evaluation),
    ]
    if evaluation.control is not None:
        parts.append(_control(evaluation))
    if evaluation.long_scores:
        parts += ["### Beyond the teacher's range", _long_table(evaluation)]
    if evaluation.recall:
        parts += ["### Facts told in chats", _recall_table(evaluation.recall, TOLD_ALL_ALONG)]
    if evaluation.first_turn:
        parts += ["### Facts told in the first turn", _recall_table(evaluation.first_turn, TOLD_FIRST)]
    if len(evaluation.by_size) > 1:
        parts += ["### Quality by the bytes of a state", _size_table(evaluation)]
    return "\n\n".join(parts)


def markdown(evaluation: Evaluation, *, plots: Sequence[str]) -> str:
    """The whole report.

    Args:
        plots: names of pictures beside it.
    """
    parts = [
        f"# {evaluation.model}: evaluation",
        f"{evaluation.title}. Teacher: {evaluation.teacher}. Trained on {evaluation.tokens_trained:,} tokens"
        f"{f' ({evaluation.training})' if evaluation.training else ''}.",
        tables(evaluation),
        *(f"![{name}]({name})" for name in plots),
    ]
    return "\n\n".join(parts) + "\n"


def write_report(evaluation: Evaluation, folder: Path) -> None:
    """Report, tables for the model card, JSON and, where matplotlib is installed, plots in `folder`.

    Raises:
        CheckpointError: the folder cannot be written, or holds files of these names that are not a report's.
    """
    check_report_folder(folder)
    # First what says that the folder holds a report, so that a report that was cut off can be written again.
    write_atomically(folder / JSON_FILE, f"{json_line(evaluation)}\n".encode())
    write_atomically(folder / TABLES_FILE, f"{tables(evaluation)}\n".encode())
    text = markdown(evaluation, plots=write_plots(evaluation, folder))
    write_atomically(folder / REPORT_FILE, text.encode())


def check_report_folder(folder: Path) -> None:
    """Returns where a report may be written: none of its files is there, or an earlier report.

    Raises:
        CheckpointError: files of these names that are not a report's.
    """
    found = next((name for name in REPORT_FILES if (folder / name).exists() or (folder / name).is_symlink()), None)
    if found is None:
        return
    try:
        is_report = read_json_object(folder / JSON_FILE).keys() >= _JSON_MEMBERS
    except ConfigError:
        is_report = False
    if not is_report:
        raise CheckpointError(
            f"{folder} holds {found}, which is not of a report written here, and is not overwritten; name another --out"
        )


def _gap(evaluation: Evaluation) -> str:
    gap = evaluation.gap_closed
    text = (
        f"Of the gap between the training-free window of equal state bytes and the teacher, at positions {FAR_FROM} "
        "and beyond, "
    )
    if gap is None:
        return f"{text}nothing can be said: there is none."
    if gap < 0:
        return f"{text}the model closes **nothing**: it is behind that window by {-100 * gap:.0f} % of the gap."
    return f"{text}the model closes **{100 * gap:.0f} %**."


def _control(evaluation: Evaluation) -> str:
    name = next(name for name in evaluation.scores if name.endswith("trained alike"))
    ours, control = evaluation.scores["ours"].far, evaluation.scores[name].far
    if ours is None or control is None:
        return f"The control ({name}): {evaluation.control}."
    word = "behind" if control > ours else "ahead of"
    return (
        f"The control ({name}; {evaluation.control}) is {word} ours by {abs(control - ours):.3f} nats at positions "
        f"{FAR_FROM} and beyond."
    )


def _long_table(evaluation: Evaluation) -> str:
    first, last = LONG_RANGES[0], LONG_RANGES[-1]
    text = (
        f"The first {LONG_EDGES[-1]:,} tokens of {evaluation.num_long} text(s), read in one go, as they are served. "
        f"Fresh: the tokens of {last} again, each {first} tokens after a fresh start, so that the text is the same."
    )
    header = ["", *LONG_RANGES, f"{last}, fresh"]
    rows = [[name, *map(_number, score.means), _number(score.fresh)] for name, score in evaluation.long_scores.items()]
    return f"{text}\n\n{_table(header, rows)}"


def _recall_table(found: Sequence[Recall], told: str) -> str:
    names = list(found[0].right)
    header = ["tokens back", "facts", *names]
    rows = [
        [result.distance, str(result.num), *(f"{_answers(result, name)} ({result.loss[name]:.2f})" for name in names)]
        for result in found
    ]
    text = (
        f"{told} How many answers are right in every token, and how many of these the teacher has right too (shared); "
        "in brackets the mean loss per token of the answer."
    )
    return f"{text}\n\n{_table(header, rows)}"


def _answers(result: Recall, name: str) -> str:
    """As `12, shared 10`: right, and right where the first variant is."""
    first, shared = next(iter(result.right)), result.shared[name]
    right = round(result.num * result.right[name])
    if name == first or shared is None:
        return str(right)
    return f"{right}, shared {round(shared * result.num * result.right[first])}"


def _size_table(evaluation: Evaluation) -> str:
    text = (
        f"Nats per token behind the teacher from position {FAR_FROM} on; facts told 500 tokens back and more, as a "
        "share of those that the teacher answers."
    )
    rows = [
        [f"{point.state_bytes:,}", f"{point.gap:.3f}", "" if point.facts is None else f"{100 * point.facts:.0f} %"]
        for point in evaluation.by_size
    ]
    return f"{text}\n\n{_table(['state, bytes', 'gap', 'facts'], rows)}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---", *("---:" for _ in header[1:])], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
