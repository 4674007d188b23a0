"""`dijiang train`: the command line of the trainer."""

import signal
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, Literal, cast, get_args

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from dijiang_model.checkpoints import load_model
from dijiang_model.config import Basis, FeatureConfig, ModelConfig
from dijiang_model.config_json import parse_layers
from dijiang_model.conversion import calibrate
from dijiang_model.conversion.adapters import Adapter, AdapterInfo, adapted_model, load_adapter, model_fingerprint
from dijiang_model.conversion.distill import Precision
from dijiang_model.conversion.loss_plot import plot_losses
from dijiang_model.conversion.self_distill import write_answers
from dijiang_model.conversion.student import check_trainable, new_student, with_features
from dijiang_model.conversion.text_mixture import Mixture, load_mixture, parse_source
from dijiang_model.conversion.text_windows import load_tokenizer
from dijiang_model.conversion.train import ADAPTER_FILE, LOG_FILE, Trainer, TrainingOptions, read_log, train
from dijiang_model.errors import ModelError
from dijiang_model.model import DiJiangForCausalLM

CALIBRATION_STEP = 1_000_000_007
"""Calibration reads the text of this step, far from those of training."""
MIN_CALIBRATION_SEGMENTS = 2


@dataclass(frozen=True, slots=True)
class StudentOptions:
    """What the linear part shall be.

    Attributes:
        features: in all layers.
        windows: of every layer in tokens; or `keep` the model's, or `auto`: each layer its own, with the mean kept.
    """

    features: FeatureConfig
    windows: int | Literal["keep", "auto"]


def train_command(
    model: Annotated[Path, typer.Argument(help="Folder of a converted model, recipe hybrid or pure, not trained yet.")],
    data: Annotated[
        list[str],
        typer.Option(help="UTF-8 text: a file or a folder of .txt, .md, .rst. Again for more; FILE=3 weighs 3 times."),
    ],
    out: Annotated[Path, typer.Option(help="Folder of the run: checkpoint, log, loss plot, adapter.safetensors.")],
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to train on, all stages together.")] = 1_000_000,
    minutes: Annotated[
        float | None, typer.Option(min=0.01, help="End after so many minutes, if that is first.")
    ] = None,
    stage: Annotated[str, typer.Option(help="1: each layer imitates its attention. 2: the logits. both.")] = "both",
    stage_one_share: Annotated[float, typer.Option(min=0.0, max=1.0, help="Of the budget, with both stages.")] = 0.3,
    lr: Annotated[float, typer.Option(min=1e-7, help="Learning rate of matrices in stage 2; others follow it.")] = 1e-3,
    sequence_length: Annotated[int, typer.Option(min=64, help="Tokens of a window of text.")] = 1024,
    batch_size: Annotated[int, typer.Option(min=1, help="Windows of a step.")] = 1,
    lora_rank: Annotated[int, typer.Option(min=0, help="Of the projections' updates in stage 2; 0: none.")] = 16,
    far_rank: Annotated[int, typer.Option(min=0, help="Of the update of queries for the linear part; 0: none.")] = 16,
    linear: Annotated[
        bool, typer.Option("--linear/--no-linear", help="Without: stage 2 of the window alone, as a control.")
    ] = True,
    rotated: Annotated[
        bool, typer.Option("--rotated/--unrotated", help="Features after the rotary embedding, or before it.")
    ] = False,
    bases: Annotated[str, typer.Option(help="Transforms of the feature map, e.g. dct2 or dct2,dct4.")] = "dct2",
    nodes: Annotated[str, typer.Option(help="Start values of the radii, see the README.")] = "signed_sphere",
    windows: Annotated[
        str,
        typer.Option(
            help="keep: the model's. auto: each layer its own at the same mean; short prompts lose. Or tokens."
        ),
    ] = "keep",
    epochs: Annotated[
        int, typer.Option(min=0, help="Stage 1 only: read all text once, then go over each layer's record so often.")
    ] = 0,
    self_distill: Annotated[int, typer.Option(min=0, help="Tokens of chat that the teacher writes first.")] = 0,
    precision: Annotated[
        str, typer.Option(help="Of products: fp32, bf16 (CPUs with AVX512-BF16 train faster so), auto: bf16 on CUDA.")
    ] = "auto",
    threads: Annotated[int, typer.Option(min=0, help="CPU threads; 0: torch's choice.")] = 0,
    seed: Annotated[int, typer.Option(min=0, help="Of the text's order and of fresh tensors.")] = 0,
    start: Annotated[Path | None, typer.Option(help="Adapter to train on, in place of a calibration.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")] = "cpu",
    resume: Annotated[bool, typer.Option("--resume", help="Go on where a run in OUT stopped or was killed.")] = False,
) -> None:
    """Train the linear part of a converted model to imitate its teacher."""
    console = Console(stderr=True)
    if threads > 0:
        torch.set_num_threads(threads)
    options = TrainingOptions(
        tokens=tokens,
        minutes=minutes,
        stages=_stages(stage),
        stage_one_share=stage_one_share,
        sequence_length=sequence_length,
        batch_size=batch_size,
        learning_rate=lr,
        lora_rank=lora_rank,
        precision=_precision(precision, device),
        linear=linear,
        seed=seed,
    )
    features = FeatureConfig(bases=_bases(bases), nodes=nodes, far_rank=far_rank, rotated=rotated)
    student = StudentOptions(features, _windows(windows))
    if not linear and options.stages != (2,):
        raise typer.BadParameter("goes with --stage 2", param_hint="--no-linear")
    if epochs > 0 and (options.stages != (1,) or minutes is not None):
        raise typer.BadParameter("goes with --stage 1 and without --minutes", param_hint="--epochs")
    try:
        trainer = prepare_run(
            model, data, out, options, student, self_distill=self_distill, resume=resume, start=start, device=device
        )
        if epochs > 0:
            is_done = _replay(trainer, out, epochs, console)
        else:
            is_done = _run(trainer, out, console)
        plot_losses(read_log(out / LOG_FILE), out / "loss.png")
    except ModelError as error:
        console.print(f"[red]error:[/red] {escape(str(error))}", highlight=False)
        raise typer.Exit(1) from error
    if not is_done:
        console.print(f"Stopped; go on with the same command and `--resume`. So far: {escape(str(out / ADAPTER_FILE))}")
        raise typer.Exit(130)
    console.print(f"Adapter: {escape(str(out / ADAPTER_FILE))}", highlight=False)


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
) -> Trainer:
    """Loads model and text, calibrates (a resumed run: reads its last checkpoint) and answers a trainer.

    Raises:
        ModelError: anything wrong with the model, the text, the options or the run's folder.
    """
    base = load_model(folder, device=device)
    check_trainable(base.config)
    tokenizer = load_tokenizer(folder)
    sources = [parse_source(text) for text in data]
    if self_distill > 0:
        written = out / "answers.txt"
        if not (resume and written.exists()):
            write_answers(base, tokenizer, written, num_tokens=self_distill, seed=options.seed)
        sources.append(parse_source(str(written)))
    text = load_mixture(
        sources, tokenizer, length=options.sequence_length, seed=options.seed, vocab_size=base.config.vocab_size
    )
    info = AdapterInfo(
        base=folder.resolve().name,
        fingerprint=model_fingerprint(base),
        tokens_trained=0,
        lora_rank=options.lora_rank if 2 in options.stages else 0,
        recipe=f"stages {'+'.join(map(str, options.stages))}, {options.sequence_length} tokens a window",
    )
    if resume:
        layers = load_adapter(out / ADAPTER_FILE).layers
        config = _with_layers(base.config, layers)
        trainer = Trainer(new_student(base, config, look_back=None, seed=options.seed), text, options, info=info)
        trainer.resume(out)
        return trainer
    if start is not None:
        return _started(base, load_adapter(start), text, options, info)
    config, seen = calibrated(base, text, student)
    return Trainer(new_student(base, config, look_back=seen, seed=options.seed), text, options, info=info)


