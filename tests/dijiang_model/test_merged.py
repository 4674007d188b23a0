"""Merged projections compute what they compute apart, under the same names and in the same memory."""

import pytest
import torch

from dijiang_model.checkpoints.quantized import quantize_
from dijiang_model.config import ModelConfig
from dijiang_model.merged import merge, products
from dijiang_model.quantization.config import INT8, Quantization
from dijiang_model.serving.network import merge_projections
from tests.dijiang_model.stepping import assert_close_in_norm, logits_of, random_text
from tests.tiny_models import gpt_neox_config, llama_config, opt_config, tiny_model

CONFIGS = {"llama": llama_config(), "opt": opt_config(), "fused already": gpt_neox_config()}
WEIGHTS = {
    "plain": None,
    "int8": INT8,
    "int4": Quantization("int4", group_size=32),
    "int4 with minimums": Quantization("int4", group_size=32, has_minimums=True),
}


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_a_model_says_the_same_with_merged_projections(config: ModelConfig, weights: str) -> None:
    quantization, text = WEIGHTS[weights], random_text(30)
    apart, together = (tiny_model(config) for _ in range(2))
    if quantization is not None:
        apart, together = (quantize_(model, quantization) for model in (apart, together))
    merge_projections(together)
    assert_close_in_norm(logits_of(together, text), logits_of(apart, text), tolerance=1e-6)
    names = apart.state_dict()
    assert all(torch.equal(names[name], tensor) for name, tensor in together.state_dict().items())
    assert together.num_parameters == apart.num_parameters


def test_weights_take_no_second_memory_and_products_are_one() -> None:
    model = tiny_model()
    merge_projections(model)
    attention = model.blocks[0].self_attn
    joint = attention.q_proj.together.weight
    merge_projections(model)
    assert attention.q_proj.together.weight is joint
    assert joint.untyped_storage().data_ptr() == attention.v_proj.weight.untyped_storage().data_ptr()
    q, k, v = products(torch.randn(3, 64), attention.q_proj, attention.k_proj, attention.v_proj)
    assert q.untyped_storage().data_ptr() == v.untyped_storage().data_ptr()
    assert [one.shape[1] for one in (q, k, v)] == [64, 32, 32]


def test_projections_of_different_kinds_stay_apart() -> None:
    linears = [torch.nn.Linear(8, 6, bias=bias) for bias in (True, False)]
    assert not merge(linears, None)
    assert [one.shape[1] for one in products(torch.randn(2, 8), *linears)] == [6, 6]
