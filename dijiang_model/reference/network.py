"""Whole forward passes of GPT-NeoX, LLaMA and OPT with the reference attention, from a state dict."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import pi, sqrt
from typing import Literal

import torch
from torch import Tensor

from dijiang_model.config import AttentionConfig, ModelConfig
from dijiang_model.families import FAMILIES
from dijiang_model.paths import Paths
from dijiang_model.reference import anchors, hybrid, linear
from dijiang_model.reference.features import feature_map
from dijiang_model.reference.rounding import round_row_naive

Form = Literal["parallel", "chunked", "recurrent"]
Tensors = Mapping[str, Tensor]


CHUNK_SIZE = 7
"""Of the chunked form here: small and odd, so that every text has several and a ragged last one."""

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "gelu": lambda x: x * (1 + torch.erf(x / sqrt(2))) / 2,
    "gelu_new": lambda x: x * (1 + torch.tanh(sqrt(2 / pi) * (x + 0.044715 * x**3))) / 2,
    "gelu_fast": lambda x: x * (1 + torch.tanh(0.7978845608 * x * (1 + 0.044715 * x * x))) / 2,
    "gelu_pytorch_tanh": lambda x: x * (1 + torch.tanh(sqrt(2 / pi) * (x + 0.044715 * x**3))) / 2,
    "silu": lambda x: x / (1 + torch.exp(-x)),
    "relu": lambda x: x.clamp(min=0),
}


def forward(
    config: ModelConfig,
    tensors: Tensors,
    token_ids: Sequence[int],
    *,
    form: Form = "parallel",
    dtype: torch.dtype = torch.float64,
) -> tuple[list[Tensor], Tensor]:
    """One sequence from position 0.

    Args:
        tensors: the checkpoint's names (see `DiJiangForCausalLM.state_dict()`), any float dtype.
        form: how linear attention is computed; a layer with a window has no chunked form here.

    Returns:
        Hidden states, HF's order: the embeddings, each layer's output, the last one after the final
        norm, [T, D] each; and logits [T, vocab].
    """
    weights = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    paths = FAMILIES[config.family].paths
    x = _embed(config, weights, torch.tensor(token_ids, dtype=torch.int64))
    hidden = [x]
    for index, layer in enumerate(config.layers):
        part = _below(weights, f"{paths.layers}.{index}")
        x = _layer_of(paths)(_as_rotated(config, index), layer, part, x, form)
        hidden.append(x)
    if config.pre_norm:
        x = _norm(config, _below(weights, paths.final_norm), x)
    if config.embedding_width != config.hidden_size:
        x = x @ weights["model.decoder.project_out.weight"].T
    hidden[-1] = x
    return hidden, x @ weights[f"{paths.embedding if config.tie_word_embeddings else paths.head}.weight"].T


def greedy(
    config: ModelConfig, tensors: Tensors, prompt: Sequence[int], *, num_new: int, form: Form = "parallel"
) -> list[int]:
    """The prompt and its `num_new` greedy tokens, each from a whole forward pass."""
    token_ids = list(prompt)
    for _ in range(num_new):
        _, logits = forward(config, tensors, token_ids, form=form)
        token_ids.append(int(logits[-1].argmax()))
    return token_ids


def _embed(config: ModelConfig, weights: Tensors, token_ids: Tensor) -> Tensor:
    """[T, D]. OPT adds learned positions, the first in row 2, and beyond its trained range the last one."""
    x = weights[f"{FAMILIES[config.family].paths.embedding}.weight"][token_ids] * config.embedding_scale
    if config.embedding_width != config.hidden_size:
        x = x @ weights["model.decoder.project_in.weight"].T
    if "model.decoder.embed_positions.weight" in weights:
        rows = [2 + min(t, config.max_position_embeddings - 1) for t in range(len(token_ids))]
        x = x + weights["model.decoder.embed_positions.weight"][rows]
    return x


def _below(tensors: Tensors, prefix: str) -> dict[str, Tensor]:
    return {name[len(prefix) + 1 :]: t for name, t in tensors.items() if name.startswith(prefix + ".")}


def _norm(config: ModelConfig, part: Tensors, x: Tensor) -> Tensor:
    """LayerNorm where there is a bias, else RMSNorm."""
    if "bias" in part:
        x = x - x.mean(dim=-1, keepdim=True)
    root = (x.square().mean(dim=-1, keepdim=True) + config.norm_eps).sqrt()
    normed = x / root * (part["weight"] + config.norm_offset)
    return normed + part["bias"] if "bias" in part else normed


def _dense(part: Tensors, name: str, x: Tensor) -> Tensor:
    y = x @ part[f"{name}.weight"].T
    return y + part[f"{name}.bias"] if f"{name}.bias" in part else y


def _as_rotated(config: ModelConfig, index: int) -> ModelConfig:
    """The network whose frequencies are those of one layer."""
    if config.local_layers is None or not config.is_local(index):
        return config
    return replace(config, rope_theta=config.local_layers.rope_theta, rope_scaling=None)


def _gemma_layer(config: ModelConfig, layer: AttentionConfig, part: Tensors, x: Tensor, form: Form) -> Tensor:
    attention, mlp = _below(part, "self_attn"), _below(part, "mlp")
    normed = _norm(config, _below(part, "input_layernorm"), x)
    q, k, v = (_dense(attention, f"{name}_proj", normed).view(x.shape[0], -1, config.head_size) for name in "qkv")
    q = config.query_scale * _norm(config, _below(attention, "q_norm"), q)
    k = _norm(config, _below(attention, "k_norm"), k)
    attended = _dense(attention, "o_proj", _attention(config, layer, attention, q, k, v, normed=normed, form=form))
    x = x + _norm(config, _below(part, "post_attention_layernorm"), attended)
    normed = _norm(config, _below(part, "pre_feedforward_layernorm"), x)
    activated = ACTIVATIONS[config.activation](_dense(mlp, "gate_proj", normed))
    grown = _dense(mlp, "down_proj", activated * _dense(mlp, "up_proj", normed))
    return x + _norm(config, _below(part, "post_feedforward_layernorm"), grown)


def _olmo_layer(config: ModelConfig, layer: AttentionConfig, part: Tensors, x: Tensor, form: Form) -> Tensor:
    attention, mlp = _below(part, "self_attn"), _below(part, "mlp")
    heads = (x.shape[0], -1, config.head_size)
    q, k = (_norm(config, _below(attention, f"{i}_norm"), _dense(attention, f"{i}_proj", x)).view(heads) for i in "qk")
    v = _dense(attention, "v_proj", x).view(heads)
    attended = _dense(attention, "o_proj", _attention(config, layer, attention, q, k, v, normed=x, form=form))
    x = x + _norm(config, _below(part, "post_attention_layernorm"), attended)
    activated = ACTIVATIONS[config.activation](_dense(mlp, "gate_proj", x))
    grown = _dense(mlp, "down_proj", activated * _dense(mlp, "up_proj", x))
    return x + _norm(config, _below(part, "post_feedforward_layernorm"), grown)


def _llama_layer(config: ModelConfig, layer: AttentionConfig, part: Tensors, x: Tensor, form: Form) -> Tensor:
    attention, mlp = _below(part, "self_attn"), _below(part, "mlp")
    normed = _norm(config, _below(part, "input_layernorm"), x)
    q, k, v = (_dense(attention, f"{name}_proj", normed).view(x.shape[0], -1, config.head_size) for name in "qkv")
    if config.qk_norm:
        q, k = _norm(config, _below(attention, "q_norm"), q), _norm(config, _below(attention, "k_norm"), k)
    x = x + _dense(attention, "o_proj", _attention(config, layer, attention, q, k, v, normed=normed, form=form))
    normed = _norm(config, _below(part, "post_attention_layernorm"), x)
    activated = ACTIVATIONS[config.activation](_dense(mlp, "gate_proj", normed))
    return x + _dense(mlp, "down_proj", activated * _dense(mlp, "up_proj", normed))


def _neox_layer(config: ModelConfig, layer: AttentionConfig, part: Tensors, x: Tensor, form: Form) -> Tensor:
    attention, mlp = _below(part, "attention"), _below(part, "mlp")
    normed = _norm(config, _below(part, "input_layernorm"), x)
    fused = _dense(attention, "query_key_value", normed).view(-1, config.num_heads, 3, config.head_size)
    q, k, v = fused.unbind(dim=2)
    attended = _dense(attention, "dense", _attention(config, layer, attention, q, k, v, normed=normed, form=form))
    mlp_input = x if config.parallel_residual else x + attended
    normed = _norm(config, _below(part, "post_attention_layernorm"), mlp_input)
    grown = ACTIVATIONS[config.activation](_dense(mlp, "dense_h_to_4h", normed))
    return x + attended + _dense(mlp, "dense_4h_to_h", grown)


def _opt_layer(config: ModelConfig, layer: AttentionConfig, part: Tensors, x: Tensor, form: Form) -> Tensor:
    """Norms before attention and MLP, or (350M) after their residuals."""
    attention = _below(part, "self_attn")
    norms = [_below(part, name) for name in ("self_attn_layer_norm", "final_layer_norm")]
    read = _norm(config, norms[0], x) if config.pre_norm else x
    q, k, v = (_dense(attention, f"{name}_proj", read).view(x.shape[0], -1, config.head_size) for name in "qkv")
    x = x + _dense(attention, "out_proj", _attention(config, layer, attention, q, k, v, normed=read, form=form))
    x = x if config.pre_norm else _norm(config, norms[0], x)
    read = _norm(config, norms[1], x) if config.pre_norm else x
    x = x + _dense(part, "fc2", ACTIVATIONS[config.activation](_dense(part, "fc1", read)))
    return x if config.pre_norm else _norm(config, norms[1], x)


def _layer_of(paths: Paths) -> Callable[[ModelConfig, AttentionConfig, Tensors, Tensor, Form], Tensor]:
    if paths.attention_output_norm is not None:
        return _olmo_layer if paths.input_norm is None else _gemma_layer
    if paths.mlp_gate is not None:
        return _llama_layer
    return _neox_layer if paths.key is None else _opt_layer


def _rotate(config: ModelConfig, x: Tensor, positions: Sequence[int]) -> Tensor:
    """RoPE on the first `rotary_dims` channels of each head, channel c paired with c + rotary_dims / 2."""
    half = config.rotary_dims // 2
    rotated = x.clone()
    for c in range(half):
        angle = _angles(config, positions, c)[:, None]
        cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        rotated[:, :, c] = x[:, :, c] * cos - x[:, :, c + half] * sin
        rotated[:, :, c + half] = x[:, :, c + half] * cos + x[:, :, c] * sin
    return rotated


def _angles(config: ModelConfig, positions: Sequence[int], channel: int) -> Tensor:
    """By how much RoPE turns a channel at each position, in radians: fp64 in every mode. [T]."""
    frequency = config.frequencies[channel]
    return torch.tensor([position * frequency for position in positions], dtype=torch.float64)


def _attention(
    config: ModelConfig,
    layer: AttentionConfig,
    part: Tensors,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    normed: Tensor,
    form: Form,
) -> Tensor:
    """What replaces softmax attention, before the output projection: [T, H * d]."""
    positions = range(q.shape[0])
    own = _below(part, "linear")
    q_linear = q
    if layer.features.far_rank > 0:
        low = q.flatten(1) @ own["far_query_down"].T  # [T, rank]
        q_linear = q + (low @ own["far_query_up"].T).view_as(q)
    q_sink = _rotate(config, q, [min(t, config.last_sink_position) for t in positions])
    q_mix, k_linear = q, k
    q, k = _rotate(config, q, positions), _rotate(config, k, positions)
    if layer.anchors is not None:
        k, v = _rounded(k, 127), _rounded(v, 127 if layer.anchors.value_bits == 8 else 7)
        k_linear = _rotate(config, k, [-t for t in positions])
    if layer.features.rotated:
        q_mix, q_linear, k_linear = q, _rotate(config, q_linear, positions), k
    phi_q, phi_k = feature_map(q_linear, layer.features, own), feature_map(k_linear, layer.features, own)
    if layer.window > 0:
        mix = own["mix_bias"] + torch.einsum("thd,hd->th", q_mix, own["mix_weight"])
        beta = phi_q.shape[-1] * mix.exp()
        inputs = hybrid.HybridInputs(q, q_sink, k, v, phi_q, phi_k, beta, own["log_decay"])
        if layer.anchors is not None:
            return _anchored(layer, own, inputs, normed, form=form)
        if form == "parallel":
            return hybrid.hybrid_parallel(inputs, window=layer.window, sinks=layer.sinks).flatten(1)
        assert form == "recurrent", "a layer with a window has no chunked reference"
        return hybrid.hybrid_recurrent(inputs, window=layer.window, sinks=layer.sinks)[0].flatten(1)
    attended = _linear_attention(layer, own, phi_q, phi_k, v, form=form)
    if layer.read_out == "denominator":
        return attended.flatten(1)
    gate, scale, shift = normed @ part["gate.weight"].T, part["group_norm.weight"], part["group_norm.bias"]
    return linear.group_norm_gate(attended, gate, weight=scale, bias=shift, num_groups=config.head_size)


def _anchored(
    layer: AttentionConfig, own: Tensors, inputs: hybrid.HybridInputs, normed: Tensor, *, form: Form
) -> Tensor:
    """[T, H * d] of a layer with anchors."""
    config = layer.anchors
    assert config is not None
    limits = tuple(p - w - layer.sinks for p, w in zip(config.places, config.windows, strict=True))
    rules = anchors.AnchorRules(layer.sinks, config.windows, limits, config.age, config.span)
    scores = anchors.token_scores(normed, own["priority_weight"], own["priority_bias"], grid=config.grid)
    if form == "parallel":
        return anchors.anchored_parallel(inputs, scores, rules).flatten(1)
    if form == "recurrent":
        return anchors.anchored_recurrent(inputs, scores, rules)[0].flatten(1)
    state, parts = None, []
    for start in range(0, len(scores), CHUNK_SIZE):
        stop = min(start + CHUNK_SIZE, len(scores))
        y, state = anchors.anchored_chunk(inputs.rows(start, stop), scores[start:stop], rules, state=state)
        parts.append(y)
    return torch.cat(parts).flatten(1)


def _rounded(x: Tensor, largest_code: int) -> Tensor:
    """Rows [T, G, d] as places hold them."""
    rows = [round_row_naive(row, largest_code) for row in x.flatten(0, 1).tolist()]
    return torch.stack([torch.tensor(codes, dtype=x.dtype) * scale for codes, scale in rows]).view_as(x)


def _linear_attention(
    layer: AttentionConfig, own: Tensors, phi_q: Tensor, phi_k: Tensor, v: Tensor, *, form: Form
) -> Tensor:
    """[T, H, V], divided by the denominator where the layer has one."""
    log_decay = own["log_decay"].expand(phi_q.shape[0], -1)
    if layer.decay == "table":
        tables = {"read_table": own["read_table"], "write_table": own["write_table"], "log_decay": own["log_decay"]}
        if form == "parallel":
            assert layer.read_out == "group_norm", "the released tables have no denominator"
            return linear.position_table_parallel(phi_q, phi_k, v, **tables)
        log_decay, write, read = linear.position_table_factors(**tables, num_tokens=phi_q.shape[0])
        phi_q, phi_k = phi_q * read[:, :, None], phi_k * write[:, :, None]
    if form == "parallel":
        numerator, denominator, _ = linear.parallel(phi_q, phi_k, v, log_decay)
    elif form == "chunked":
        numerator, denominator, _ = linear.chunked(phi_q, phi_k, v, log_decay, chunk_size=CHUNK_SIZE)
    else:
        numerator, denominator, _ = linear.recurrent(phi_q, phi_k, v, log_decay)
    return numerator / denominator[:, :, None] if layer.read_out == "denominator" else numerator
