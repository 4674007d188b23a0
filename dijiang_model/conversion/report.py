"""An evaluation as Markdown, as a table for the model card, as plots, and as one line of JSON."""

import importlib.util
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

from dijiang_model.conversion.evaluate import EDGES, FAR_FROM, Recall, Score

RANGES = (*(f"{low}-{high}" for low, high in pairwise(EDGES)), f"{EDGES[-1]}+")


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Everything that was measured.

    Attributes:
        model, teacher: names.
        title: what the model may be called.
        tokens_trained: 0 for a training-free conversion.
        training: the recipe in words.
        text: names of the held-out files.
        window_tokens, num_windows: of the text.
        scores: by variant, in the order of tables.
        state_bytes: by variant; None: grows with the text.
        gap_closed: share of the gap from `FAR_FROM` on; None where there is none.
        recall: empty where it was not asked for.
    """

    model: str
    teacher: str
    title: str
    tokens_trained: int
    training: str
    text: Sequence[str]
    window_tokens: int
    num_windows: int
    scores: Mapping[str, Score]
    state_bytes: Mapping[str, int | None]
    gap_closed: float | None
    recall: Sequence[Recall]


def json_line(evaluation: Evaluation) -> str:
    """One line, for tables over many evaluations."""
    scores = {
        name: {"by_position": dict(zip(RANGES, score.means, strict=True)), f"from_{FAR_FROM}": score.far}
        for name, score in evaluation.scores.items()
    }
    plain = {
        name: value
        for name, value in ((field, getattr(evaluation, field)) for field in evaluation.__dataclass_fields__)
        if name not in ("scores", "recall")
    }
    return json.dumps({**plain, "scores": scores, "recall": [asdict(result) for result in evaluation.recall]})


def card_table(evaluation: Evaluation) -> str:
    """What the model card must say (condition 4): likelihoods, ablations, recall."""
    header = ["", *RANGES, f"from {FAR_FROM}", "state, bytes"]
    rows = []
    for name, score in evaluation.scores.items():
        state = evaluation.state_bytes[name]
        cells = [*map(_number, score.means), _number(score.far), "grows" if state is None else f"{state:,}"]
        rows.append([name, *cells])
    return _table(header, rows)


def markdown(evaluation: Evaluation, *, plots: Sequence[str]) -> str:
    """The whole report.

    Args:
        plots: names of pictures beside it.
    """
    parts = [
        f"# {evaluation.model}: evaluation",
        f"{evaluation.title}. Teacher: {evaluation.teacher}. Trained on {evaluation.tokens_trained:,} tokens"
        f"{f' ({evaluation.training})' if evaluation.training else ''}.",
        f"Mean negative log-likelihood per token in nats, by position, over {evaluation.num_windows} windows of "
        f"{evaluation.window_tokens:,} tokens of held-out text: {', '.join(evaluation.text)}.",
        card_table(evaluation),
        _gap(evaluation),
    ]
    if evaluation.recall:
        parts += ["## Recall of a planted number", _recall_table(evaluation)]
    parts += [f"![{name}]({name})" for name in plots]
    return "\n\n".join(parts) + "\n"


def write_report(evaluation: Evaluation, folder: Path) -> None:
    """report.md, report.json and, where matplotlib is installed, nll.png in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    plots = ["nll.png"] if _plot(evaluation, folder / "nll.png") else []
    (folder / "report.md").write_text(markdown(evaluation, plots=plots))
    (folder / "report.json").write_text(json_line(evaluation) + "\n")


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


def _recall_table(evaluation: Evaluation) -> str:
    names = list(evaluation.recall[0].right)
    header = ["tokens back", *names]
    rows = [
        [str(result.distance), *(f"{100 * result.right[name]:.0f} % ({result.loss[name]:.2f})" for name in names)]
        for result in evaluation.recall
    ]
    text = "Share of answers that are right in every token; in brackets the mean loss per token of the answer."
    return f"{text}\n\n{_table(header, rows)}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---", *("---:" for _ in header[1:])], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _plot(evaluation: Evaluation, path: Path) -> bool:
    if importlib.util.find_spec("matplotlib") is None:
        return False
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    for name, score in evaluation.scores.items():
        measured = [(place, mean) for place, mean in enumerate(score.means) if mean is not None]
        axes.plot([place for place, _ in measured], [mean for _, mean in measured], marker="o", label=name)
    axes.set_xticks(range(len(RANGES)), RANGES)
    axes.set_xlabel("position of the token")
    axes.set_ylabel("negative log-likelihood, nats per token")
    axes.legend()
    figure.savefig(path, dpi=120)
    return True
