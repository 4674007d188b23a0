"""The whole evaluation: models loaded, text cut, everything that is wanted measured."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from tokenizers import Tokenizer as HfTokenizer
from torch import Tensor

from dijiang_model.checkpoints.checkpoint import load_model
from dijiang_model.checkpoints.config_json import CONFIG_FILE, read_stored_config
from dijiang_model.config import ModelConfig
from dijiang_model.conversion.calibration.calibrate import Calibration
from dijiang_model.conversion.evaluation.evaluate import (
    Score,
    Variant,
    budget_variants,
    gap_closed,
    score,
    sized_variant,
    variants,
)
from dijiang_model.conversion.evaluation.long_texts import LongScore, long_score, streams, tokens_to_read
from dijiang_model.conversion.evaluation.measured import Evaluation
from dijiang_model.conversion.evaluation.quantized import quantized_variants
from dijiang_model.conversion.evaluation.recall import FIRST_TURN, SPREAD, ChatForm, Recall, fact_chats, recall_probe
from dijiang_model.conversion.evaluation.teacher import check_teacher, load_teacher
from dijiang_model.conversion.evaluation.wanted import LONG_TOKENS, Measurements
from dijiang_model.conversion.model_card import title
from dijiang_model.conversion.training.adapters import adapted_model, load_adapter
from dijiang_model.conversion.training.chat_prompt import RenderChat, load_chat_template, plain_chat
from dijiang_model.conversion.training.documents import text_files
from dijiang_model.conversion.training.student import check_trainable
from dijiang_model.conversion.training.text_windows import load_windows
from dijiang_model.model import DiJiangForCausalLM


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
    segments, long_texts = cut(wanted.length, wanted.num_windows), cut(LONG_TOKENS, wanted.num_long)[: wanted.num_long]
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
