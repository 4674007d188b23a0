"""Prompts on a GPU: ours in packed chunks, HF's with sdpa; and the linear-attention kernels beside other people's.

    python -m benchmarks.gpu.prefill --shapes llama-2-7b --attention pure --lengths 2048,8192,32768

True shapes, bf16, random weights, contenders in turn. `of_peak` is the operations of the prompt (projections, attention
as it is computed, one row of logits) over the time and the measured matrix rate. Ragged: the same number of tokens as
prompts of uneven lengths in one batch. The second table takes equal queries, keys and values and compares our chunked
kernels, grouped heads not repeated, with flash-linear-attention's `chunk_simple_gla`, if that package can be imported:
heads repeated for it, as it wants them. `--tiny` runs everything on a CPU, with TRITON_INTERPRET=1 in Triton's
interpreter. No HTTP package is needed. The last line is JSON.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch

from benchmarks.costs import step_costs
from benchmarks.gpu.command import (
    Journal,
    Line,
    attempt,
    draw,
    dtype_of,
    finish,
    introduce,
    numbers,
    parsed,
    parser_of,
)
from benchmarks.gpu.models import config_of, random_model, softmax_twin
from benchmarks.gpu.timing import Ceilings, ceilings, interleaved_ms, median_ms
from dijiang_model.batch import PackedBatch
from dijiang_model.kernel import LinearKernel
from dijiang_model.model import DiJiangForCausalLM
from dijiang_model.ops import LayerState
from dijiang_model.ops.layout import PrefillLayout, Rotary, StepLayout
from dijiang_model.state import StateBuffer

Run = Callable[[], object]
RAGGED = (0.5, 0.25, 0.13, 0.07, 0.05)
"""Shares of the tokens, longest first; the rest is one more prompt."""


@dataclass(frozen=True, slots=True)
class PromptLine(Line):
    """Prompts of so many tokens in all; `ms` None: `failure` says why; `of_peak` of ours alone."""

    num_tokens: int
    ms: float | None
    tokens_per_s: float | None = None
    tflop_s: float | None = None
    of_peak: float | None = None
    failure: str | None = None

    def told(self) -> list[str]:
        told = [f"{self.num_tokens:>7,} tokens"]
        if self.ms is None:
            return [*told, str(self.failure)]
        told.append(f"{self.ms:10.3f} ms")
        if self.tflop_s is not None:
            told += [f"{self.tokens_per_s:11,.0f} tokens/s", f"{self.tflop_s:7.1f} TFLOP/s"]
        if self.of_peak is not None:
            told.append(f"{self.of_peak:5.0%} of the matrix rate")
        return told


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


def prompts(shape: str, arguments: argparse.Namespace, most: Ceilings, journal: Journal[PromptLine]) -> None:
    """Whole networks."""
    for attention in arguments.attention:
        if journal.may_begin():
            _, failure = attempt(partial(_measure_ours, shape, attention, arguments, most, journal))
            if failure is not None:
                journal.add(PromptLine(shape, f"ours {attention}", 0, None, failure=failure))
    if arguments.hf and journal.may_begin():
        _, failure = attempt(partial(_measure_theirs, shape, arguments, most, journal))
        if failure is not None:
            journal.add(PromptLine(shape, "HF sdpa", 0, None, failure=failure))


def _measure_ours(
    shape: str, attention: str, arguments: argparse.Namespace, most: Ceilings, journal: Journal[PromptLine]
) -> None:
    model = random_model(config_of(shape, attention), device=arguments.device, dtype=dtype_of(arguments.device))
    for num_tokens in arguments.lengths:
        runs = {
            f"ours {attention}": partial(our_prompt, model, [num_tokens]),
            f"ours {attention}, ragged": partial(our_prompt, model, ragged(num_tokens)),
        }
        _measure(runs, shape, num_tokens, model, arguments, most, journal)


def _measure_theirs(shape: str, arguments: argparse.Namespace, most: Ceilings, journal: Journal[PromptLine]) -> None:
    config = config_of(shape, arguments.attention[0])
    model = random_model(config, device=arguments.device, dtype=dtype_of(arguments.device))
    twin = softmax_twin(model)
    for num_tokens in arguments.lengths:
        runs = {"HF sdpa": partial(their_prompt, twin, num_tokens, arguments.device)}
        _measure(runs, shape, num_tokens, model, arguments, most, journal)


def _measure(
    runs: Mapping[str, Callable[[], Run]],
    shape: str,
    num_tokens: int,
    model: DiJiangForCausalLM,
    arguments: argparse.Namespace,
    most: Ceilings,
    journal: Journal[PromptLine],
) -> None:
    operations = step_costs(model, num_rows=1, num_tokens=num_tokens).operations
    for name, make in runs.items():
        if journal.may_begin():
            took, failure = attempt(partial(_time, make, arguments.device, arguments.rounds))
            journal.add(_line(shape, name, num_tokens, took, failure, operations, most))


def _time(make: Callable[[], Run], device: str, num_rounds: int) -> float:
    return median_ms(make(), device=device, num_rounds=num_rounds)


def _line(
    shape: str, name: str, num_tokens: int, took: float | None, failure: str | None, operations: int, most: Ceilings
) -> PromptLine:
    if took is None:
        return PromptLine(shape, name, num_tokens, None, failure=failure)
    rate = operations / took / 1e9
    share = rate / most.matrix_tflop_s if name.startswith("ours") else None
    return PromptLine(shape, name, num_tokens, took, num_tokens / took * 1e3, rate, share)


def alone(shape: str, arguments: argparse.Namespace, journal: Journal[PromptLine]) -> None:
    """One layer's linear attention, by contender."""
    for num_tokens in arguments.lengths:
        if not journal.may_begin():
            continue
        work = partial(kernels, shape, num_tokens, arguments.device, dtype_of(arguments.device), arguments.rounds)
        times, failure = attempt(work)
        found = {"one layer": None} if times is None else times
        for name, took in found.items():
            journal.add(PromptLine(shape, f"kernels: {name}", num_tokens, took, failure=failure))


