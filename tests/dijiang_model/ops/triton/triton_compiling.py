"""Compiles the Triton kernels for GPUs without having one: what the interpreter cannot show.

    python -m tests.dijiang_model.ops.triton.triton_compiling [SHAPE ...]

Runs layers of real shapes on CPU tensors with every launch recorded in place of being run, then compiles each
recorded launch for compute capabilities 8.0, 9.0 and 10.0. Prints one JSON line per launch: kernel, shape, registers,
spills, shared memory and sums in fp64 that are not fused with a product; at last one line for each kernel that would be
compiled anew for some steps of one model, with the number of its variants. Needs triton's own assembler and no driver.
Not in Triton's interpreter.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dijiang_model.attention import DiJiangAttention
from dijiang_model.config import AnchorConfig, AttentionConfig, FeatureConfig, ModelConfig
from dijiang_model.kernel import LinearKernel
from dijiang_model.ops import LayerState
from dijiang_model.ops.drawing import Draws
from dijiang_model.ops.layout import PrefillLayout, Rotary, StepLayout
from dijiang_model.ops.triton import (
    TritonAttention,
    anchored_prefill,
    anchors,
    around,
    decode,
    drawing,
    prefill,
    quantized,
    read_out,
)
from dijiang_model.rotary import rotary_frequencies
from dijiang_model.state import StateBuffer, StateSpec

CAPABILITIES = (80, 90, 100)
OPTIONS = ("num_warps", "num_stages", "num_ctas", "maxnreg", "enable_fp_fusion")
TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.uint8: "*u8",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.float64: "*fp64",
    torch.int8: "*i8",
}


@dataclass(frozen=True, slots=True)
class Launch:
    """One recorded launch."""

    kernel: Any
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]

    @property
    def variant(self) -> tuple[object, ...]:
        """What Triton compiles anew for when it changes."""
        parameters = dict(zip(self.kernel.arg_names, self.kernel.params, strict=True))
        values = dict(zip(self.kernel.arg_names, self.arguments, strict=False))
        key: list[object] = [(name, value) for name, value in sorted(self.keywords.items())]
        for name, value in values.items():
            if isinstance(value, Tensor):
                is_free = parameters[name].do_not_specialize_on_alignment
                key.append((name, value.dtype, is_free or value.data_ptr() % 16 == 0))
            elif isinstance(value, int) and not parameters[name].do_not_specialize:
                key.append((name, _type(value), value == 1, value % 16 == 0))
        return tuple(key)

    def takes(self, dtype: torch.dtype) -> bool:
        """Whether an argument is a tensor of this dtype."""
        return any(isinstance(value, Tensor) and value.dtype == dtype for value in self.arguments)

    def compiled(self, capability: int) -> Any:
        """With the specialisations that a launch of these arguments would get."""
        names, signature, constants, attributes = self.kernel.arg_names, {}, {}, {}
        values = dict(zip(names, self.arguments, strict=False)) | {
            name: value for name, value in self.keywords.items() if name not in OPTIONS
        }
        for index, name in enumerate(names):
            value, is_free = values[name], self.kernel.params[index].do_not_specialize
            is_one = isinstance(value, int) and value == 1 and not is_free
            is_constant = name in self.keywords or is_one
            signature[name] = "constexpr" if is_constant else _type(value)
            if is_constant:
                constants[(index,)] = value
            elif not is_free and _is_divisible(value) and not self.kernel.params[index].do_not_specialize_on_alignment:
                attributes[(index,)] = [["tt.divisibility", 16]]
        source = ASTSource(self.kernel, signature, constants, attributes)
        options = {name: value for name, value in self.keywords.items() if name in OPTIONS}
        return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def _type(value: Any) -> str:
    if isinstance(value, Tensor):
        return TYPES[value.dtype]
    if isinstance(value, float):
        return "fp32"
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def _is_divisible(value: Any) -> bool:
    return isinstance(value, Tensor) or (isinstance(value, int) and value % 16 == 0)


class _Recorder:
    def __init__(self, kernel: Any, launches: list[Launch]) -> None:
        self._kernel, self._launches = kernel, launches

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *arguments, **keywords: self._launches.append(Launch(self._kernel, arguments, keywords))


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Every launch of the operator's kernels goes into the list, and nothing runs."""
    launches: list[Launch] = []
    hosts = (decode, anchors, anchored_prefill, prefill, read_out, around, quantized, drawing)
    kernels = [(host, name) for host in hosts for name in vars(host) if name.endswith("_kernel")]
    originals = [(host, name, getattr(host, name)) for host, name in kernels]
    try:
        for host, name, kernel in originals:
            setattr(host, name, _Recorder(kernel, launches))
        yield launches
    finally:
        for host, name, kernel in originals:
            setattr(host, name, kernel)


