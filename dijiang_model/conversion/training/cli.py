"""`dijiang train`: the command line of the trainer."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, cast

import typer
from rich.console import Console
from rich.markup import escape

from dijiang_model.config import Basis, FeatureConfig
from dijiang_model.errors import ConversionError, ModelError
from dijiang_model.formats.dtype_names import dtype_name
from dijiang_model.formats.model_folder import ADAPTER_FILE
from dijiang_model.program import program

if TYPE_CHECKING:
    from dijiang_model.conversion.training.distill import Precision
    from dijiang_model.conversion.training.train import Trainer, TrainingOptions

Model = Annotated[Path, typer.Argument(help="Folder of a converted model, recipe hybrid or pure, not trained yet.")]
Data = Annotated[
    list[str],
    typer.Option(
        help="UTF-8 text, or JSON lines with a text or messages each: a file or a folder of .txt, .md, .rst, .jsonl. "
        "Again for more; FILE=3 weighs 3 times."
    ),
]
Out = Annotated[Path, typer.Option(help="Folder of the run: checkpoint, log, loss plot, adapter.safetensors.")]
Tokens = Annotated[int, typer.Option(min=1, help="Tokens to train on, all stages together.")]
Minutes = Annotated[float | None, typer.Option(min=0.01, help="End after so many minutes, if that is first.")]
Stage = Annotated[str, typer.Option(help="1: each layer imitates its attention. 2: the logits. both.")]
StageOneShare = Annotated[float, typer.Option(min=0.0, max=1.0, help="Of the budget, with both stages.")]
Rate = Annotated[float, typer.Option(min=1e-7, help="Learning rate of matrices in stage 2; others follow it.")]
SequenceLength = Annotated[int, typer.Option(min=64, help="Tokens of a window of text.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Windows of a step, in each process.")]
LoraRank = Annotated[int, typer.Option(min=0, help="Of the projections' updates in stage 2; 0: none.")]
FarRank = Annotated[int, typer.Option(min=0, help="Of the update of queries for the linear part; 0: none.")]
Linear = Annotated[
    bool, typer.Option("--linear/--no-linear", help="Without: stage 2 of the window alone, as a control.")
]
Rotated = Annotated[
    bool, typer.Option("--rotated/--unrotated", help="Features after the rotary embedding, or before it.")
]
Bases = Annotated[str, typer.Option(help="Transforms of the feature map, e.g. dct2 or dct2,dct4.")]
Nodes = Annotated[
    str,
    typer.Option(
        help="Start values of the features' radii. signed_sphere: equal, signs in turn; midpoint, van_der_corput, "
        "kronecker: normal quantiles at such points."
    ),
]
Windows = Annotated[
    str,
    typer.Option(help="keep: the model's. auto: each layer its own at the same mean; short prompts lose. Or tokens."),
]
Epochs = Annotated[
    int, typer.Option(min=0, help="Stage 1 only: read all text once, then go over each layer's record so often.")
]
SelfDistill = Annotated[int, typer.Option(min=0, help="Tokens of chat that the teacher writes first.")]
PrecisionName = Annotated[
    str, typer.Option(help="Of products: fp32, bf16 (CPUs with AVX512-BF16 train faster so), auto: bf16 on CUDA.")
]
Threads = Annotated[int, typer.Option(min=0, help="CPU threads; 0: torch's choice.")]
Seed = Annotated[int, typer.Option(min=0, help="Of the text's order and of fresh tensors.")]
Start = Annotated[Path | None, typer.Option(help="Adapter to train on, in place of a calibration.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...; several processes: cpu or cuda.")]
SaveEvery = Annotated[float, typer.Option(min=0.0, help="Seconds between checkpoints; a kill costs at most so many.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on where a run in OUT stopped or was killed.")]


def train_command(
    model: Model,
    data: Data,
    out: Out,
    tokens: Tokens = 1_000_000,
    minutes: Minutes = None,
    stage: Stage = "both",
    stage_one_share: StageOneShare = 0.3,
    lr: Rate = 1e-3,
    sequence_length: SequenceLength = 1024,
    batch_size: BatchSize = 1,
    lora_rank: LoraRank = 16,
    far_rank: FarRank = 16,
    linear: Linear = True,
    rotated: Rotated = False,
    bases: Bases = "dct2",
    nodes: Nodes = "signed_sphere",
    windows: Windows = "keep",
    epochs: Epochs = 0,
    self_distill: SelfDistill = 0,
    precision: PrecisionName = "auto",
    threads: Threads = 0,
    seed: Seed = 0,
    start: Start = None,
    device: Device = "cpu",
    save_every: SaveEvery = 300.0,
    resume: Resume = False,
) -> None:
    """Train the linear part of a converted model to imitate its teacher."""
    # Imported late: `--help` and mistakes in options need nothing of torch.
    from dijiang_model.conversion.training.setup import StudentOptions, prepare_run
    from dijiang_model.conversion.training.train import TrainingOptions

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
    student = StudentOptions(
        FeatureConfig(bases=_bases(bases), nodes=nodes, far_rank=far_rank, rotated=rotated), _windows(windows)
    )
    _refuse_contradictions(options, epochs)

    prepare = partial(
        prepare_run, model, data, out, options, student, self_distill=self_distill, resume=resume, start=start
    )
    _go(prepare, model, out, device=device, threads=threads, epochs=epochs, save_every_s=save_every)


def _go(
    prepare: "Callable[..., Trainer]",
    model: Path,
    out: Path,
    *,
    device: str,
    threads: int,
    epochs: int,
    save_every_s: float,
) -> None:
    """Runs, as one of the processes that a launcher started or alone; ends the command with its status."""
    # Imported late, as above.
    import torch

    from dijiang_model.conversion.training.log import LOG_FILE, read_log
    from dijiang_model.conversion.training.loss_plot import plot_losses
    from dijiang_model.conversion.training.process_group import joined
    from dijiang_model.conversion.training.progress import replay, run
    from dijiang_model.conversion.training.setup import PLOT_FILE

    if threads > 0:
        torch.set_num_threads(threads)
    console = Console(stderr=True)
    try:
        with joined(device) as (processes, own_device):
            console.quiet = not processes.is_first
            if epochs > 0 and processes.num > 1:
                raise ConversionError(f"--epochs trains in one process, and there are {processes.num}")
            trainer = prepare(device=own_device, processes=processes)
            if not trainer.is_done:
                console.print(trainer_cost(trainer), highlight=False)
            is_done = replay(trainer, out, epochs, console) if epochs > 0 else run(trainer, out, console, save_every_s)
            if processes.is_first:
                plot_losses(read_log(out / LOG_FILE), out / PLOT_FILE)
    except ModelError as error:
        console.print(f"[red]error:[/red] {escape(str(error))}", highlight=False)
        raise typer.Exit(1) from error
    if not is_done:
        console.print(
            f"Stopped; resume with the same command and `--resume`. So far: {escape(str(out / ADAPTER_FILE))}"
        )
        raise typer.Exit(130)
    console.print(f"Adapter: {escape(str(out / ADAPTER_FILE))}", highlight=False)
    merging = f"{program()} merge {model} {out} MERGED"
    console.print(f"`{escape(merging)}` makes a model of it to serve", highlight=False)


def trainer_cost(trainer: "Trainer") -> str:
    """What each step of a run is going to cost, in words."""
    from dijiang_model.conversion.training.costs import measured_speed, step_cost

    num_trained = sum(parameter.numel() for _, parameter in trainer.trained())
    cost = step_cost(trainer.model, trainer.options, num_trained=num_trained)
    return cost.text(measured_speed(trainer.model))


def _refuse_contradictions(options: "TrainingOptions", epochs: int) -> None:
    if not options.linear and options.stages != (2,):
        raise typer.BadParameter("goes with --stage 2", param_hint="--no-linear")
    if epochs > 0 and (options.stages != (1,) or options.minutes is not None):
        raise typer.BadParameter("goes with --stage 1 and without --minutes", param_hint="--epochs")


def _stages(text: str) -> tuple[int, ...]:
    stages = {"1": (1,), "2": (2,), "both": (1, 2)}
    if text not in stages:
        raise typer.BadParameter(f"{text!r} is none of 1, 2, both", param_hint="--stage")
    return stages[text]


def _precision(text: str, device: str) -> "Precision":
    if text == "auto":
        return "bf16" if device.startswith("cuda") else "fp32"
    text = {"float32": "fp32", "bfloat16": "bf16"}.get(str(dtype_name(text)), text)
    if text not in ("fp32", "bf16"):
        raise typer.BadParameter(f"{text!r} is none of auto, fp32, bf16", param_hint="--precision")
    return cast("Precision", text)


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
