"""Variants of the linear part at equal state bytes: what each removes of the error that a window leaves.

    python -m benchmarks.experiments.variants MODEL --train TEXT --held-out TEXT

A few layers of a converted model learn their attention (stage 1, on a record of the teacher, same text and steps for
all), each variant from the same calibration. What costs state is paid for with window: 64 features are worth 32
tokens. The measure is the squared error after the output projection on held-out text, as a share of what the window
of 60+4 alone leaves there. Few layers and few steps: an orientation, not a verdict.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional

from benchmarks.experiments.variant_kernels import Experiment
from benchmarks.machine import this_machine, write_result
from dijiang_model.checkpoints.checkpoint import load_model
from dijiang_model.config import FeatureConfig
from dijiang_model.conversion.training.calibrate import LookBack, look_back, with_windows
from dijiang_model.conversion.training.distill import output_weight, random_offset
from dijiang_model.conversion.training.kernel_training import MATRICES, make_trainable
from dijiang_model.conversion.training.student import new_student, with_features
from dijiang_model.conversion.training.text_windows import load_tokenizer, load_windows
from dijiang_model.kernel import LinearKernel
from dijiang_model.model import DiJiangForCausalLM
from dijiang_model.ops import LayerState
from dijiang_model.ops.layout import StepLayout
from dijiang_model.ops.training.attention import RecordedAttention, SoftmaxAttention
from dijiang_model.segments import run_segments, segments_layout

BASE = FeatureConfig(nodes="signed_sphere", far_rank=16, rotated=False)
WINDOW, WINDOW_OF_128, EQUAL_WINDOW = 60, 28, 92
TEST_OFFSETS = (0, 4096)
"""Where held-out segments seem to begin; only rotated features can tell."""
WARM_UP_STEPS = 4


@dataclass(frozen=True, slots=True)
class Variant:
    """What differs from `BASE`.

    Attributes:
        frozen: parameters of the kernel that do not learn.
        experiment: one of `variant_kernels.EXPERIMENTS`, or nothing.
        is_trained: False leaves the window alone.
    """

    name: str
    features: FeatureConfig = BASE
    window: int = WINDOW
    frozen: tuple[str, ...] = ()
    experiment: str = ""
    is_trained: bool = True


VARIANTS = (
    Variant("window 60+4 alone", is_trained=False),
    Variant("window 92+4 alone, equal bytes", window=EQUAL_WINDOW, is_trained=False),
    Variant("base: both signs, m = 64, no RoPE, queries learned"),
    Variant("nodes frozen", frozen=("nodes",)),
    Variant("weights off", frozen=("log_weights",)),
    Variant("nodes frozen, weights off", frozen=("nodes", "log_weights")),
    Variant("Gaussian nodes, one sign", replace(BASE, nodes="van_der_corput")),
    Variant("m = 128 (DCT-II, DCT-IV), window 28+4", replace(BASE, bases=("dct2", "dct4")), WINDOW_OF_128),
    Variant("with RoPE", replace(BASE, rotated=True)),
    Variant("queries not learned", replace(BASE, far_rank=0)),
    Variant("queries not learned, with RoPE", replace(BASE, far_rank=0, rotated=True)),
    Variant("decays frozen", frozen=("log_decay",)),
    Variant("input-dependent gate", experiment="gate"),
    Variant("learned initial state", experiment="initial state"),
    Variant("learned diagonal before the DCT", experiment="diagonal"),
    Variant("learned diagonal, with RoPE", replace(BASE, rotated=True), experiment="diagonal"),
)


@dataclass(slots=True)
class Recorder:
    """The teacher's attention; keeps q, k and v of chosen layers. An `AttentionOp`."""

    layers: dict[int, int]
    kept: dict[int, list[tuple[Tensor, Tensor, Tensor]]] = field(default_factory=dict)

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, kernel: LinearKernel, layout: StepLayout, state: LayerState
    ) -> Tensor:
        layer = self.layers.get(id(kernel))
        if layer is not None:
            self.kept.setdefault(layer, []).append((q, k, v))
        return SoftmaxAttention()(q, k, v, kernel=kernel, layout=layout, state=state)


