"""Steps of training: tokens per second and peak memory of both stages.

    dijiang bench train --length 512 --batch 1 --threads 1

Stage 1 teaches every layer's linear part the teacher's attention outputs; stage 2 teaches the whole network its
distribution, with low-rank updates. The text is random tokens: what a step costs does not depend on it. The floor is
the products with the frozen weights at the measured matrix rate: one pass in stage 1, the teacher's, the student's and
the gradient's in stage 2, the head's with each.
"""

from __future__ import annotations

import resource
import statistics
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from benchmarks import plots, report
from benchmarks.machine import Machine, is_cuda
from dijiang_model.errors import ModelError

if TYPE_CHECKING:
    from torch import Tensor

    from dijiang_model.conversion.training.distill import Precision
    from dijiang_model.conversion.training.train import TrainingOptions
    from dijiang_model.model import DiJiangForCausalLM

STAGES = {1: "attention outputs", 2: "whole network"}
PASSES = {1: 1, 2: 3}
"""How often a step multiplies with every frozen weight."""


@dataclass(frozen=True, slots=True)
class RandomText:
    """Token ids by step number, as `Trainer` wants its text."""

    vocab_size: int
    length: int

    def batch(self, step: int, size: int) -> Tensor:
        """[size, length] int64."""
        import torch

        generator = torch.Generator().manual_seed(step)
        return torch.randint(self.vocab_size, (size, self.length), generator=generator)


@dataclass(frozen=True, slots=True)
class Line:
    """One stage.

    Attributes:
        step_ms: median over the steps.
        peak_mib: memory of the process (CPU) or of the device (CUDA) at its highest so far, weights included.
        num_bytes: of frozen weights read, as often as they are.
        operations: of products with frozen weights.
        floor_ms: the longer of the two at the measured rates.
    """

    stage: int
    step_ms: float
    tokens_per_s: float
    peak_mib: float
    num_bytes: int
    operations: int
    floor_ms: float


def run_stage(
    base: DiJiangForCausalLM, stage: int, *, options: TrainingOptions, num_steps: int, machine: Machine
) -> Line:
    """Times some steps of one stage behind a first one that is not counted."""
    import torch

    from benchmarks.costs import num_projected, weight_bytes
    from dijiang_model.checkpoints.fingerprint import model_fingerprint
    from dijiang_model.conversion.training.adapters import AdapterInfo
    from dijiang_model.conversion.training.student import new_student
    from dijiang_model.conversion.training.train import Trainer

    student = new_student(base, base.config, look_back=None, seed=0)
    text = RandomText(base.config.vocab_size, options.sequence_length)
    info = AdapterInfo(
        base="benchmark", fingerprint=model_fingerprint(base), tokens_trained=0, lora_rank=options.lora_rank, recipe=""
    )
    device = str(base.device)
    if is_cuda(device):
        torch.cuda.reset_peak_memory_stats(device)
    trainer = Trainer(student, text, options, info=info)
    rates = [trainer.step()["tokens_per_s"] for _ in range(1 + num_steps)][1:]
    num_tokens = options.batch_size * options.sequence_length
    head = base.head_weight.numel() if stage == 2 else 0
    operations = 2 * PASSES[stage] * num_tokens * (num_projected(base) + head)
    num_bytes = PASSES[stage] * weight_bytes(base)
    rate = statistics.median(rates)
    return Line(
        stage=stage,
        step_ms=1e3 * num_tokens / rate,
        tokens_per_s=rate,
        peak_mib=peak_bytes(device) / 2**20,
        num_bytes=num_bytes,
        operations=operations,
        floor_ms=max(num_bytes / machine.read_gb_s, operations / machine.matrix_gflop_s) / 1e6,
    )


