"""The fitted linear part is what a network with it computes, and lessens the error it is fitted to."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dijiang_model.config import ModelConfig
from dijiang_model.conversion.calibration.budgets import with_features
from dijiang_model.conversion.calibration.contexts import Recalled, random_contexts
from dijiang_model.conversion.calibration.linear_part import LinearFit, _Layer, fit_linear_parts
from dijiang_model.conversion.calibration.teacher_pass import teacher_layers
from dijiang_model.conversion.training.distill import output_weight
from dijiang_model.families import build_model
from dijiang_model.model import DiJiangForCausalLM
from dijiang_model.ops.residual import Residual
from dijiang_model.ops.training.attention import NO_STATE, HybridAttention, SoftmaxAttention
from dijiang_model.segments import segments_layout
from tests.tiny_models import HYBRID, anchored, gpt_neox_config, llama_config, opt_config, random_tensors, tiny_model

MADE = {"llama": llama_config, "gpt_neox": gpt_neox_config, "opt": opt_config}
CONFIGS: dict[str, ModelConfig] = {
    name: replace(made(HYBRID, HYBRID), position_table_length=0, max_position_embeddings=300)
    for name, made in MADE.items()
}


def placed(config: ModelConfig) -> ModelConfig:
    layer = anchored(config.num_kv_heads, base=HYBRID, places=(30, 20, 25))
    return with_features(replace(config, layers=(layer,) * config.num_layers), 1)


def fitted(config: ModelConfig, tensors: dict[str, Tensor], num: int = 10) -> list[LinearFit]:
    contexts = random_contexts(vocab_size=config.vocab_size, num=num, length=300, seed=0)
    contexts[1] = replace(contexts[1], recalled=(Recalled((20, 22), (200, 202)),))
    teacher = build_model(config, device="meta", dtype=torch.float32)
    done: list[int] = []
    fits = fit_linear_parts(teacher, tensors.__getitem__, contexts, placed(config), tensors, on_layer=done.append)
    assert done == [1, 2]
    return fits


def first_layer(model: DiJiangForCausalLM, ids: Tensor, op: object) -> Tensor:
    """What the first layer's attention answers, [T, H, d]."""
    seen: list[Tensor] = []

    class Stop(Exception):
        pass

    def keep(*given: Tensor, **rest: object) -> Tensor:
        seen.append(op(*given, **rest))  # type: ignore[operator]
        raise Stop

    layout = segments_layout(model, 1, len(ids))
    with pytest.raises(Stop):
        model.blocks[0](Residual(model.embed(ids, torch.arange(len(ids)))), op=keep, layout=layout, state=NO_STATE)
    return seen[0].view(len(ids), model.config.num_heads, -1)


@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_fitted_is_what_the_network_computes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dijiang_model.ops.training.attention.rounded", lambda x, bits=8: x)
    config = CONFIGS[name]
    tensors = random_tensors(placed(config))
    (fit, *_), prefix = fitted(config, tensors), tiny_model(config).paths.attention_of(0)
    assert (fit.saved >= 0).all()
    assert (fit.saved <= fit.without + 1e-9).all()
    scorer = (tensors[f"{prefix}.linear.priority_weight"], tensors[f"{prefix}.linear.priority_bias"])
    (context,) = random_contexts(vocab_size=config.vocab_size, num=1, length=300, seed=7)
    plain = tiny_model(config)
    plain.load_state_dict({key: tensors[key] for key in plain.state_dict() if ".linear." not in key}, strict=False)
    empty = build_model(config, device="meta", dtype=torch.float32)
    walk = teacher_layers(empty, tensors.__getitem__, [context.token_ids])
    attention, inputs = next(walk)
    layer = _Layer(placed(config), 0, scorer, output_weight(attention).clone())
    (read,) = inputs
    half_lives = (-torch.log(torch.tensor(2.0)) / fit.log_decay).round()
    rows = layer._rows(read, context)

    student = tiny_model(placed(config))
    learned = {
        f"{prefix}.linear.log_decay": fit.log_decay,
        f"{prefix}.linear.mix_bias": fit.mix_bias,
        f"{prefix}.linear.mix_weight": fit.mix_weight,
    }
    student.load_state_dict({**tensors, **learned}, strict=True)
    with torch.no_grad():
        error = first_layer(student, context.token_ids, HybridAttention())
        error = error - first_layer(plain.prepare(), context.token_ids, SoftmaxAttention())
    queries = torch.arange(2 + 7, 300, 10) if name != "llama" else torch.arange(2 + 5, 300, 10)
    for group in range(config.num_kv_heads):
        for r in range(config.num_heads // config.num_kv_heads):
            own = rows[group, r, float(half_lives[group])]
            head = group * (config.num_heads // config.num_kv_heads) + r
            change = own.change(fit.mix_weight[head].double(), fit.mix_bias[head].double())
            part = error[queries, head]
            metric = layer.metric[group, r]
            expected = (torch.einsum("nd,df,nf->n", part, metric, part) / read.energy[queries]).sum()
            torch.testing.assert_close(float(own.without.sum() + change), float(expected), rtol=1e-3, atol=1e-6)