VOCAB_SIZE = 49_152
FEATURES = FeatureConfig(scale=0.3, rotated=False, far_rank=16)
HYBRID = AttentionConfig(features=FEATURES, window=60, sinks=4)
PURE = AttentionConfig(features=FeatureConfig(scale=0.3))
RELEASED = AttentionConfig(FeatureConfig(("matrix",), nodes="checkpoint"), read_out="group_norm", decay="table")
SHAPES: dict[str, tuple[int, int, int, AttentionConfig]] = {
    "SmolLM2-135M, hybrid": (9, 3, 64, HYBRID),
    "LLaMA-2-7B, pure": (32, 32, 128, PURE),
    "LLaMA-2-7B, hybrid, two bases": (32, 32, 128, replace(HYBRID, features=replace(FEATURES, bases=("dct2", "dct4")))),
    "Pythia-2.8B, released": (32, 32, 80, RELEASED),
    "Pythia-1B, hybrid": (8, 8, 256, HYBRID),
}
ANCHORED: dict[str, tuple[int, int, int, AttentionConfig]] = {
    "SmolLM2-135M, anchors": (9, 3, 64, replace(HYBRID, anchors=AnchorConfig((1400, 356, 588), (60, 60, 60)))),
    "SmolLM2-135M, the default model": (
        9,
        3,
        64,
        replace(
            HYBRID,
            features=FeatureConfig(scale=0.3, rotated=False, width=1),
            anchors=AnchorConfig((1400, 356, 588), (60, 60, 60)),
        ),
    ),
    "SmolLM2-135M, values of 4 bits, no linear part": (
        9,
        3,
        64,
        replace(
            HYBRID,
            features=FeatureConfig(scale=0.3, rotated=False, width=0),
            anchors=AnchorConfig((1400, 356, 588), (60, 60, 60), value_bits=4),
        ),
    ),
    "LLaMA-2-7B, anchors": (32, 32, 128, replace(HYBRID, anchors=AnchorConfig((588,) * 32, (60,) * 32))),
}
"""Query heads, key-value heads, head size and attention of a layer."""


