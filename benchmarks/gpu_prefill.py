"""Prompts on a GPU: ours in packed chunks, HF's with sdpa; and the linear-attention kernels beside other people's.

    python -m benchmarks.gpu_prefill --shapes llama-2-7b --attention pure --lengths 2048,8192,32768

True shapes, bf16, random weights, contenders in turn. `of_peak` is the operations of the prompt (projections, attention
as it is computed, one row of logits) over the time and the measured matrix rate. Ragged: the same number of tokens as
prompts of uneven lengths in one batch. The second table takes equal queries, keys and values and compares our chunked
kernels, grouped heads not repeated, with flash-linear-attention's `chunk_simple_gla`, if that package can be imported:
heads repeated for it, as it wants them. `--tiny` runs everything on a CPU, with TRITON_INTERPRET=1 in Triton's
interpreter. No HTTP package is needed. The last line is JSON.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from benchmarks import plots
from benchmarks.costs import step_costs
from benchmarks.gpu_decode import numbers, out_of_memory_is_a_result
from benchmarks.gpu_models import ATTENTION, SHAPES, config_of, random_model, softmax_twin
from benchmarks.gpu_timing import Ceilings, ceilings, interleaved_ms, median_ms
from dijiang_model.kernel import LinearKernel
from dijiang_model.model import DiJiangForCausalLM, PackedBatch
from dijiang_model.ops import LayerState
from dijiang_model.ops.layout import PrefillLayout, Rotary, StepLayout
from dijiang_model.state import StateBuffer

Run = Callable[[], object]
RAGGED = (0.5, 0.25, 0.13, 0.07, 0.05)
"""Shares of the tokens, longest first; the rest is one more prompt."""


@dataclass(frozen=True, slots=True)
class Line:
    """One contender and one number of tokens; `ms` None: out of memory; `of_peak` of ours alone."""

    shape: str
    name: str
    num_tokens: int
    ms: float | None
    tokens_per_s: float | None = None
    tflop_s: float | None = None
    of_peak: float | None = None


def ragged(num_tokens: int) -> list[int]:
    """Uneven lengths, >= 1 each, that sum up to `num_tokens`."""
    lengths = [max(1, int(share * num_tokens)) for share in RAGGED]
    rest = num_tokens - sum(lengths)
    return [*lengths, rest] if rest > 0 else [num_tokens]


def our_prompt(model: DiJiangForCausalLM, lengths: Sequence[int]) -> Run:
    """Prompts of these lengths into fresh slots; the logits of each one's last token."""
    device = model.device
    state = StateBuffer(model.state_spec, len(lengths) + 1, device)
    positions = torch.cat([torch.arange(length, device=device) for length in lengths])
    slots = torch.arange(1, len(lengths) + 1, device=device)
    last = torch.tensor(lengths, device=device).cumsum(0) - 1
    batch = PackedBatch(positions % 250, positions, slots, tuple(lengths), 0, last)

    def prompt() -> object:
        state.storage.zero_()
        return model(batch, state)

    return prompt


def their_prompt(twin: Any, num_tokens: int, device: str) -> Run:
    token_ids = (torch.arange(num_tokens, device=device) % 250)[None]
    return lambda: twin(token_ids, use_cache=True, logits_to_keep=1).logits


def prompts(shape: str, arguments: argparse.Namespace, most: Ceilings, dtype: torch.dtype) -> list[Line]:
    """Whole networks."""
    lines: list[Line] = []
    device = arguments.device
    for number, attention in enumerate(arguments.attention):
        model = random_model(config_of(shape, attention), device=device, dtype=dtype)
        twin = softmax_twin(model) if arguments.hf and number == 0 else None
        for num_tokens in arguments.lengths:
            operations = step_costs(model, num_rows=1, num_tokens=num_tokens).operations
            runs = {
                f"ours {attention}": partial(our_prompt, model, [num_tokens]),
                f"ours {attention}, ragged": partial(our_prompt, model, ragged(num_tokens)),
            }
            if twin is not None:
                runs["HF sdpa"] = partial(their_prompt, twin, num_tokens, device)
            for name, make in runs.items():
                took = None
                with out_of_memory_is_a_result():
                    took = median_ms(make(), device=device, num_rounds=arguments.rounds)
                line = Line(shape, name, num_tokens, took)
                if took is not None:
                    rate = operations / took / 1e9
                    share = rate / most.matrix_tflop_s if name.startswith("ours") else None
                    line = Line(shape, name, num_tokens, took, num_tokens / took * 1e3, rate, share)
                lines.append(line)
                _say(line)
    return lines


