"""What a training run starts from: model, text, calibration, or the last checkpoint."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Literal

from dijiang_model.checkpoints.checkpoint import load_model
from dijiang_model.checkpoints.config_json import parse_layers
from dijiang_model.checkpoints.fingerprint import model_fingerprint
from dijiang_model.checkpoints.outputs import check_new_run, output_folder
from dijiang_model.config import FeatureConfig, ModelConfig
from dijiang_model.conversion.training import calibrate
from dijiang_model.conversion.training.adapters import Adapter, AdapterInfo, adapted_model, load_adapter
from dijiang_model.conversion.training.chat_prompt import load_chat_prompt, load_chat_template, plain_chat
from dijiang_model.conversion.training.log import LOG_FILE
from dijiang_model.conversion.training.process_group import ALONE, ProcessGroup
from dijiang_model.conversion.training.self_distill import write_answers
from dijiang_model.conversion.training.student import check_trainable, new_student, with_features
from dijiang_model.conversion.training.text_mixture import Mixture, TextSource, load_mixture, parse_source
from dijiang_model.conversion.training.text_windows import load_tokenizer
from dijiang_model.conversion.training.train import CHECKPOINT_FILE, Trainer, TrainingOptions
from dijiang_model.formats.model_folder import ADAPTER_FILE
from dijiang_model.model import DiJiangForCausalLM

ANSWERS_FILE, PLOT_FILE = "answers.txt", "loss.png"
RUN_FILES = (CHECKPOINT_FILE, ADAPTER_FILE, LOG_FILE, PLOT_FILE, ANSWERS_FILE)
CALIBRATION_STEP = 1_000_000_007
"""Calibration reads the text of this step, far from those of training."""
MIN_CALIBRATION_SEGMENTS = 2
OPENING_TOKENS = 32
"""From which a teacher without a chat template goes on."""


@dataclass(frozen=True, slots=True)
class StudentOptions:
    """What the linear part shall be.

    Attributes:
        features: in all layers.
        windows: of every layer in tokens; or `keep` the model's, or `auto`: each layer its own, with the mean kept.
    """

    features: FeatureConfig
    windows: int | Literal["keep", "auto"]


def prepare_run(
    folder: Path,
    data: Sequence[str],
    out: Path,
    options: TrainingOptions,
    student: StudentOptions,
    *,
    self_distill: int = 0,
    resume: bool = False,
    start: Path | None = None,
    device: str = "cpu",
    processes: ProcessGroup = ALONE,
) -> Trainer:
    """Loads model and text, calibrates (a resumed run: reads its last checkpoint) and answers a trainer.

    Args:
        folder: the converted model.
        data: text sources, see `parse_source`.
        out: the run's folder.
        self_distill: tokens of chat that the teacher writes first.
        resume: go on where a run in `out` stopped; without it a folder that holds a run is refused.
        start: adapter to go on from with a new schedule.
        processes: processes that call this with the same arguments but the device.

    Raises:
        ModelError: anything wrong with the model, the text, the options or the run's folder.
    """
    sources = [parse_source(text) for text in data]
    output_folder(out, inputs=[folder, *(source.path for source in sources), *([] if start is None else [start])])
    if processes.is_first and not resume:
        check_new_run(out, RUN_FILES)
    base = load_model(folder, device=device)
    check_trainable(base.config)
    if self_distill > 0:
        written = out / ANSWERS_FILE
        if processes.is_first and not (resume and written.exists()):
            _write_answers(folder, base, sources, written, num_tokens=self_distill, seed=options.seed)
        processes.any(False)  # the others wait for the file
        sources.append(parse_source(str(written)))
    text, info = _text(folder, base, sources, options), _info(folder, base, options)
    if resume and not _has_only_answers(out):
        config = _with_layers(base.config, load_adapter(out / ADAPTER_FILE).layers)
        fresh = new_student(base, config, look_back=None, seed=options.seed)
        trainer = Trainer(fresh, text, options, info=info, processes=processes)
        trainer.resume(out)
        return trainer
    if start is not None:
        return _started(base, load_adapter(start), text, options, info, processes)
    config, seen = calibrated(base, text, student)
    fresh = new_student(base, config, look_back=seen, seed=options.seed)
    return Trainer(fresh, text, options, info=info, processes=processes)


def _text(folder: Path, base: DiJiangForCausalLM, sources: Sequence[TextSource], options: TrainingOptions) -> Mixture:
    return load_mixture(
        sources,
        load_tokenizer(folder),
        length=options.sequence_length,
        seed=options.seed,
        vocab_size=base.config.vocab_size,
        render=load_chat_template(folder) or plain_chat,
    )


def _info(folder: Path, base: DiJiangForCausalLM, options: TrainingOptions) -> AdapterInfo:
    return AdapterInfo(
        base=folder.resolve().name,
        fingerprint=model_fingerprint(base),
        tokens_trained=0,
        lora_rank=options.lora_rank if 2 in options.stages else 0,
        recipe=f"stages {'+'.join(map(str, options.stages))}, {options.sequence_length} tokens a window",
    )


def _has_only_answers(out: Path) -> bool:
    """Whether a run was killed before its first step: it begins again, with the answers that it has."""
    found = {name for name in RUN_FILES if (out / name).exists()}
    is_log_empty = LOG_FILE not in found or (out / LOG_FILE).stat().st_size == 0
    return bool(found) and found <= {ANSWERS_FILE, LOG_FILE} and is_log_empty


def _write_answers(
    folder: Path, base: DiJiangForCausalLM, sources: Sequence[TextSource], path: Path, *, num_tokens: int, seed: int
) -> None:
    tokenizer, chat_prompt = load_tokenizer(folder), load_chat_prompt(folder)

    @cache
    def text() -> Mixture:
        render = load_chat_template(folder) or plain_chat
        vocab_size = base.config.vocab_size
        return load_mixture(sources, tokenizer, length=OPENING_TOKENS, seed=seed, vocab_size=vocab_size, render=render)

    write_answers(
        base,
        tokenizer,
        path,
        num_tokens=num_tokens,
        seed=seed,
        chat_prompt=chat_prompt,
        openings=lambda number: text().batch(number, 1)[0],
    )


def _started(
    base: DiJiangForCausalLM,
    adapter: Adapter,
    text: Mixture,
    options: TrainingOptions,
    info: AdapterInfo,
    processes: ProcessGroup,
) -> Trainer:
    """Goes on from an adapter's tensors with a new schedule and optimiser."""
    adapted_model(base, adapter)  # refuses an adapter of another base, or a damaged one
    trained_so_far = adapter.info.tokens_trained
    info = replace(info, tokens_before=trained_so_far, recipe=f"{adapter.info.recipe}; {info.recipe}")
    fresh = new_student(base, adapter.config(base.config), look_back=None, seed=options.seed)
    trainer = Trainer(fresh, text, options, info=info, processes=processes)
    trainer.fill(adapter)
    return trainer


def calibrated(
    base: DiJiangForCausalLM, text: Mixture, student: StudentOptions
) -> tuple[ModelConfig, calibrate.LookBack]:
    """The network to train, and what the teacher's attention says about its start."""
    config = with_features(base.config, student.features)
    sample = text.batch(CALIBRATION_STEP, MIN_CALIBRATION_SEGMENTS).to(base.device)
    window = max(layer.window for layer in config.layers)
    if isinstance(student.windows, int):
        config = calibrate.with_windows(config, [student.windows] * config.num_layers)
    if student.windows == "auto" and window > 0:
        mean = sum(layer.window for layer in config.layers) // config.num_layers
        choices = sorted({mean, *(choice for choice in calibrate.WINDOW_CHOICES if choice < sample.shape[1])})
        losses = calibrate.window_losses(base, sample, choices, sinks=config.layers[0].sinks)
        config = calibrate.with_windows(config, calibrate.allocate_windows(losses, choices, mean_window=mean))
    measured = new_student(base, config, look_back=None, seed=0)
    return config, calibrate.look_back(measured, sample)


def _with_layers(config: ModelConfig, layers: list[dict[str, object]]) -> ModelConfig:
    return replace(config, layers=parse_layers(layers, base=config))
