"""The attention operators against the naive forms: output and state, packed, grouped, in fp64 and fp32."""

from dataclasses import replace
from functools import cache
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from dijiang_model import reference
from dijiang_model.batch import PackedBatch
from dijiang_model.config import AttentionConfig, ModelConfig
from dijiang_model.model import DiJiangForCausalLM
from dijiang_model.ops import LayerState
from dijiang_model.ops.layout import PrefillLayout
from dijiang_model.ops.torch.linear import chunked, recurrent_step
from dijiang_model.reference import LinearState
from dijiang_model.reference.features import feature_map
from dijiang_model.reference.hybrid import HybridInputs
from dijiang_model.reference.network import _rotate as rotate
from dijiang_model.state import StateBuffer
from tests.dijiang_model.stepping import POISON, assert_close_in_norm
from tests.tiny_models import HYBRID, PURE, llama_config, tiny_model

LENGTHS = (1, 2, 63, 64, 65, 127, 130, 500)

TOLERANCES = {torch.float64: 1e-12, torch.float32: 3e-6}
"""Of the norm. Both run in the same dtype against fp64: a few roundings of 1e-16 or 6e-8 per term, which grow
with the exponents' length (64 decays of a chunk are summed before the exponential)."""


def random_linear(num_tokens: int, *, seed: int, per_token_decay: bool) -> dict[str, Tensor]:
    """H = 6 query heads on G = 3 groups, K = 8, V = 4; fp64."""
    random = torch.Generator().manual_seed(seed)
    decay_shape = (num_tokens, 3) if per_token_decay else (3,)
    return {
        "phi_q": torch.randn(num_tokens, 6, 8, generator=random, dtype=torch.float64).softmax(-1),
        "phi_k": torch.randn(num_tokens, 3, 8, generator=random, dtype=torch.float64).softmax(-1),
        "v": torch.randn(num_tokens, 3, 4, generator=random, dtype=torch.float64),
        "log_decay": -torch.rand(decay_shape, generator=random, dtype=torch.float64) / 5,
    }


def random_starts(num_sequences: int) -> list[LinearState]:
    random = torch.Generator().manual_seed(99)
    return [
        LinearState(
            torch.randn(3, 8, 4, generator=random, dtype=torch.float64),
            torch.rand(3, 8, generator=random, dtype=torch.float64),
        )
        for _ in range(num_sequences)
    ]


def packed(tensors: list[dict[str, Tensor]], name: str, dtype: torch.dtype) -> Tensor:
    x = tensors[0][name] if tensors[0][name].dim() == 1 else torch.cat([t[name] for t in tensors])
    return (x.unflatten(1, (3, 2)) if name == "phi_q" else x).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("per_token_decay", [False, True])
@pytest.mark.parametrize("lengths", [*((n,) for n in LENGTHS), (1, 130, 2, 64, 65, 1, 63, 127)])
def test_chunked_equals_its_twin(lengths: tuple[int, ...], per_token_decay: bool, dtype: torch.dtype) -> None:
    tensors = [random_linear(n, seed=i, per_token_decay=per_token_decay) for i, n in enumerate(lengths)]
    for one in tensors:
        one["log_decay"] = one["log_decay"] if per_token_decay else tensors[0]["log_decay"]
    starts = random_starts(len(lengths))
    result = chunked(
        *(packed(tensors, name, dtype) for name in ("phi_q", "phi_k", "v")),
        log_decay=packed(tensors, "log_decay", dtype),
        state=torch.stack([start.s for start in starts]).to(dtype),
        normaliser=torch.stack([start.z for start in starts]).to(dtype),
        layout=PrefillLayout(torch.zeros(sum(lengths), dtype=torch.int64), torch.arange(len(lengths)), lengths),
    )
    assert result.denominator is not None
    assert result.normaliser is not None
    numerators, denominators = result.numerator.split(lengths), result.denominator.split(lengths)
    for n, (one, start) in enumerate(zip(tensors, starts, strict=True)):
        one["log_decay"] = one["log_decay"].expand(lengths[n], -1)
        numerator, denominator, end = reference.recurrent(**one, state=start)
        for actual, expected in (
            (numerators[n].flatten(1, 2), numerator),
            (denominators[n].flatten(1, 2), denominator),
            (result.state[n], end.s),
            (result.normaliser[n], end.z),
        ):
            assert_close_in_norm(actual, expected, tolerance=TOLERANCES[dtype])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_recurrent_step_equals_its_twin(dtype: torch.dtype) -> None:
    """Five sequences side by side, 40 tokens each, against each one alone."""
    tensors = [random_linear(40, seed=i, per_token_decay=True) for i in range(5)]
    state, normaliser = torch.zeros(5, 3, 8, 4, dtype=dtype), torch.zeros(5, 3, 8, dtype=dtype)
    numerators = []
    for t in range(40):
        now = {name: torch.stack([one[name][t] for one in tensors]).to(dtype) for name in tensors[0]}
        result = recurrent_step(
            now["phi_q"].unflatten(1, (3, 2)),
            now["phi_k"],
            now["v"],
            log_decay=now["log_decay"],
            state=state,
            normaliser=normaliser,
        )
        assert result.normaliser is not None
        state, normaliser = result.state, result.normaliser
        numerators.append(result.numerator.flatten(1, 2))
    for n, one in enumerate(tensors):
        numerator, _, end = reference.recurrent(**one)
        assert_close_in_norm(torch.stack(numerators)[:, n], numerator, tolerance=TOLERANCES[dtype])
        assert_close_in_norm(state[n], end.s, tolerance=TOLERANCES[dtype])
        assert_close_in_norm(normaliser[n], end.z, tolerance=TOLERANCES[dtype])