def kernels(shape: str, num_tokens: int, device: str, dtype: torch.dtype, num_rounds: int) -> dict[str, float]:
    """Chunked linear attention alone on one layer's shape; milliseconds by contender."""
    from dijiang_model.ops.triton.prefill import chunk_outputs, states_before_chunks
    from dijiang_model.ops.triton.prefill_step import ExactTokens, PrefillStep

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
    rotary = Rotary.at(positions, frequencies=config.frequencies, dtype=torch.float32)
    step = StepLayout(0, positions, positions[:0], rotary, rotary, layout)
    state = LayerState(
        torch.zeros(2, groups, size, size, device=device), torch.zeros(2, groups, size, device=device), None, None
    )
    x = PrefillStep(phi_q, phi_k, v, kernel=kernel, step=step, state=state)
    out, exact = torch.empty_like(phi_q), ExactTokens(phi_k, v, x.absent, x.absent)

    def ours() -> None:
        before, normalisers = states_before_chunks(x, phi_k, v)
        chunk_outputs(x, exact, phi_q, phi_k, v, before, normalisers, out)

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


def plotted(arguments: argparse.Namespace, lines: Sequence[PromptLine]) -> list[str]:
    """A PNG for each shape."""
    files = []
    for shape in dict.fromkeys(line.shape for line in lines):
        own = [line for line in lines if line.shape == shape and line.tokens_per_s is not None]
        lengths = sorted({line.num_tokens for line in own})
        speeds = {(line.name, line.num_tokens): line.tokens_per_s for line in own}
        names = dict.fromkeys(line.name for line in own)
        series = {name: [speeds.get((name, length)) for length in lengths] for name in names}
        title = f"Prefill, {shape}"
        files += draw(arguments, f"gpu-prefill-{shape}.png", title=title, x_label="tokens", x=lengths, series=series)
    return files


def arguments_of(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = parser_of("Prompts on a GPU.", num_rounds=10)
    parser.add_argument("--lengths", type=numbers, default=[512, 2048, 8192])
    return parsed(parser, argv, tiny={"lengths": [9]})


def main(argv: Sequence[str] | None = None) -> None:
    """Measures, prints tables, writes plots and results."""
    arguments = arguments_of(argv)
    most = ceilings(arguments.device, dtype_of(arguments.device))
    introduce(most)
    journal = Journal[PromptLine].of("gpu-prefill", arguments)
    for shape in arguments.shapes:
        prompts(shape, arguments, most, journal)
        if find_spec("triton") is not None:
            alone(shape, arguments, journal)
    finish(journal, arguments, most, {}, plotted(arguments, journal.lines))


if __name__ == "__main__":
    main()
