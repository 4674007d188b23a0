"""With a window longer than the text, a model is its softmax teacher: against HF's own networks."""

from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers import (
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
)

from dijiang_model.config import ModelConfig
from dijiang_model.families import build_model
from dijiang_model.model import DiJiangForCausalLM
from tests.dijiang_model.stepping import Stepper, assert_close_in_norm, logits_of, random_text
from tests.tiny_models import HYBRID, gpt_neox_config, llama_config, opt_config, random_tensors

TEXT = random_text(90)
TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-5}
"""Of the logits' norm. HF computes RoPE's angles, the softmax and RMSNorm in fp32 in every mode, so that a fp64
run of it is good to a few 1e-7 (the naive twins test fp64 tightly); in fp32 both sides round."""


def wide_open(config: ModelConfig, *, window: int = 90, sinks: int = 4) -> ModelConfig:
    """Every layer with one window and the features of the hybrid."""
    layer = replace(HYBRID, window=window, sinks=sinks)
    return replace(config, layers=(layer,) * 2, position_table_length=0, max_position_embeddings=128)


def llama_teacher(config: ModelConfig, dtype: torch.dtype) -> PreTrainedModel:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads,
            head_dim=config.head_size,
            max_position_embeddings=config.max_position_embeddings,
            rms_norm_eps=config.norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            tie_word_embeddings=config.tie_word_embeddings,
            attention_bias=config.attention_bias,
            mlp_bias=config.mlp_bias,
            attn_implementation="eager",
        )
    ).to(dtype)


def gpt_neox_teacher(config: ModelConfig, dtype: torch.dtype) -> PreTrainedModel:
    return GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            hidden_act=config.activation,
            max_position_embeddings=config.max_position_embeddings,
            layer_norm_eps=config.norm_eps,
            rope_parameters={
                "rope_type": "default",
                "rope_theta": config.rope_theta,
                "partial_rotary_factor": config.rotary_dims / config.head_size,
            },
            use_parallel_residual=config.parallel_residual,
            tie_word_embeddings=config.tie_word_embeddings,
            attention_bias=config.attention_bias,
            attention_dropout=0.0,
            hidden_dropout=0.0,
            attn_implementation="eager",
        )
    ).to(dtype)


def opt_teacher(config: ModelConfig, dtype: torch.dtype) -> PreTrainedModel:
    return OPTForCausalLM(
        OPTConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            ffn_dim=config.intermediate_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            max_position_embeddings=config.max_position_embeddings,
            activation_function=config.activation,
            do_layer_norm_before=config.pre_norm,
            word_embed_proj_dim=config.embedding_width,
            enable_bias=config.attention_bias,
            tie_word_embeddings=config.tie_word_embeddings,
            dropout=0.0,
            attention_dropout=0.0,
            attn_implementation="eager",
        )
    ).to(dtype)


TEACHERS = {"llama": llama_teacher, "gpt_neox": gpt_neox_teacher, "opt": opt_teacher}


def load_shared(teacher: PreTrainedModel, tensors: Mapping[str, Tensor]) -> None:
    """Everything but the DiJiang tensors; in memory HF calls every family's head `lm_head`."""
    shared = {name.replace("embed_out", "lm_head"): t for name, t in tensors.items() if ".linear." not in name}
    if "lm_head.weight" not in shared:
        shared["lm_head.weight"] = next(t for name, t in shared.items() if name.endswith("embed_tokens.weight"))
    teacher.load_state_dict(shared, strict=True)


def teacher_and_student(config: ModelConfig, dtype: torch.dtype) -> tuple[Tensor, DiJiangForCausalLM]:
    """The teacher's logits on TEXT, and the student with the same weights and random DiJiang tensors."""
    student = build_model(config, dtype=dtype)
    wanted = student.state_dict()
    tensors = {name: t.to(wanted[name].dtype) for name, t in random_tensors(config, seed=3).items()}
    student.load_state_dict(tensors, strict=True, assign=True)
    teacher = TEACHERS[config.family](config, dtype).eval()
    load_shared(teacher, tensors)
    with torch.no_grad():
        logits: Tensor = teacher(torch.tensor([TEXT])).logits[0]
    return logits, student.prepare()


