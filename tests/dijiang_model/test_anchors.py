"""Networks with anchors in torch: against the reference, whatever the cuts, the neighbours and the slots."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dijiang_model import reference
from dijiang_model.config import AttentionConfig, FeatureConfig, ModelConfig
from dijiang_model.model import DiJiangForCausalLM
from dijiang_model.ops.torch.rounding import packed_nibbles, unpacked_nibbles
from tests.dijiang_model.stepping import Stepper, assert_close_in_norm, assert_states_close, logits_of, random_text
from tests.tiny_models import (
    CONSTANT,
    HYBRID,
    NO_LINEAR,
    anchored,
    gpt_neox_config,
    llama_config,
    opt_config,
    random_tensors,
    tiny_model,
)

RANKED = replace(HYBRID, features=FeatureConfig(scale=0.5, far_rank=3, bases=("dct2", "dct4")))
FEWER = replace(HYBRID, features=FeatureConfig(scale=0.5, bases=("dct2", "dct4"), rotated=False, width=16))
UNROTATED = replace(HYBRID, features=FeatureConfig(scale=0.5, nodes="signed_sphere", rotated=False))


def neox(*layers: AttentionConfig) -> ModelConfig:
    return replace(gpt_neox_config(*layers), position_table_length=0)


CONFIGS = {
    "llama": llama_config(anchored(2), HYBRID, anchored(2, base=UNROTATED)),
    "ranked": llama_config(anchored(4, base=RANKED), num_heads=4, num_kv_heads=4),
    "gpt_neox": neox(anchored(3), anchored(3, base=UNROTATED)),
    "opt": opt_config(anchored(3), anchored(3)),
    "values of 4 bits": llama_config(anchored(2, value_bits=4), anchored(2, base=UNROTATED, value_bits=4)),
    "fewer features, or none": llama_config(
        anchored(2, base=FEWER), anchored(2, base=NO_LINEAR, value_bits=4), anchored(2, base=CONSTANT)
    ),
    "opt_350m": opt_config(anchored(3), pre_norm=False, embedding_size=32),
}


@pytest.fixture(params=list(CONFIGS))
def config(request: pytest.FixtureRequest) -> ModelConfig:
    return CONFIGS[request.param]


def torch_model(config: ModelConfig, dtype: torch.dtype = torch.float64) -> DiJiangForCausalLM:
    return tiny_model(config, dtype=dtype)


@pytest.mark.parametrize("form", ["parallel", "recurrent", "chunked"])
def test_a_prompt_is_what_the_reference_says(config: ModelConfig, form: reference.network.Form) -> None:
    text = random_text(61)
    if form == "chunked":  # a plain window has no such form
        config = replace(config, layers=tuple(layer for layer in config.layers if layer.anchors is not None))
    _, expected = reference.forward(config, random_tensors(config), text, form=form)
    assert_close_in_norm(logits_of(torch_model(config), text), expected, tolerance=1e-10)


def test_tokens_one_by_one_leave_the_logits_and_the_state_of_one_prompt(config: ModelConfig) -> None:
    text, model = random_text(61), torch_model(config)
    whole, single = Stepper(model).open(1), Stepper(model).open(3)
    logits = whole.step({1: text})[1]
    decoded = torch.cat([single.step(decode={3: token})[3] for token in text])
    assert_close_in_norm(decoded, logits, tolerance=1e-10)
    assert_states_close(single.state(3), whole.state(1), tolerance=1e-10)


def test_in_single_precision_prompts_and_tokens_agree(config: ModelConfig) -> None:
    text, model = random_text(61), torch_model(config, torch.float32)
    single = Stepper(model).open(1)
    decoded = torch.cat([single.step(decode={1: token})[1] for token in text])
    assert_close_in_norm(decoded, logits_of(model, text), tolerance=1e-4)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(cuts=st.lists(st.integers(1, 5), min_size=1, max_size=40), neighbour=st.integers(0, 7))
def test_any_cut_beside_any_neighbour_leaves_the_same_sets_and_logits(cuts: list[int], neighbour: int) -> None:
    config = CONFIGS["llama"]
    text, model = random_text(sum(cuts)), torch_model(config)
    alone, cut = Stepper(model).open(2), Stepper(model).open(2, 4)
    expected = alone.step({2: text})[2]
    found, start = [], 0
    for i, length in enumerate(cuts):
        piece = text[start : start + length]
        start += length
        if length == 1 and i % 2 == 0:
            found.append(cut.step({4: random_text(neighbour + 1, seed=i)}, decode={2: piece[0]}, num_padding=1)[2])
        else:
            found.append(cut.step({2: piece}, decode={4: 7}, num_padding=neighbour % 3)[2])
    assert_close_in_norm(torch.cat(found), expected, tolerance=1e-10)
    assert_states_close(cut.state(2), alone.state(2), tolerance=1e-10)


def sets_of(state: dict[str, Tensor], config: ModelConfig, layer: int) -> list[set[int]]:
    """Positions of each head's anchors."""
    own = config.layers[layer]
    assert own.anchors is not None
    positions = state[f"layers.{layer}.near_positions"].split(list(own.anchors.places))
    return [
        set(head[own.sinks + window :].tolist()) for head, window in zip(positions, own.anchors.windows, strict=True)
    ]