Texts = dict[int, list[tuple[Tensor, Tensor, Tensor]]]


@torch.no_grad()
def read(model: DiJiangForCausalLM, windows: Tensor, layers: Sequence[int]) -> Texts:
    """q, k and v by layer and window, of [N, T] tokens."""
    kernels = {id(attention.linear): layer for layer, attention in enumerate(model.attentions) if layer in layers}
    recorder = Recorder(kernels)
    for window in windows:
        run_segments(model, window[None], recorder)
    return recorder.kept


@dataclass(frozen=True, slots=True)
class Setting:
    """What all variants share.

    Attributes:
        train, held: by layer; see `read`.
        look_backs: calibration by window.
        reference: by layer, the held-out error of the window of 60+4 alone.
    """

    base: DiJiangForCausalLM
    train: Texts
    held: Texts
    look_backs: dict[int, LookBack]
    reference: dict[int, float]
    epochs: int
    rate: float


def error_left(variant: Variant, setting: Setting) -> dict[int, float]:
    """By layer: held-out error of a variant over the reference."""
    config = with_features(setting.base.config, variant.features)
    config = with_windows(config, [variant.window] * config.num_layers)
    student = new_student(setting.base, config, look_back=setting.look_backs[variant.window], seed=0)
    make_trainable(student)
    left = {}
    for layer, attention in enumerate(student.attentions):
        if layer in setting.train:
            weight = output_weight(attention).detach()
            experiment = Experiment(attention.linear, variant.experiment)
            if variant.is_trained:
                _fit(student, experiment, weight, variant, setting.train[layer], setting)
            left[layer] = _held_out(student, experiment, weight, variant, setting.held[layer])
    return {layer: error / setting.reference.get(layer, 1.0) for layer, error in left.items()}


def _answer(experiment: Experiment, recorded: RecordedAttention, layout: StepLayout) -> Tensor:
    """In chunks where that is possible, which is faster."""
    if experiment.extra:
        return experiment.answer(recorded, layout)
    return recorded.answer(kernel=experiment.kernel, layout=layout)


def _fit(
    student: DiJiangForCausalLM,
    experiment: Experiment,
    weight: Tensor,
    variant: Variant,
    texts: Sequence[tuple[Tensor, Tensor, Tensor]],
    setting: Setting,
) -> None:
    optimizer = _optimizer(experiment, variant, setting.rate)
    generator = torch.Generator().manual_seed(0)
    length = len(texts[0][0])
    layout = segments_layout(student, 1, length)
    with torch.no_grad():
        segments = [RecordedAttention.of(*text, kernel=experiment.kernel, layout=layout) for text in texts]
        errors = [_error(segment.window_answer - segment.target, weight) for segment in segments]
    order = [int(i) for _ in range(setting.epochs) for i in torch.randperm(len(segments), generator=generator)]
    for step, index in enumerate(order):
        layout = segments_layout(student, 1, length, offset=random_offset(generator))
        for group in optimizer.param_groups:
            cosine = 0.5 + 0.5 * math.cos(math.pi * step / len(order))
            group["lr"] = group["full"] * min(1.0, (step + 1) / WARM_UP_STEPS) * cosine
        answer = _answer(experiment, segments[index], layout)
        optimizer.zero_grad(set_to_none=True)
        (_error(answer - segments[index].target, weight) / torch.stack(errors).mean()).backward()
        optimizer.step()


def _optimizer(experiment: Experiment, variant: Variant, rate: float) -> torch.optim.Optimizer:
    named = [
        (name, parameter)
        for name, parameter in experiment.named_parameters()
        if not any(frozen in name for frozen in variant.frozen)
    ]
    matrices = [parameter for name, parameter in named if name.rsplit(".", 1)[-1] in MATRICES]
    vectors = [parameter for name, parameter in named if name.rsplit(".", 1)[-1] not in MATRICES]
    groups = [{"params": vectors, "full": rate}, {"params": matrices, "full": rate / 10}]
    return torch.optim.Adam([group for group in groups if group["params"]], lr=rate, betas=(0.9, 0.95))


