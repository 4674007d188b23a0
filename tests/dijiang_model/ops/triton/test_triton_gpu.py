"""What only a GPU shows of the kernels: races, offsets beyond 32 bits, many programs at once, bf16 by its own units."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="needs the extra `triton`; run by `make test-triton`")

from dijiang_model.ops.layout import PrefillLayout, Rotary, StepLayout
from dijiang_model.ops.torch.attention import TorchAttention
from dijiang_model.ops.triton import TritonAttention
from dijiang_model.rotary import rotary_frequencies
from dijiang_model.state import StateBuffer, StateSpec
from tests.dijiang_model.ops.triton.test_triton_attention import (
    BF16_TOLERANCE,
    FEATURES,
    HYBRID,
    PURE,
    RELEASED,
    Shape,
    random_attention,
)
from tests.dijiang_model.ops.triton.test_triton_int8_windows import TIE_TOLERANCE
from tests.dijiang_model.stepping import assert_close_in_norm

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]
DEVICE = "cuda"
SHAPES = {
    "SmolLM2": Shape(9, 3, 64, 64, replace(HYBRID, features=replace(FEATURES, rotated=False, far_rank=16), window=60)),
    "LLaMA-2-7B": Shape(32, 32, 128, 128, PURE),
    "Pythia-2.8B": Shape(32, 32, 80, 20, replace(RELEASED, decay="table")),
    "Pythia-1B": Shape(8, 8, 256, 64, replace(HYBRID, window=60, sinks=4)),
}


class Step:
    """One step of decode rows and prefill segments on random states; runs as often as one likes from the same start."""

    def __init__(
        self,
        shape: Shape,
        *,
        num_decode: int,
        lengths: tuple[int, ...],
        dtype: torch.dtype,
        is_int8: bool = False,
        has_bf16_sums: bool = False,
    ) -> None:
        self.attention = random_attention(shape, dtype).to(DEVICE)
        self.attention.has_int8_window, self.attention.has_bf16_sums = is_int8, has_bf16_sums
        self.num_slots = num_decode + len(lengths) + 1
        self.start = StateBuffer(StateSpec(self.attention.state_tensors()), self.num_slots, DEVICE)
        random = torch.Generator(DEVICE).manual_seed(1)
        for name, tensor in self.start.tensors.items():
            noise = torch.randn(tensor.shape, generator=random, device=DEVICE)
            if tensor.dtype == torch.int8:
                tensor.copy_((noise * 40).clamp(-127, 127))
            elif name.endswith("_scales"):
                tensor.copy_(noise.abs() * 1e-3)
            else:
                tensor.copy_(noise.abs() + 1 if name.endswith("normaliser") else noise * 0.1)
        num_tokens = num_decode + sum(lengths)
        firsts = [
            torch.randint(0, 3000, (1,), generator=torch.Generator().manual_seed(n)) for n in range(self.num_slots)
        ]
        parts = [firsts[n] for n in range(num_decode)]
        parts += [firsts[num_decode + n] + torch.arange(length) for n, length in enumerate(lengths)]
        positions = torch.cat(parts).to(DEVICE)
        slots = torch.randperm(self.num_slots - 1, generator=torch.Generator().manual_seed(2)).to(DEVICE) + 1

        def angles(at: Tensor) -> Rotary:
            return Rotary.at(at, frequencies=rotary_frequencies(shape.rotary_dims, theta=10_000.0), dtype=torch.float32)

        prefill = PrefillLayout(positions[num_decode:], slots[num_decode:], lengths) if lengths else None
        self.layout = StepLayout(
            num_decode, positions, slots[:num_decode], angles(positions), angles(positions.clamp(max=49)), prefill
        )
        self.q = torch.randn(num_tokens, shape.num_heads, shape.head_size, generator=random, device=DEVICE).to(dtype)
        self.k, self.v = torch.randn(
            2, num_tokens, shape.num_groups, shape.head_size, generator=random, device=DEVICE
        ).to(dtype)

    @torch.no_grad()
    def run(self, op: TritonAttention | TorchAttention) -> tuple[Tensor, dict[str, Tensor]]:
        """Output and states afterwards."""
        state = StateBuffer(self.start.spec, self.num_slots, DEVICE)
        state.storage.copy_(self.start.storage)
        out = op(
            self.q,
            self.k,
            self.v,
            kernel=self.attention.linear,
            layout=self.layout,
            state=self.attention.layer_state(state),
        )
        return out, dict(state.tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SHAPES)
def test_many_rows_and_long_segments_equal_torchs_operator(name: str, dtype: torch.dtype) -> None:
    """fp32 against fp32: both are off from the truth by as much as 1e-5."""
    step = Step(SHAPES[name], num_decode=97, lengths=(1, 700, 64, 65, 1500), dtype=dtype)
    tolerance = 2e-5 if dtype == torch.float32 else BF16_TOLERANCE
    out, states = step.run(TritonAttention())
    expected, expected_states = step.run(TorchAttention())
    assert_close_in_norm(out.float(), expected.float(), tolerance=tolerance)
    for tensor_name, tensor in states.items():
        assert_close_in_norm(tensor[1:], expected_states[tensor_name][1:], tolerance=tolerance, what=tensor_name)


@pytest.mark.parametrize("name", ["SmolLM2", "Pythia-1B"])
def test_windows_in_int8_equal_torchs_operator(name: str) -> None:
    """But for numbers at ties, whose rotations differ in their last bit."""
    step = Step(SHAPES[name], num_decode=97, lengths=(1, 700, 64, 65, 1500), dtype=torch.float32, is_int8=True)
    out, states = step.run(TritonAttention())
    expected, expected_states = step.run(TorchAttention())
    assert_close_in_norm(out, expected, tolerance=TIE_TOLERANCE)
    for tensor_name, tensor in states.items():
        found, wanted = (one[tensor_name][1:].float() for one in (states, expected_states))
        assert_close_in_norm(found, wanted, tolerance=10 * TIE_TOLERANCE, what=tensor_name)
        if tensor.dtype == torch.int8:
            assert ((found - wanted).abs() <= 1).all()


@pytest.mark.parametrize("is_int8", [False, True])
@pytest.mark.parametrize("name", SHAPES)
def test_a_step_gives_the_same_bits_every_time(name: str, is_int8: bool) -> None:
    """A race would show here sooner or later."""
    if is_int8 and SHAPES[name].attention.window == 0:
        pytest.skip("without a window there is nothing in int8")
    step = Step(
        SHAPES[name],
        num_decode=200,
        lengths=(130, 515),
        dtype=torch.bfloat16,
        is_int8=is_int8,
        has_bf16_sums=is_int8,
    )
    out, states = step.run(TritonAttention())
    for _ in range(20):
        again, states_again = step.run(TritonAttention())
        assert torch.equal(again, out)
        assert all(torch.equal(states_again[key].view(torch.uint8), states[key].view(torch.uint8)) for key in states)


def test_slots_beyond_32_bits_of_elements_are_found() -> None:
    shape = SHAPES["LLaMA-2-7B"]
    attention = random_attention(shape, torch.float32).to(DEVICE)
    spec = StateSpec(attention.state_tensors())
    num_slots = 2**33 // spec.bytes_per_slot + 3  # more than 2^31 numbers of 4 bytes
    if torch.cuda.mem_get_info()[0] < 1.2 * num_slots * spec.bytes_per_slot:
        pytest.skip("needs 11 GB of free memory")
    large, small = StateBuffer(spec, num_slots, DEVICE), StateBuffer(spec, 2, DEVICE)
    small.storage.zero_()
    large.storage[-1].zero_()
    random = torch.Generator(DEVICE).manual_seed(3)
    q, k, v = torch.randn(3, 70, 32, 128, generator=random, device=DEVICE)
    positions = torch.arange(70, device=DEVICE)
    outputs = []
    for buffer, slot in ((large, num_slots - 1), (small, 1)):
        slots = torch.tensor([slot], device=DEVICE)
        parts = []
        for begin, end, num_decode in ((0, 69, 0), (69, 70, 1)):
            at = positions[begin:end]
            rotary = Rotary.at(at, frequencies=rotary_frequencies(128, theta=10_000.0), dtype=torch.float32)
            prefill = None if num_decode else PrefillLayout(at, slots, (end - begin,))
            layout = StepLayout(num_decode, at, slots[:num_decode], rotary, rotary, prefill)
            state = attention.layer_state(buffer)
            rows = slice(begin, end)
            with torch.no_grad():
                parts.append(
                    TritonAttention()(q[rows], k[rows], v[rows], kernel=attention.linear, layout=layout, state=state)
                )
        outputs.append(torch.cat(parts))
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(large.storage[-1], small.storage[1])