def test_priorities_decide_who_stays() -> None:
    config = CONFIGS["llama"]
    model = torch_model(config)
    stepper = Stepper(model).open(1)
    stepper.step({1: random_text(200)})
    first, second = sets_of(stepper.state(1), config, 0)
    assert second == set(), "seven places are two sinks and a window of five"
    assert len(first) == 7
    assert first != set(range(189, 196)), "the youngest are not the ones of the highest priority"


def test_scores_of_zero_that_age_are_the_plain_window_of_as_many_places() -> None:
    plain = llama_config(replace(HYBRID, window=11))
    base = anchored(2)
    assert base.anchors is not None
    aging = replace(base, window=4, anchors=replace(base.anchors, places=(13, 13), windows=(4, 4), age=1.0))
    model, control = torch_model(llama_config(aging)), tiny_model(plain).keep_states_in(torch.int8)
    tensors = random_tensors(llama_config(aging))
    for name in tensors:
        if "priority" in name:
            tensors[name].zero_()
    model = torch_model(llama_config(aging), torch.float32)
    model.load_state_dict(tensors, strict=True)
    control.load_state_dict({name: tensor for name, tensor in tensors.items() if "priority" not in name}, strict=True)
    text = random_text(60)
    # The control keeps its sums in bf16, rounded at random.
    expected = logits_of(control.prepare(), text)
    assert_close_in_norm(logits_of(model.prepare(), text), expected, tolerance=2e-3)


def test_a_disabled_linear_part_leaves_softmax_over_what_is_held(config: ModelConfig) -> None:
    """Places for the whole text: what full attention says, but for int8."""
    layers = tuple(
        replace(layer, anchors=None if layer.anchors is None else replace(layer.anchors, places=(100,) * heads))
        for layer, heads in ((layer, config.num_kv_heads) for layer in config.layers)
    )
    roomy = replace(config, layers=layers)
    tensors = random_tensors(roomy)
    for name in tensors:
        if name.endswith("mix_bias"):
            tensors[name].fill_(-torch.inf)
    model = torch_model(roomy)
    model.load_state_dict({name: tensor.double() for name, tensor in tensors.items()}, strict=True)
    text = random_text(80)
    _, expected = reference.forward(roomy, tensors, text)
    assert_close_in_norm(logits_of(model.prepare(), text), expected, tolerance=1e-10)


def test_places_are_a_quarter_of_fp32_and_cost_144_bytes_at_64_channels() -> None:
    config = replace(llama_config(anchored(2)), head_size=64, rotary_dims=64)
    spec = torch_model(config, torch.float32).state_spec
    near = sum(t.num_bytes for t in spec.tensors if ".near_" in t.name)
    assert near == 20 * 144


def test_values_of_4_bits_save_32_bytes_a_place_and_come_back_from_their_bytes() -> None:
    config = replace(llama_config(anchored(2, value_bits=4)), head_size=64, rotary_dims=64)
    near = sum(t.num_bytes for t in torch_model(config, torch.float32).state_spec.tensors if ".near_" in t.name)
    assert near == 20 * 112
    assert config.layers[0].anchors is not None
    assert config.layers[0].anchors.place_bytes(64) == 112
    codes = torch.randint(-7, 8, (5, 3, 16), dtype=torch.int8)
    assert torch.equal(unpacked_nibbles(packed_nibbles(codes)), codes)


def test_what_states_are_kept_in_does_not_change_places(config: ModelConfig) -> None:
    kinds = {}
    for dtype in (torch.float32, torch.bfloat16, torch.int8):
        model = tiny_model(config).keep_states_in(dtype)
        index = next(i for i, layer in enumerate(config.layers) if layer.anchors is not None)
        kinds[dtype] = [t for t in model.state_spec.tensors if t.name.startswith(f"layers.{index}.near")]
    assert kinds[torch.float32] == kinds[torch.bfloat16] == kinds[torch.int8]