@pytest.mark.parametrize("log_decay", [-1e-9, -30.0, -1e4])
def test_no_decay_overflows_over_many_chunks(log_decay: float) -> None:
    one = random_linear(300, seed=0, per_token_decay=False)
    layout = PrefillLayout(torch.arange(300), torch.zeros(1, dtype=torch.int64), (300,))
    result = chunked(
        *(packed([one], name, torch.float32) for name in ("phi_q", "phi_k", "v")),
        log_decay=torch.full((3,), log_decay),
        state=torch.zeros(1, 3, 8, 4),
        normaliser=None,
        layout=layout,
    )
    one["log_decay"] = torch.full((300, 3), log_decay, dtype=torch.float64)
    numerator, _, _ = reference.recurrent(**one)
    assert_close_in_norm(result.numerator.flatten(1, 2), numerator, tolerance=TOLERANCES[torch.float32])


# One layer's whole operator: rotation, features, window and linear part, state in its slot.


class OneLayer:
    """The operator of a one-layer grouped-query model on a sequence in slot 3, beside its naive twin."""

    def __init__(self, layer: AttentionConfig, num_tokens: int, *, dtype: torch.dtype) -> None:
        self.config: ModelConfig = llama_config(layer, num_heads=4, num_kv_heads=2)
        self.model: DiJiangForCausalLM = tiny_model(self.config, seed=5, dtype=dtype)
        self.attention = next(iter(self.model.attentions))
        self.buffer = StateBuffer(self.model.state_spec, 5)
        self.buffer.storage.fill_(POISON)
        self.buffer.storage[3].zero_()
        random = torch.Generator().manual_seed(1)
        self.q = torch.randn(num_tokens, 4, 16, generator=random, dtype=torch.float64)
        self.k, self.v = torch.randn(2, num_tokens, 2, 16, generator=random, dtype=torch.float64)
        self.dtype = dtype

    def run(self, begin: int, end: int, *, decode: bool) -> Tensor:
        """Tokens begin ... end - 1 in one call; [T, H, d]."""
        length = end - begin
        nothing = torch.zeros(0, dtype=torch.int64)
        batch = PackedBatch(
            nothing, torch.arange(begin, end), torch.tensor([3]), (length,), 1 if decode else 0, nothing
        )
        q, k, v = (x[begin:end].to(self.dtype) for x in (self.q, self.k, self.v))
        layout, state = self.model.step_layout(batch), self.attention.layer_state(self.buffer)
        return self.model.attention_op(q, k, v, kernel=self.attention.linear, layout=layout, state=state)

    def state(self) -> LayerState:
        return self.attention.layer_state(self.buffer)

    def twin(self) -> tuple[Tensor, LinearState, HybridInputs]:
        """Output [T, H, d], the linear state at the end, and what went in."""
        layer, own = self.config.layers[0], {n: t.double() for n, t in self.attention.linear.state_dict().items()}
        num_tokens = len(self.q)
        positions = [min(t, self.config.max_position_embeddings - 1) for t in range(num_tokens)]
        q_sink = rotate(self.config, self.q, positions)
        q, k = (rotate(self.config, x, range(num_tokens)) for x in (self.q, self.k))
        phi_q, phi_k = feature_map(q, layer.features, own), feature_map(k, layer.features, own)
        if layer.window == 0:
            decay = own["log_decay"].expand(num_tokens, -1)
            numerator, denominator, end = reference.recurrent(phi_q, phi_k, self.v, decay)
            empty = torch.zeros(0)
            inputs = HybridInputs(q, q_sink, k, self.v, phi_q, phi_k, empty, own["log_decay"])
            return numerator / denominator[:, :, None], end, inputs
        mix = own["mix_bias"] + (q * own["mix_weight"]).sum(-1)
        beta = phi_q.shape[-1] * mix.exp()
        inputs = HybridInputs(q, q_sink, k, self.v, phi_q, phi_k, beta, own["log_decay"])
        y, state = reference.hybrid_recurrent(inputs, window=layer.window, sinks=layer.sinks)
        return y, state.linear, inputs