def kernels(shape: str, num_tokens: int, device: str, dtype: torch.dtype, num_rounds: int) -> dict[str, float]:
    """Chunked linear attention alone on one layer's shape; milliseconds by contender."""
    from dijiang_model.ops.triton.prefill import PrefillStep, chunk_outputs, states_before_chunks

    config = config_of(shape, "pure")
    heads, groups, size = config.num_heads, config.num_kv_heads, config.head_size
    kernel = LinearKernel(config, 0, torch.float32).to(device)
    for parameter in kernel.parameters():
        parameter.data.fill_(-0.01)
    kernel.prepare()
    phi_q = torch.rand(num_tokens, heads, size, device=device).to(dtype)
    phi_k, v = torch.rand(2, num_tokens, groups, size, device=device).to(dtype)
    positions = torch.arange(num_tokens, device=device)
    layout = PrefillLayout(positions, torch.ones(1, dtype=torch.int64, device=device), (num_tokens,))
    rotary = Rotary.at(positions, dims=config.rotary_dims, theta=config.rope_theta, dtype=torch.float32)
    step = StepLayout(0, positions, positions[:0], rotary, rotary, layout)
    state = LayerState(
        torch.zeros(2, groups, size, size, device=device), torch.zeros(2, groups, size, device=device), None, None
    )
    x = PrefillStep(phi_q, phi_k, v, kernel=kernel, step=step, state=state)
    out = torch.empty_like(phi_q)

    def ours() -> None:
        before, normalisers = states_before_chunks(x, phi_k, v)
        chunk_outputs(x, phi_k, phi_q, phi_k, v, before, normalisers, out)

    runs: dict[str, Run] = {"ours, with denominator": ours}
    if find_spec("fla") is not None:
        runs["flash-linear-attention"] = _flash_linear_attention(phi_q, phi_k, v, heads // groups)
    return interleaved_ms(runs, device=device, num_rounds=num_rounds)


def _flash_linear_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, num_repeats: int) -> Run:
    """Its chunked kernel for a scalar decay per head, without a denominator; grouped heads have to be repeated."""
    from fla.ops.simple_gla import chunk_simple_gla

    keys, values = (one.repeat_interleave(num_repeats, dim=1)[None] for one in (k, v))
    decay = torch.full((1, *q.shape[:2]), -0.01, device=q.device)
    return lambda: chunk_simple_gla(q[None], keys, values, g=decay, scale=1.0, output_final_state=True)


def draw(folder: Path, lines: Sequence[Line]) -> list[str]:
    """A PNG for each shape. Empty without matplotlib."""
    if not plots.is_available():
        return []
    files = []
    for shape in dict.fromkeys(line.shape for line in lines):
        own = [line for line in lines if line.shape == shape]
        lengths = sorted({line.num_tokens for line in own})
        speeds = {(line.name, line.num_tokens): line.tokens_per_s for line in own}
        names = dict.fromkeys(line.name for line in own)
        series = {name: [speeds.get((name, length)) for length in lengths] for name in names}
        path = folder / f"gpu-prefill-{shape}.png"
        plots.lines(path, title=f"Prefill, {shape}", x_label="tokens", x=lengths, panels={"tokens/s": series})
        files.append(path.name)
    return files


def _say(line: Line) -> None:
    told = [f"{line.shape:14}", f"{line.name:26}", f"{line.num_tokens:>7,} tokens"]
    if line.ms is None or line.tflop_s is None:
        told.append("out of memory")
    else:
        told += [f"{line.ms:10.2f} ms", f"{line.tokens_per_s:11,.0f} tokens/s", f"{line.tflop_s:7.1f} TFLOP/s"]
    if line.of_peak is not None:
        told.append(f"{line.of_peak:5.0%} of the matrix rate")
    print("  ".join(told), flush=True)


def arguments_of(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Prompts on a GPU.")
    parser.add_argument("--shapes", type=lambda text: text.split(","), default=["smollm2-135m", "pythia-2.8b"])
    parser.add_argument("--attention", type=lambda text: text.split(","), default=["pure", "hybrid"])
    parser.add_argument("--lengths", type=numbers, default=[512, 2048, 8192])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--no-hf", dest="hf", action="store_false")
    parser.add_argument("--tiny", action="store_true", help="a tiny model on a CPU: whether everything runs")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args(argv)
    if arguments.tiny:
        arguments.shapes, arguments.device, arguments.rounds, arguments.lengths = ["tiny"], "cpu", 1, [9]
    unknown = [name for name in arguments.shapes if name not in SHAPES]
    unknown += [name for name in arguments.attention if name not in ATTENTION]
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}; shapes are {', '.join(SHAPES)}, attention {', '.join(ATTENTION)}")
    return arguments


def main(argv: Sequence[str] | None = None) -> None:
    """Measures, prints tables, writes plots and results."""
    arguments = arguments_of(argv)
    dtype = torch.float32 if arguments.device == "cpu" else torch.bfloat16
    most = ceilings(arguments.device, dtype)
    print(f"{most.name}: copy {most.copy_gb_s:,.0f} GB/s, products {most.matrix_tflop_s:,.1f} TFLOP/s")
    lines = [line for shape in arguments.shapes for line in prompts(shape, arguments, most, dtype)]
    alone = []
    if find_spec("triton") is not None:
        for shape in arguments.shapes:
            for num_tokens in arguments.lengths:
                found = kernels(shape, num_tokens, arguments.device, dtype, arguments.rounds)
                alone.append({"shape": shape, "num_tokens": num_tokens, "ms": found})
                told = ", ".join(f"{name} {took:.3f} ms" for name, took in found.items())
                print(f"{shape:14}  one layer's linear attention  {num_tokens:>7,} tokens  {told}")
    arguments.out.mkdir(parents=True, exist_ok=True)
    result = {
        "benchmark": "gpu-prefill",
        "ceilings": asdict(most),
        "lines": [asdict(line) for line in lines],
        "kernels": alone,
        "plots": draw(arguments.out, lines),
    }
    name = most.name.lower().replace(" ", "-")
    (arguments.out / f"gpu-prefill-{name}-{'-'.join(arguments.shapes)}.json").write_text(json.dumps(result, indent=1))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
