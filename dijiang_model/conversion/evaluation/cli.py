"""`dijiang evaluate`: the command line of the evaluation."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, get_args

import torch
import typer
from rich.console import Console
from rich.markdown import Markdown
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from tokenizers import Tokenizer as HfTokenizer
from torch import Tensor

from dijiang_model.checkpoints.checkpoint import load_model
from dijiang_model.checkpoints.config_json import CONFIG_FILE, read_stored_config
from dijiang_model.checkpoints.outputs import output_folder
from dijiang_model.config import ModelConfig
from dijiang_model.conversion.calibration.calibrate import Calibration
from dijiang_model.conversion.cli import parse_size
from dijiang_model.conversion.evaluation.evaluate import (
    Score,
    Variant,
    budget_variants,
    gap_closed,
    score,
    sized_variant,
    variants,
)
from dijiang_model.conversion.evaluation.long_texts import LENGTH, LongScore, long_score, streams, tokens_to_read
from dijiang_model.conversion.evaluation.measured import Evaluation
from dijiang_model.conversion.evaluation.quantized import Rounding, quantized_variants
from dijiang_model.conversion.evaluation.recall import FIRST_TURN, SPREAD, ChatForm, Recall, fact_chats, recall_probe
from dijiang_model.conversion.evaluation.report import card_table, check_report_folder, json_line, write_report
from dijiang_model.conversion.evaluation.teacher import check_teacher, load_teacher
from dijiang_model.conversion.model_card import title
from dijiang_model.conversion.training.adapters import adapted_model, load_adapter
from dijiang_model.conversion.training.chat_prompt import RenderChat, load_chat_template, plain_chat
from dijiang_model.conversion.training.documents import text_files
from dijiang_model.conversion.training.student import check_trainable
from dijiang_model.conversion.training.text_windows import load_tokenizer, load_windows
from dijiang_model.errors import ModelError
from dijiang_model.model import DiJiangForCausalLM


@dataclass(frozen=True, slots=True)
class Measurements:
    """What to measure.

    Attributes:
        num_windows, length: windows of each text, and their tokens.
        num_facts: chats of 2,048 tokens in which facts are told and asked for; 0: none.
        ablations: whether parts of the model are switched off too.
        budgets: other bytes of a state, for a curve; only of a calibrated model.
        num_long: texts of `evaluate_long.LENGTH` tokens to read; 0: none.
        rounded: in fewer bits, as the model is served.
    """

    num_windows: int
    length: int
    num_facts: int = 0
    num_long: int = 0
    rounded: tuple[Rounding, ...] = ()
    budgets: tuple[int, ...] = ()
    ablations: bool = True


@dataclass(frozen=True, slots=True)
class Subjects:
    """What is compared, loaded.

    Attributes:
        folder: of the model, with its tokenizer and chat template.
        name, teacher_name: of the model and its teacher.
        tokens_trained, training: what the model says about its training.
        control, control_training: the window-only control and how it was trained.
        others: conversions of the same teacher with states of other sizes.
    """

    model: DiJiangForCausalLM
    teacher: DiJiangForCausalLM
    control: DiJiangForCausalLM | None
    folder: Path
    name: str
    teacher_name: str
    tokens_trained: int
    training: str
    control_training: str | None
    others: Sequence[DiJiangForCausalLM] = ()


Facts = Annotated[
    int,
    typer.Option(
        min=0,
        help="Chats of 2,048 tokens with facts to recall, as many with facts in their first turn alone, a quarter "
        "of 4,096 tokens and an eighth of 8,192; 0: none.",
    ),
]
Budgets = Annotated[
    list[str] | None,
    typer.Option(help="Of a calibrated model: also with states of so many bytes, e.g. 4.4MB. Again for a curve."),
]
Also = Annotated[
    list[Path] | None,
    typer.Option(help="Another conversion of the teacher, with a state of another size. Again for a curve."),
]
Rounded = Annotated[
    list[str] | None,
    typer.Option(help="Also in fewer bits: int8 or int4 weights, bfloat16-state, int8-state. Again for more."),
]
Ablations = Annotated[
    bool, typer.Option("--ablations/--no-ablations", help="Also with parts of the model switched off.")
]


def evaluate_command(
    model: Annotated[Path, typer.Argument(help="Folder of a converted model.")],
    teacher: Annotated[Path, typer.Option(help="What it was made from: HF folder, GGUF file or untrained conversion.")],
    text: Annotated[list[Path], typer.Option(help="Held-out text, as for `train --data`. Again for more.")],
    out: Annotated[Path, typer.Option(help="Folder for report.md, report.json, tables.md and plots.")],
    adapter: Annotated[Path | None, typer.Option(help="Adapter to merge into MODEL first.")] = None,
    control: Annotated[
        Path | None, typer.Option(help="Adapter or model trained with `train --no-linear`: the window alone.")
    ] = None,
    rounded: Rounded = None,
    windows: Annotated[int, typer.Option(min=1, help="Windows of each file, spread over it.")] = 8,
    length: Annotated[int, typer.Option(min=66, help="Tokens of a window.")] = 2048,
    facts: Facts = 4,
    ablations: Ablations = True,
    state_bytes: Budgets = None,
    also: Also = None,
    long: Annotated[int, typer.Option(min=0, help=f"Texts of {LENGTH:,} tokens to read in one go; 0: none.")] = 0,
    threads: Annotated[int, typer.Option(min=0, help="CPU threads; 0: torch's choice.")] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")] = "cpu",
) -> None:
    """Measure what a conversion lost, and what its linear part brings."""
    console = Console(stderr=True)
    if threads > 0:
        torch.set_num_threads(threads)
    kinds = tuple(kind for kind in get_args(Rounding) if kind in (rounded or ()))
    if unknown := set(rounded or ()) - set(kinds):
        raise typer.BadParameter(f"{min(unknown)!r} is none of {', '.join(get_args(Rounding))}", param_hint="--rounded")
    budgets = tuple(sorted(parse_size(size, "--state-bytes") for size in state_bytes or ()))
    wanted = Measurements(windows, length, facts, long, kinds, budgets, ablations)
    try:
        inputs = [model, teacher, *text, *(also or ()), *(path for path in (adapter, control) if path is not None)]
        check_report_folder(output_folder(out, inputs=inputs))
        evaluation = evaluate(
            load_subjects(model, teacher, adapter=adapter, control=control, also=also or (), device=device),
            text,
            load_tokenizer(model),
            wanted,
            console=console,
            render=load_chat_template(model) or plain_chat,
        )
        write_report(evaluation, out)
    except ModelError as error:
        console.print(f"[red]error:[/red] {escape(str(error))}", highlight=False)
        raise typer.Exit(1) from error
    console.print(Markdown(card_table(evaluation)))
    typer.echo(json_line(evaluation))


def load_subjects(
    folder: Path,
    teacher_path: Path,
    *,
    adapter: Path | None = None,
    control: Path | None = None,
    also: Sequence[Path] = (),
    device: str = "cpu",
) -> Subjects:
    """Loads the models.

    Args:
        adapter: merged into the model of `folder`.
        control: an adapter for the teacher's weights, or a model's folder.
        also: folders of other conversions of the teacher.

    Raises:
        ModelError: anything wrong with the models or the adapters.
    """
    stored = read_stored_config(folder)
    for other in (stored, *map(read_stored_config, also)):
        check_teacher(other, teacher_path)
    model, origin = load_model(folder, device=device), stored.origin
    tokens_trained, training = origin.tokens_trained, origin.recipe
    if adapter is not None:
        loaded = load_adapter(adapter)
        model = adapted_model(model, loaded)
        tokens_trained, training = loaded.info.tokens_trained, loaded.info.recipe
    check_trainable(model.config)
    teacher = load_teacher(teacher_path, device=device)
    control_model, control_training = None, None
    if control is not None:
        control_model, control_training = _load_control(control, teacher)
    return Subjects(
        model=model,
        teacher=teacher,
        control=control_model,
        folder=folder,
        name=folder.resolve().name,
        teacher_name=origin.teacher,
        tokens_trained=tokens_trained,
        training=training,
        control_training=control_training,
        others=[load_model(path, device=device) for path in also],
    )


def evaluate(
    subjects: Subjects,
    text: list[Path],
    tokenizer: HfTokenizer,
    wanted: Measurements,
    *,
    console: Console,
    render: RenderChat = plain_chat,
) -> Evaluation:
    """Measures everything; see `Evaluation`. `render` makes text of conversations (`documents.read_text`).

    Raises:
        ModelError: the text cannot be read or is too short.
    """
    compared = variants(subjects.model, subjects.teacher, control=subjects.control, ablations=wanted.ablations)
    compared += [sized_variant(other) for other in subjects.others]
    compared += budget_variants(subjects.model, Calibration.read(subjects.folder), wanted.budgets)
    vocab_size = subjects.model.config.vocab_size
    cut = partial(_windows, text, tokenizer, vocab_size=vocab_size, render=render)
    segments, long_texts = cut(wanted.length, wanted.num_windows), cut(LENGTH, wanted.num_long)[: wanted.num_long]
    scored = [*compared, *quantized_variants(subjects.model, wanted.rounded)]
    scores = _scores(scored, segments, console)
    return Evaluation(
        model=subjects.name,
        teacher=subjects.teacher_name,
        title=title(subjects.model.config),
        tokens_trained=subjects.tokens_trained,
        training=subjects.training,
        text=[file.name for file in text_files(text)],
        window_tokens=wanted.length,
        num_windows=len(segments),
        scores=scores,
        state_bytes={variant.name: variant.state_bytes for variant in scored},
        gap_closed=gap_closed(scores, list(scores)[:3]),
        recall=_recall(compared, torch.cat(segments), tokenizer, subjects, wanted.num_facts, console, SPREAD),
        first_turn=_recall(compared, torch.cat(segments), tokenizer, subjects, wanted.num_facts, console, FIRST_TURN),
        control=subjects.control_training,
        long_scores=_long_scores(subjects, long_texts, console, ablations=wanted.ablations) if long_texts else {},
        num_long=len(long_texts),
        cache_bytes=_cache_bytes(subjects.model.config),
    )


def _cache_bytes(config: ModelConfig) -> int:
    """Key and value of a token in all layers, in 16-bit numbers."""
    return 2 * torch.bfloat16.itemsize * config.num_layers * config.num_kv_heads * config.head_size


def _load_control(path: Path, teacher: DiJiangForCausalLM) -> tuple[DiJiangForCausalLM, str]:
    if (path / CONFIG_FILE).is_file():
        origin = read_stored_config(path).origin
        return load_model(path, device=teacher.device), f"{origin.tokens_trained:,} tokens, {origin.recipe}"
    adapter = load_adapter(path)
    return adapted_model(teacher, adapter), f"{adapter.info.tokens_trained:,} tokens, {adapter.info.recipe}"


def _windows(
    text: list[Path], tokenizer: HfTokenizer, length: int, num: int, *, vocab_size: int, render: RenderChat
) -> list[Tensor]:
    """`num` windows of each file, [length] int64."""
    if num == 0:
        return []
    windows = load_windows(text, tokenizer, length=length, seed=0, vocab_size=vocab_size, first=num, render=render)
    return [torch.from_numpy(row.astype("int64")) for row in windows.tokens]


def _progress(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console)


def _scores(compared: Sequence[Variant], segments: Sequence[Tensor], console: Console) -> dict[str, Score]:
    with _progress(console) as progress:
        task = progress.add_task("likelihood", total=len(compared) * len(segments))
        return {
            variant.name: score(variant, segments, on_window=lambda: progress.advance(task)) for variant in compared
        }


def _recall(
    compared: Sequence[Variant],
    filler: Tensor,
    tokenizer: HfTokenizer,
    subjects: Subjects,
    num: int,
    console: Console,
    forms: Sequence[ChatForm],
) -> list[Recall]:
    if num == 0:
        return []
    render = load_chat_template(subjects.folder) or plain_chat
    longest = subjects.model.config.max_position_embeddings
    chats = fact_chats(tokenizer, filler, render=render, num=num, longest=longest, forms=forms)
    with _progress(console) as progress:
        task = progress.add_task("facts", total=len(chats) * len(compared))
        return recall_probe(compared, chats, on_chat=lambda: progress.advance(task))


def _long_scores(
    subjects: Subjects, texts: Sequence[Tensor], console: Console, *, ablations: bool
) -> dict[str, LongScore]:
    compared = streams(subjects.model, subjects.teacher) if ablations else {"ours": subjects.model}
    # Fresh starts ask what a position does to our model; the others are there for comparison.
    total = sum(tokens_to_read(len(texts), with_fresh=name == "ours") for name in compared)
    with _progress(console) as progress:
        task = progress.add_task("long texts", total=total)
        return {
            name: long_score(model, texts, with_fresh=name == "ours", on_tokens=lambda num: progress.advance(task, num))
            for name, model in compared.items()
        }