CONFIGS = {
    "llama, grouped queries": llama_config(),
    "llama, one key-value head, biases, untied": replace(
        llama_config(num_kv_heads=1), tie_word_embeddings=False, attention_bias=True, mlp_bias=True
    ),
    "llama, a key-value head per head": llama_config(num_kv_heads=4),
    "gpt_neox, parallel residual": gpt_neox_config(),
    "gpt_neox, sequential residual": gpt_neox_config(parallel_residual=False),
    "gpt_neox, full rotary, no biases, tanh gelu": replace(
        gpt_neox_config(), rotary_dims=16, attention_bias=False, activation="gelu_new"
    ),
    "gpt_neox, gelu_fast": replace(gpt_neox_config(), activation="gelu_fast"),
    "opt, pre-norm": opt_config(),
    "opt, pre-norm, untied": replace(opt_config(), tie_word_embeddings=False),
    "opt, post-norm, embedding of its own width": opt_config(pre_norm=False, embedding_size=24),
}


ONE_OF_EACH = ["llama, grouped queries", "gpt_neox, parallel residual", "opt, pre-norm"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", CONFIGS)
def test_window_over_the_whole_text_is_the_softmax_teacher(name: str, dtype: torch.dtype) -> None:
    expected, student = teacher_and_student(wide_open(CONFIGS[name]), dtype)
    assert_close_in_norm(logits_of(student, TEXT), expected, tolerance=TOLERANCES[dtype])
    stepper = Stepper(student).open(1)
    decoded = [stepper.step({1: TEXT[:33]})[1], *(stepper.step(decode={1: token})[1] for token in TEXT[33:])]
    assert_close_in_norm(torch.cat(decoded), expected, tolerance=TOLERANCES[dtype])


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_window_and_sinks_split_differently_are_still_the_teacher(name: str) -> None:
    """A window of 50 and 40 sinks see all of 90 tokens too; the linear part is empty."""
    expected, student = teacher_and_student(wide_open(CONFIGS[name], window=50, sinks=40), torch.float64)
    assert_close_in_norm(logits_of(student, TEXT), expected, tolerance=TOLERANCES[torch.float64])


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_a_short_window_is_not_the_teacher_but_is_before_it_fills(name: str) -> None:
    expected, student = teacher_and_student(wide_open(CONFIGS[name], window=20, sinks=4), torch.float64)
    logits = logits_of(student, TEXT)
    assert_close_in_norm(logits[:24], expected[:24], tolerance=TOLERANCES[torch.float64])
    assert (logits[24:] - expected[24:]).norm() > 0.01 * expected[24:].norm()


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_silent_mixing_is_softmax_over_window_and_sinks(name: str) -> None:
    """mix_bias = -inf: HF's attention with the mask of window and sinks."""
    config = wide_open(CONFIGS[name], window=10, sinks=3)
    _, student = teacher_and_student(config, torch.float64)
    for attention in student.attentions:
        attention.linear.mix_bias.fill_(-torch.inf)
    teacher = TEACHERS[config.family](config, torch.float64).eval()
    load_shared(teacher, student.state_dict())
    i, j = torch.arange(90)[:, None], torch.arange(90)
    visible = (j <= i) & ((j < 3) | (j > i - 10))
    mask = torch.zeros(1, 1, 90, 90, dtype=torch.float64).masked_fill(~visible, -torch.inf)
    with torch.no_grad():
        expected = teacher(torch.tensor([TEXT]), attention_mask=mask, position_ids=j[None]).logits[0]
    assert_close_in_norm(logits_of(student, TEXT), expected, tolerance=TOLERANCES[torch.float64])
    stepper = Stepper(student).open(1)
    decoded = torch.cat([stepper.step(decode={1: token})[1] for token in TEXT])
    assert_close_in_norm(decoded, expected, tolerance=TOLERANCES[torch.float64])