def launches_of(
    shape: str,
    *,
    dtype: torch.dtype = torch.bfloat16,
    state_dtype: torch.dtype = torch.float32,
    is_int8: bool = False,
    num_decode: int = 1,
    lengths: tuple[int, ...] = (69,),
) -> list[Launch]:
    """All launches of a step of one layer with decode rows and prefill segments; `is_int8`: with exact rows in int8."""
    num_heads, num_groups, size, attention = SHAPES[shape]
    config = ModelConfig(
        "llama", 260, num_heads * size, 64, num_heads, num_groups, size, size, 1e4, 2048, 1e-5, "silu", False, False,
        False, True, (attention,), position_table_length=64,
    )  # fmt: skip
    kernel = LinearKernel(config, 0, torch.float32)
    for parameter in kernel.parameters():
        parameter.data.fill_(0.5)
    kernel.prepare()
    num_tokens, num_slots = num_decode + sum(lengths), num_decode + len(lengths) + 1
    num_features, exact = kernel.num_features, attention.window + attention.sinks
    q = torch.zeros(num_tokens, num_heads, size, dtype=dtype)
    k, v = torch.zeros(2, num_tokens, num_groups, size, dtype=dtype)
    near_dtype = torch.int8 if is_int8 else dtype
    exact_rows = torch.zeros(2, num_slots, num_groups, exact, size, dtype=near_dtype) if exact else (None, None)
    scales = torch.zeros(2, num_slots, num_groups, exact) if exact and is_int8 else (None, None)
    has_normaliser = attention.read_out == "denominator"
    state = LayerState(
        torch.zeros(num_slots, num_groups, num_features, size, dtype=state_dtype),
        torch.zeros(num_slots, num_groups, num_features) if has_normaliser else None,
        *exact_rows,
        *scales,
    )
    positions, slots = torch.arange(num_tokens), torch.arange(1, num_slots)
    rotary = Rotary.at(positions, frequencies=rotary_frequencies(size, theta=1e4), dtype=torch.float32)
    with recorded() as launches:
        prefill = PrefillLayout(positions[num_decode:], slots[num_decode:], lengths)
        layout = StepLayout(num_decode, positions, slots[:num_decode], rotary, rotary, prefill)
        attended = TritonAttention()(q, k, v, kernel=kernel, layout=layout, state=state)
        read_out.angles(positions, frequencies=rotary_frequencies(size, theta=1e4), last_sink=2047)
        x, norm = torch.zeros(num_tokens, num_heads * size, dtype=dtype), torch.nn.LayerNorm(num_heads * size)
        around.residual_norm(x, x, norm.to(dtype))
        around.two_norms(x, norm, norm)
        around.gated_product(x, x)
        if not has_normaliser:
            norm = torch.nn.GroupNorm(size, num_heads * size, dtype=dtype)
            read_out.gated_norm(attended, torch.zeros(num_tokens, num_heads * size, dtype=dtype), norm)
        _draw(num_decode)
    return launches


def _draw(num_rows: int) -> None:
    """A captured step's draw, and a fresh one's with a temperature alone: views into the step's one copy."""
    logits = torch.zeros(num_rows, VOCAB_SIZE)
    top_k, reals = torch.zeros(7, num_rows, dtype=torch.int64)[2], torch.zeros(7, num_rows, dtype=torch.float64)[3:]
    uniforms, temperatures, min_p, top_p = reals
    drawing.drawn_tokens(logits, Draws(uniforms, temperatures, min_p, top_k, VOCAB_SIZE, top_p), is_checked=True)
    drawing.drawn_tokens(logits, Draws(uniforms, temperatures))


def anchored_launches(
    shape: str,
    *,
    dtype: torch.dtype = torch.bfloat16,
    state_dtype: torch.dtype = torch.float32,
    num_decode: int = 2,
    lengths: tuple[int, ...] = (69,),
) -> list[Launch]:
    """The launches of a step of one of `ANCHORED`, with decode rows and prefill segments."""
    num_heads, num_groups, size, attention = ANCHORED[shape]
    config = ModelConfig(
        "llama", 260, num_heads * size, 64, num_heads, num_groups, size, size, 1e4, 2048, 1e-5, "silu", False, False,
        False, True, (attention,), position_table_length=64,
    )  # fmt: skip
    module = DiJiangAttention(config, 0, dtype=dtype)
    module.has_bf16_sums = state_dtype == torch.bfloat16
    for parameter in module.parameters():
        parameter.data.fill_(0.5)
    module.linear.prepare()
    num_tokens, num_slots = num_decode + sum(lengths), num_decode + len(lengths) + 1
    buffer = StateBuffer(StateSpec(module.state_tensors()), num_slots, cleared=True)
    positions, slots = torch.arange(num_tokens), torch.arange(1, num_slots)
    frequencies = rotary_frequencies(size, theta=1e4)
    rotary = Rotary.at(positions, frequencies=frequencies, dtype=torch.float32)
    q = torch.zeros(num_tokens, num_heads, size, dtype=dtype)
    k, v = torch.zeros(2, num_tokens, num_groups, size, dtype=dtype)
    with recorded() as launches:
        prefill = PrefillLayout(positions[num_decode:], slots[num_decode:], lengths)
        layout = StepLayout(num_decode, positions, slots[:num_decode], rotary, rotary, prefill)
        x, weight = torch.zeros(num_tokens, num_heads * size, dtype=dtype), torch.zeros(num_groups, num_heads * size)
        scores = around.grid_scores(x, weight, torch.zeros(num_groups), grid=1 / 64)
        state = replace(module.layer_state(buffer), token_scores=scores)
        TritonAttention()(q, k, v, kernel=module.linear, layout=layout, state=state)
    return launches