def peak_bytes(device: str) -> int:
    """The most memory so far: of a CUDA device's tensors, else of this process."""
    if is_cuda(device):
        import torch

        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def table(lines: list[Line]) -> Table:
    shown = Table("stage", "ms a step", "tokens/s", "peak MiB", "GB of weights", "GFLOP", "floor ms", "x floor")
    for line in lines:
        shown.add_row(
            f"{line.stage}: {STAGES[line.stage]}",
            f"{line.step_ms:,.0f}",
            f"{line.tokens_per_s:,.0f}",
            f"{line.peak_mib:,.0f}",
            f"{line.num_bytes / 1e9:.2f}",
            f"{line.operations / 1e9:,.1f}",
            f"{line.floor_ms:,.0f}",
            f"{line.step_ms / line.floor_ms:.2f}",
        )
    return shown


def draw(lines: list[Line], path: Path) -> None:
    """Tokens per second by stage, and what the floor would allow."""
    plots.bars(
        path,
        title="Training",
        unit="tokens/s",
        groups=[f"stage {line.stage}" for line in lines],
        series={
            "measured": [line.tokens_per_s for line in lines],
            "floor": [line.tokens_per_s * line.step_ms / line.floor_ms for line in lines],
        },
    )


def train_command(
    model: report.ModelFolder = None,
    stages: Annotated[str, typer.Option(help="1, 2 or both with a comma.")] = "1,2",
    length: Annotated[int, typer.Option(min=16, help="Tokens of a window.")] = 256,
    batch: Annotated[int, typer.Option(min=1, help="Windows of a step.")] = 1,
    lora_rank: Annotated[int, typer.Option(min=0, help="Of the updates in stage 2; 0: kernels only.")] = 8,
    precision: Annotated[str | None, typer.Option(help="fp32 or bf16 products; bf16 on CUDA if absent.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps that are timed in each stage.")] = 2,
    device: report.Device = "cpu",
    threads: report.Threads = None,
    only_json: report.OnlyJson = False,
    plot: report.Plot = None,
    save: report.Save = None,
) -> None:
    """Time training steps: tokens per second, peak memory, and the products that they take."""
    told = report.Report("train", only_json, plot, save)
    report.prepare(threads, "wall", device)
    wanted = [int(stage) for stage in report.words(stages, "--stages", ("1", "2"))]
    if not wanted:
        raise typer.BadParameter("name at least one stage", param_hint="--stages")
    products: Precision = "bf16" if is_cuda(device) else "fp32"
    if precision is not None:
        products = "bf16" if report.word(precision, "--precision", ("fp32", "bf16")) == "bf16" else "fp32"
    folder = report.model_folder(model)
    machine = report.measured_machine("wall", device, ["bf16" if products == "bf16" else "fp32"])
    told.introduce(machine)
    # Imported late: `--help` and mistakes in options need nothing of torch.
    from dijiang_model.checkpoints.checkpoint import load_model
    from dijiang_model.conversion.training.student import check_trainable

    lines = []
    try:
        base = load_model(folder, device=device)
        check_trainable(base.config)
        for stage in wanted:
            options = _options(stage, (steps + 1) * batch * length, length, batch, lora_rank, products)
            lines.append(run_stage(base, stage, options=options, num_steps=steps, machine=machine))
    except ModelError as error:
        raise report.failed(error) from error
    result = {
        "model": folder.name,
        "device": device,
        "precision": products,
        "length": length,
        "batch": batch,
        "lora_rank": lora_rank,
        "lines": [asdict(line) for line in lines],
    }
    told.finish(machine, result, table(lines), lambda file: draw(lines, file))


def _options(
    stage: int, num_tokens: int, length: int, batch: int, lora_rank: int, products: Precision
) -> TrainingOptions:
    from dijiang_model.conversion.training.train import TrainingOptions

    return TrainingOptions(
        tokens=num_tokens,
        minutes=None,
        stages=(stage,),
        stage_one_share=1.0,
        sequence_length=length,
        batch_size=batch,
        learning_rate=1e-4,
        lora_rank=lora_rank if stage == 2 else 0,
        precision=products,
        linear=True,
        seed=0,
    )


if __name__ == "__main__":
    typer.run(train_command)