def _started(
    base: DiJiangForCausalLM, adapter: Adapter, text: Mixture, options: TrainingOptions, info: AdapterInfo
) -> Trainer:
    """Goes on from an adapter's tensors with a new schedule and optimiser."""
    adapted_model(base, adapter)  # refuses an adapter of another base, or a damaged one
    trained_so_far = adapter.info.tokens_trained
    info = replace(info, tokens_before=trained_so_far, recipe=f"{adapter.info.recipe}; {info.recipe}")
    trainer = Trainer(
        new_student(base, adapter.config(base.config), look_back=None, seed=options.seed), text, options, info=info
    )
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


def _run(trainer: Trainer, out: Path, console: Console) -> bool:
    stop = _Stop()
    columns = (
        TextColumn("stage {task.fields[stage]}"),
        BarColumn(),
        TextColumn("{task.fields[tokens]:,} tokens, {task.fields[rate]:,.0f}/s, loss {task.fields[loss]:.4f}"),
        TimeElapsedColumn(),
        TextColumn("{task.fields[left]} left"),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("train", total=1.0, stage=1, tokens=0, rate=0.0, loss=float("nan"), left="?")

        def show(line: dict[str, Any]) -> None:
            done = trainer.share_done
            seconds = line["seconds"] * (1 - done) / max(done, 1e-9)
            progress.update(
                task,
                completed=done,
                stage=line["stage"],
                tokens=line["tokens"],
                rate=line["tokens_per_s"],
                loss=line["loss"],
                left=f"{seconds / 60:.0f} min",
            )

        return train(trainer, out, on_step=show, should_stop=stop)


def _replay(trainer: Trainer, out: Path, epochs: int, console: Console) -> bool:
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


def _with_layers(config: ModelConfig, layers: list[dict[str, object]]) -> ModelConfig:
    return replace(config, layers=parse_layers(layers, base=config))


def _stages(text: str) -> tuple[int, ...]:
    stages = {"1": (1,), "2": (2,), "both": (1, 2)}
    if text not in stages:
        raise typer.BadParameter(f"{text!r} is none of 1, 2, both", param_hint="--stage")
    return stages[text]


def _precision(text: str, device: str) -> Precision:
    if text == "auto":
        return "bf16" if device.startswith("cuda") else "fp32"
    if text not in get_args(Precision):
        raise typer.BadParameter(f"{text!r} is none of auto, fp32, bf16", param_hint="--precision")
    return cast(Precision, text)


def _bases(text: str) -> tuple[Basis, ...]:
    names = tuple(text.split(","))
    if any(name not in ("dct2", "dct4") for name in names) or len(set(names)) < len(names):
        raise typer.BadParameter(f"{text!r} is none of dct2, dct4, dct2,dct4", param_hint="--bases")
    return cast("tuple[Basis, ...]", names)


def _windows(text: str) -> int | Literal["keep", "auto"]:
    if text.isdecimal() and int(text) > 0:
        return int(text)
    if text not in ("auto", "keep"):
        raise typer.BadParameter(f"{text!r} is neither auto nor keep nor a number above 0", param_hint="--windows")
    return cast(Literal["keep", "auto"], text)