SPLITS = {
    "prefill": lambda n: [(0, n, False)],
    "decode": lambda n: [(t, t + 1, True) for t in range(n)],
    "pieces of 7": lambda n: [(t, min(t + 7, n), False) for t in range(0, n, 7)],
    "prefill then decode": lambda n: [(0, n // 2, False)] * (n > 1) + [(t, t + 1, True) for t in range(n // 2, n)],
    "decode then prefill": lambda n: [(0, 1, True)] + [(1, n, False)] * (n > 1),
    "thirds": lambda n: [(a, b, False) for a, b in pairwise((0, n // 3, n // 2 + 1, n)) if a < b],
}

LAYERS = {
    "pure": PURE,
    "window 5+2": HYBRID,
    "window 1": replace(HYBRID, window=1, sinks=0),
    "window 60+4": replace(HYBRID, window=60, sinks=4),
    "window 3, more sinks than that": replace(HYBRID, window=3, sinks=9),
    "window 70, two bases": replace(HYBRID, window=70, features=replace(HYBRID.features, bases=("dct2", "dct4"))),
}


@cache
def twin_of(layer: str, num_tokens: int) -> tuple[Tensor, LinearState, HybridInputs]:
    """Shared by all ways of splitting."""
    return OneLayer(LAYERS[layer], num_tokens, dtype=torch.float64).twin()


FEEDINGS = [(n, split) for n in (1, 65, 200) for split in SPLITS] + [
    (n, split) for n in (2, 63, 64, 127, 130) for split in ("prefill", "thirds", "prefill then decode")
]


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize(("num_tokens", "split"), FEEDINGS)
def test_layer_equals_its_twin_in_output_and_state(num_tokens: int, layer: str, split: str) -> None:
    """200 tokens pass the teacher's range of 128, beyond which sinks are scored with a capped rotation."""
    one = OneLayer(LAYERS[layer], num_tokens, dtype=torch.float64)
    output = torch.cat([one.run(begin, end, decode=decode) for begin, end, decode in SPLITS[split](num_tokens)])
    expected, end, inputs = twin_of(layer, num_tokens)
    assert_close_in_norm(output, expected, tolerance=1e-12)
    state = one.state()
    assert state.normaliser is not None
    assert_close_in_norm(state.linear_state[3], end.s, tolerance=1e-12)
    assert_close_in_norm(state.normaliser[3], end.z, tolerance=1e-12)
    assert_exact_rows(state, inputs, LAYERS[layer])


def assert_exact_rows(state: LayerState, inputs: HybridInputs, layer: AttentionConfig) -> None:
    """Sinks hold the first tokens, ring row t mod w token t, keys rotated."""
    if state.near_keys is None or state.near_values is None:
        assert layer.window == 0
        return
    num_tokens = len(inputs.k)
    held = {t: t for t in range(min(layer.sinks, num_tokens))}
    held |= {layer.sinks + t % layer.window: t for t in range(max(0, num_tokens - layer.window), num_tokens)}
    for row, t in held.items():
        torch.testing.assert_close(state.near_keys[3, :, row], inputs.k[t], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(state.near_values[3, :, row], inputs.v[t], rtol=0, atol=0)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("num_tokens", [1, 130, 500])
def test_layer_in_fp32_stays_near_its_fp64_twin(num_tokens: int, layer: str) -> None:
    """Scores of size 5 and feature exponents carry 6e-8 each; 1e-5 of the norm leaves room for their sums."""
    one = OneLayer(LAYERS[layer], num_tokens, dtype=torch.float32)
    cuts = sorted({0, num_tokens // 2, num_tokens})
    output = torch.cat([one.run(begin, end, decode=False) for begin, end in pairwise(cuts)])
    expected, end, _ = twin_of(layer, num_tokens)
    assert output.dtype == torch.float32
    assert_close_in_norm(output, expected, tolerance=1e-5)
    assert_close_in_norm(one.state().linear_state[3], end.s, tolerance=1e-5)


def test_layer_writes_its_own_slot_only() -> None:
    one = OneLayer(HYBRID, 20, dtype=torch.float32)
    before = one.buffer.storage.clone()
    one.run(0, 12, decode=False)
    one.run(12, 13, decode=True)
    others = [0, 1, 2, 4]
    assert torch.equal(one.buffer.storage[others], before[others])
