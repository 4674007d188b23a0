"""Random networks of all families, fed in random steps, against the naive forward pass."""

from dataclasses import replace

import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from dijiang_model import reference
from dijiang_model.config import AttentionConfig, FeatureConfig, ModelConfig
from tests.dijiang_model.stepping import Stepper, assert_close_in_norm, random_text
from tests.tiny_models import gpt_neox_config, llama_config, opt_config, random_tensors, tiny_network

FEATURES = st.builds(
    FeatureConfig,
    bases=st.sampled_from([("dct2",), ("dct4",), ("dct2", "dct4"), ("dct4", "dct2")]),
    normalisation=st.sampled_from(["softmax", "exp"]),
    scale=st.sampled_from([1.0, 0.5, 0.25]),
    far_rank=st.sampled_from([0, 0, 2]),
    rotated=st.booleans(),
)
MATRIX = FeatureConfig(bases=("matrix",), nodes="checkpoint")
HYBRIDS = st.builds(AttentionConfig, features=FEATURES, window=st.integers(1, 80), sinks=st.integers(0, 6))
PURES = st.builds(
    AttentionConfig,
    features=FEATURES | st.just(MATRIX),
    read_out=st.sampled_from(["denominator", "group_norm"]),
)
TABLES = st.just(AttentionConfig(features=MATRIX, read_out="group_norm", decay="table"))


@st.composite
def configs(draw: st.DrawFn) -> ModelConfig:
    family = draw(st.sampled_from(["llama", "gpt_neox", "opt"]))
    num_groups, num_per_group = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    head_size = draw(st.sampled_from([8, 16, 32]))
    layer = HYBRIDS | PURES if family == "llama" else HYBRIDS | PURES | TABLES
    layers = tuple(draw(st.lists(layer, min_size=1, max_size=3)))
    base = {"llama": llama_config, "gpt_neox": gpt_neox_config, "opt": opt_config}[family]()
    heads = num_groups * num_per_group
    assume(heads > 1 or all(one.read_out == "denominator" for one in layers))
    has_tables = any(one.decay == "table" for one in layers)
    return replace(
        base,
        hidden_size=heads * head_size,
        num_heads=heads,
        num_kv_heads=num_groups if family == "llama" else heads,
        head_size=head_size,
        rotary_dims={"llama": head_size, "gpt_neox": draw(st.sampled_from([2, 4, 8])), "opt": 0}[family],
        max_position_embeddings=draw(st.sampled_from([16, 64, 2048])),
        parallel_residual=family == "gpt_neox" and draw(st.booleans()),
        attention_bias=draw(st.booleans()),
        mlp_bias=draw(st.booleans()),
        tie_word_embeddings=draw(st.booleans()),
        activation=draw(st.sampled_from(["gelu", "gelu_new", "silu", "relu"])),
        layers=layers,
        position_table_length=40 if has_tables else 0,
    )


def feed(config: ModelConfig, steps: list[tuple[int, bool]], text: list[int], dtype: torch.dtype) -> Tensor:
    """Logits of the text in slot 2; each step is a segment's length and whether it is fed token by token."""
    stepper, begin, parts = Stepper(tiny_network(config, seed=7, dtype=dtype)).open(2), 0, []
    for length, by_token in steps:
        piece = text[begin : begin + length]
        begin += length
        if by_token:
            parts += [stepper.step(decode={2: token})[2] for token in piece]
        else:
            parts.append(stepper.step({2: piece})[2])
    return torch.cat(parts)


@settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(config=configs(), steps=st.lists(st.tuples(st.integers(1, 70), st.booleans()), min_size=1, max_size=3))
def test_random_network_fed_in_random_steps_equals_the_naive_pass(
    config: ModelConfig, steps: list[tuple[int, bool]]
) -> None:
    """Tolerances as in `test_model`: 1e-10 and 1e-5 of the norm, for roundings of 1e-16 and 6e-8."""
    text = random_text(sum(length for length, _ in steps))
    _, expected = reference.forward(config, random_tensors(config, seed=7), text)
    assert_close_in_norm(feed(config, steps, text, torch.float64), expected, tolerance=1e-10)
    assert_close_in_norm(feed(config, steps, text, torch.float32), expected, tolerance=1e-5)