def resources(compiled: Any) -> dict[str, int]:
    """Registers of a thread, bytes of its spills and of a program's shared memory; sums in fp64 of their own."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = {name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    return {
        "registers": found["REG"],
        "stack_bytes": found["STACK"] + found["LOCAL"],
        "shared_bytes": compiled.metadata.shared,
        "warps": compiled.metadata.num_warps,
        "fp64_sums": len(re.findall(r"add(?:\.rn)?\.f64", compiled.asm["ptx"])),
    }


INT8: dict[str, Any] = {"state_dtype": torch.bfloat16, "is_int8": True}
STEPS = ((1, (69,)), (2, (64, 1)), (3, (130,)), (4, (64, 64)), (6, (65, 64, 1)))
"""Decode rows and segments: what lies where in the step's one copy is different in each."""


def num_variants(shape: str, **kind: Any) -> dict[str, int]:
    """How often each kernel is compiled for steps of one model; angles, read-out and drawing included."""
    found: dict[str, set[tuple[object, ...]]] = {}
    for num_decode, lengths in STEPS:
        for launch in launches_of(shape, num_decode=num_decode, lengths=lengths, **kind):
            found.setdefault(launch.kernel.__name__, set()).add(launch.variant)
    return {name: len(variants) for name, variants in found.items()}


def main() -> None:
    """Compiles all of `SHAPES`, or of those named on the command line; in bf16, fp32, with states in bf16 and int8."""
    for shape in sys.argv[1:] or [*SHAPES, *ANCHORED]:
        if shape in ANCHORED:
            compile_anchored(shape)
            continue
        narrow = launches_of(shape, state_dtype=torch.bfloat16)
        kinds = {
            "bf16": launches_of(shape),
            "fp32": launches_of(shape, dtype=torch.float32),
            "bf16, states in bf16": [
                one for one in narrow if one.kernel.__name__ in ("decode_kernel", "states_kernel")
            ],
        }
        if SHAPES[shape][3].window > 0:
            kinds["bf16, states in int8"] = [one for one in launches_of(shape, **INT8) if one.takes(torch.int8)]
        for capability in CAPABILITIES:
            for kind, launches in kinds.items():
                for launch in launches:
                    about = {"shape": shape, "capability": capability, "kind": kind, "kernel": launch.kernel.__name__}
                    _say({**about, **resources(launch.compiled(capability))})
        for kind, options in {"bf16": {}, "bf16, states in int8": INT8}.items():
            for name, number in num_variants(shape, **options).items():
                if number > 1:
                    _say({"shape": shape, "kind": kind, "kernel": name, "variants": number})


def compile_anchored(shape: str) -> None:
    """Compiles the kernels of one of `ANCHORED`: of decode rows and of segments."""
    for capability in CAPABILITIES:
        for dtype, state_dtype in ((torch.bfloat16, torch.float32), (torch.bfloat16,) * 2, (torch.float32,) * 2):
            kind = f"{dtype}, states in {state_dtype}".replace("torch.", "")
            for launch in anchored_launches(shape, dtype=dtype, state_dtype=state_dtype):
                about = {"shape": shape, "capability": capability, "kind": kind, "kernel": launch.kernel.__name__}
                _say({**about, **resources(launch.compiled(capability))})
    found: dict[str, set[tuple[object, ...]]] = {}
    for num_decode, lengths in STEPS:
        for launch in anchored_launches(shape, num_decode=num_decode, lengths=lengths):
            found.setdefault(launch.kernel.__name__, set()).add(launch.variant)
    for name, variants in found.items():
        if len(variants) > (2 if name == "places_kernel" else 1):  # of anchors, and of others
            _say({"shape": shape, "kernel": name, "variants": len(variants)})


def _say(line: dict[str, object]) -> None:
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