@torch.no_grad()
def _held_out(
    student: DiJiangForCausalLM,
    experiment: Experiment,
    weight: Tensor,
    variant: Variant,
    texts: Sequence[tuple[Tensor, Tensor, Tensor]],
) -> float:
    total = 0.0
    offsets = TEST_OFFSETS if variant.features.rotated and variant.is_trained else TEST_OFFSETS[:1]
    for text in texts:
        start = segments_layout(student, 1, len(text[0]))
        recorded = RecordedAttention.of(*text, kernel=experiment.kernel, layout=start)
        for offset in offsets:
            answer = recorded.window_answer
            if variant.is_trained:
                answer = _answer(experiment, recorded, segments_layout(student, 1, len(text[0]), offset=offset))
            total += float(_error(answer - recorded.target, weight)) / len(offsets)
    return total


def _error(difference: Tensor, weight: Tensor) -> Tensor:
    return functional.linear(difference.flatten(1), weight).square().sum()


def prepare(
    folder: Path, train: list[Path], held_out: list[Path], layers: Sequence[int], *, num: int, length: int, epochs: int
) -> Setting:
    """Reads text and model; the same for all variants."""
    base, tokenizer = load_model(folder), load_tokenizer(folder)

    def windows(paths: list[Path], count: int) -> Tensor:
        vocab_size = base.config.vocab_size
        text = load_windows(paths, tokenizer, length=length, seed=0, vocab_size=vocab_size, first=count)
        return text.batch(0, count)

    train_windows = windows(train, num)
    look_backs = {}
    for window in {variant.window for variant in VARIANTS}:
        config = with_windows(with_features(base.config, BASE), [window] * base.config.num_layers)
        look_backs[window] = look_back(new_student(base, config, look_back=None, seed=0), train_windows[:1])
    setting = Setting(
        base=base,
        train=read(base, train_windows, layers),
        held=read(base, windows(held_out, max(num // 2, 2)), layers),
        look_backs=look_backs,
        reference={},
        epochs=epochs,
        rate=0.03,
    )
    return replace(setting, reference=error_left(VARIANTS[0], setting))


def main(
    model: Annotated[Path, typer.Argument(help="Folder of an untrained conversion, recipe hybrid.")],
    train: Annotated[list[Path], typer.Option(help="Text to learn from.")],
    held_out: Annotated[list[Path], typer.Option(help="Text to measure on.")],
    layers: Annotated[str, typer.Option(help="Which, with commas.")] = "8,14,23",
    num: Annotated[int, typer.Option(min=1, help="Windows of text to learn from; half as many to measure on.")] = 6,
    length: Annotated[int, typer.Option(min=128, help="Tokens of a window.")] = 1024,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the text.")] = 4,
) -> None:
    """Compare variants of the linear part at equal state bytes."""
    chosen = [int(layer) for layer in layers.split(",")]
    started = time.process_time()
    setting = prepare(model, train, held_out, chosen, num=num, length=length, epochs=epochs)
    console = Console(stderr=True)
    table = Table("variant", *(f"layer {layer}" for layer in chosen), "mean", title="share of the error left")
    results = []
    for variant in VARIANTS:
        left = error_left(variant, setting)
        mean = sum(left.values()) / len(left)
        table.add_row(variant.name, *(f"{left[layer]:.3f}" for layer in chosen), f"{mean:.3f}")
        console.print(f"{variant.name}: {mean:.3f}, {time.process_time() - started:.0f} s", highlight=False)
        results.append({"variant": asdict(variant), "left": left, "mean": mean})
    console.print(table)
    seconds = round(time.process_time() - started, 1)
    options = {"layers": chosen, "windows": num, "length": length, "epochs": epochs, "processor_seconds": seconds}
    typer.echo(write_result("variants", this_machine(), {**options, "results": results}))


if __name__ == "__main__":
    typer.run(main)
