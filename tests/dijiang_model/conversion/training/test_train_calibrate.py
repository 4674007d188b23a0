"""Calibration: what is measured is what the teacher does, and bytes are spent where they save most."""

from dataclasses import replace

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dijiang_model.config import FeatureConfig
from dijiang_model.conversion.training.calibrate import allocate_windows, look_back, window_losses, with_windows
from dijiang_model.conversion.training.distill import output_weight
from dijiang_model.conversion.training.student import new_student
from dijiang_model.model import DiJiangForCausalLM
from dijiang_model.ops import LayerState
from dijiang_model.ops.layout import StepLayout
from dijiang_model.ops.training.attention import HybridAttention, SoftmaxAttention, WindowAttention
from dijiang_model.segments import run_segments
from tests.tiny_models import HYBRID, llama_config, tiny_model

LENGTH = 120


def tokens() -> Tensor:
    return torch.randint(0, 256, (2, LENGTH), generator=torch.Generator().manual_seed(0))


class Spy:
    """The teacher's attention; keeps the rotated probabilities of each layer, [H, T, T], and its output."""

    def __init__(self) -> None:
        self.probabilities: list[Tensor] = []
        self.outputs: list[Tensor] = []

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, kernel: object, layout: StepLayout, state: LayerState
    ) -> Tensor:
        rotated_q = layout.rotary.apply(q).transpose(0, 1)
        rotated_k = layout.rotary.apply(k).transpose(0, 1).repeat_interleave(q.shape[1] // k.shape[1], 0)
        scores = rotated_q @ rotated_k.transpose(1, 2) * q.shape[-1] ** -0.5
        hidden = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
        self.probabilities.append(scores.masked_fill(hidden, -torch.inf).softmax(-1))
        output = SoftmaxAttention()(q, k, v, kernel=kernel, layout=layout, state=state)  # type: ignore[arg-type]
        self.outputs.append(output)
        return output


def model_of(dtype: torch.dtype = torch.float64) -> DiJiangForCausalLM:
    return tiny_model(llama_config(HYBRID, HYBRID), dtype=dtype)


def test_look_back_is_the_mass_and_distance_beyond_the_window() -> None:
    model = model_of()
    found = look_back(model, tokens()[:1])
    spy = Spy()
    run_segments(model, tokens()[:1], spy)
    token = torch.arange(LENGTH)
    excess = token[:, None] - token - HYBRID.window
    is_far = (excess >= 0) & (token >= HYBRID.sinks)
    for layer, probability in enumerate(spy.probabilities):
        far = probability * is_far
        torch.testing.assert_close(found.far_mass[layer], far.sum((1, 2)) / LENGTH)
        by_group = far.unflatten(0, (2, 2)).sum(1)
        distance = (by_group * excess).sum((1, 2)) / by_group.sum((1, 2))
        torch.testing.assert_close(found.distance[layer], distance)


def test_a_calibrated_start_is_nearer_to_the_teacher_than_a_silent_one() -> None:
    base = model_of(torch.float32)
    config = replace(base.config, layers=(replace(HYBRID, features=FeatureConfig(scale=0.5)),) * 2)
    student = new_student(base, config, look_back=look_back(base, tokens()[:1]), seed=0)
    teacher = run_segments(base, tokens(), SoftmaxAttention())

    def distance(op: HybridAttention | WindowAttention) -> float:
        return float((run_segments(student, tokens(), op) - teacher).square().mean())

    assert distance(HybridAttention()) < distance(WindowAttention())


def test_window_losses_are_errors_of_the_output_over_the_stream() -> None:
    model = model_of()
    found = window_losses(model, tokens()[:1], [5, 20, LENGTH], sinks=2)
    assert bool((found[:, 0] > found[:, 1]).all())
    assert float(found[:, 2].abs().max()) < 1e-12
    first = next(iter(model.attentions))
    spy = Spy()
    run_segments(model, tokens()[:1], spy)
    x = model.embed(tokens()[0], torch.arange(LENGTH))
    windowed: list[Tensor] = []

    def first_layer(q: Tensor, k: Tensor, v: Tensor, **others: object) -> Tensor:
        windowed.append(WindowAttention(5, 2)(q, k, v, **others))  # type: ignore[arg-type]
        return windowed[-1]

    run_segments(model, tokens()[:1], first_layer)  # type: ignore[arg-type]
    error = (windowed[0] - spy.outputs[0]).flatten(1) @ output_weight(first).T
    half = LENGTH // 2
    expected = error[half:].square().sum() / x[half:].square().sum()
    torch.testing.assert_close(found[0, 0].double(), expected, rtol=1e-5, atol=0.0)


def test_windows_go_where_they_save_most() -> None:
    losses = torch.tensor([[1.0, 0.9, 0.8], [8.0, 4.0, 1.0], [0.1, 0.1, 0.1]])
    assert allocate_windows(losses, [4, 8, 16], mean_window=8) == [4, 16, 4]


@given(
    losses=st.lists(st.lists(st.floats(0, 10), min_size=3, max_size=3), min_size=1, max_size=6),
    mean_window=st.integers(4, 40),
)
def test_the_mean_window_is_kept(losses: list[list[float]], mean_window: int) -> None:
    falling = torch.tensor(losses).sort(dim=1, descending=True).values
    windows = allocate_windows(falling, [4, 10, 30], mean_window=mean_window)
    assert sum(windows) <= mean_window * len(windows)
    assert all(window in (4, 10, 30) for window in windows)


def test_each_layer_gets_its_window() -> None:
    config = with_windows(llama_config(HYBRID, HYBRID), [7, 3])
    assert [layer.window for layer in config.layers] == [7, 3]
    assert [layer.sinks for layer in config.layers] == [2, 2]
