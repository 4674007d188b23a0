"""A model's tensors as the kernels want them: pointers to where they lie, and a few derived vectors.

Nothing large is copied: projections and embeddings are used in place, mapped files included.
"""

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from itertools import accumulate
from typing import cast

import torch
from torch import Tensor, nn

from dijiang_model.attention import DiJiangAttention
from dijiang_model.config import AnchorConfig, AttentionConfig, FeatureConfig
from dijiang_model.model import DiJiangForCausalLM
from dijiang_model.native import library, structures
from dijiang_model.ops.layout import Rotary
from dijiang_model.ops.torch.attention import TorchAttention
from dijiang_model.paths import Paths
from dijiang_model.quantization.modules import QuantizedEmbedding, QuantizedLinear
from dijiang_model.quantization.weight import QuantizedWeight

ACTIVATIONS: Mapping[str, int] = {
    "silu": 0,
    "gelu": 1,
    "gelu_new": 2,
    "gelu_fast": 2,
    "gelu_pytorch_tanh": 2,
    "relu": 3,
}
NUMBERS: Mapping[torch.dtype, int] = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}
"""How the kernels know the dtypes of a state's tensors."""
KERNEL_PARAMETERS = frozenset(
    {
        *("nodes", "log_weights", "projection", "log_decay", "read_table", "write_table"),
        *("far_query_down", "far_query_up", "mix_bias", "mix_weight", "priority_weight", "priority_bias"),
    }
)
KNOWN_SETTINGS = frozenset(
    {
        *("features", "read_out", "decay", "window", "sinks", "anchors"),
        *("bases", "normalisation", "scale", "nodes", "far_rank", "rotated", "width"),
    }
)
"""What the kernels compute of `AttentionConfig` and `FeatureConfig`; a setting added there is refused unless it
has its default, and so is a parameter that is not among `KERNEL_PARAMETERS`, until the kernels learn it."""
MAX_CODE_CHANNELS = 512
"""Of a head whose places are read in whole numbers: their sums have room in 32 bits."""
HEAD_SIZE_MULTIPLE = 16
"""Features and values are worked on in whole vectors, of up to 16 floats."""


def why_unsupported(model: DiJiangForCausalLM) -> str | None:
    """Why the kernels cannot run a model, in words; None if they can."""
    if model.device.type != "cpu":
        return f"the model is on {model.device.type}, not on a CPU"
    if model.dtype not in (torch.float32, torch.bfloat16):
        return f"weights are {model.dtype}, not float32 or bfloat16"
    if type(model.attention_op) is not TorchAttention:
        return f"attention is computed by {type(model.attention_op).__name__}"
    if model.config.head_size % HEAD_SIZE_MULTIPLE != 0:
        return f"head size {model.config.head_size} is no multiple of {HEAD_SIZE_MULTIPLE}"
    if not model.config.pre_norm or model.config.embedding_width != model.config.hidden_size:
        return "norms after the residuals and projected embeddings are not among the kernels"
    has_anchors = any(layer.anchors is not None for layer in model.config.layers)
    if has_anchors and model.config.head_size > MAX_CODE_CHANNELS:
        return f"head size {model.config.head_size} is more than {MAX_CODE_CHANNELS}, the most with anchors"
    for layer in model.config.layers:
        unknown = _unknown_settings(layer) | _unknown_settings(layer.features)
        if unknown:
            return f"the kernels do not know {', '.join(sorted(unknown))}"
    for attention in model.attentions:
        unknown = {name for name, _ in attention.linear.named_parameters()} - KERNEL_PARAMETERS
        if unknown:
            return f"the kernels do not know {', '.join(sorted(unknown))}"
    for block in model.blocks:
        for path in model.paths.projections:
            module = block.get_submodule(path)
            if type(module) not in (nn.Linear, QuantizedLinear):
                return f"{path} is a {type(module).__name__}"
            dtype = cast("Tensor | QuantizedWeight", module.weight).dtype
            if dtype != model.dtype:
                return f"{path} is {dtype}, and the output head {model.dtype}"
    return library.why_missing()


def _unknown_settings(config: AttentionConfig | FeatureConfig) -> set[str]:
    return {
        setting.name
        for setting in fields(config)
        if setting.name not in KNOWN_SETTINGS and getattr(config, setting.name) != setting.default
    }


@dataclass(slots=True)
class NetworkWeights:
    """A `structures.Network` and everything that its pointers need alive.

    Attributes:
        kept: what they point at, or a part of it.
    """

    network: structures.Network = field(default_factory=structures.Network)
    kept: list[object] = field(default_factory=list)

    def pointer(self, tensor: Tensor) -> int:
        """Address of a tensor's values, which stay alive with this object."""
        tensor = tensor.detach().contiguous()
        self.kept.append(tensor)
        return tensor.data_ptr()

    def floats(self, tensor: Tensor) -> int:
        """Address of a tensor's values in fp32: its own, or those of a copy."""
        if tensor.dtype == torch.float32:
            return self.pointer(tensor)
        return self.derived(tensor)

    def derived(self, tensor: Tensor) -> int:
        """Address of a fp32 copy of a value just computed."""
        tensor = tensor.detach().to(torch.float32).clone()
        self.kept.append(tensor)
        return tensor.data_ptr()

    def linear(self, module: nn.Module | None) -> structures.Matrix:
        """A projection of either kind; without one, a matrix of no rows."""
        if module is None:
            return structures.Matrix()
        if isinstance(module, QuantizedLinear):
            return self.codes(module.weight, module.bias)
        return self.matrix(cast(Tensor, module.weight), cast("Tensor | None", module.bias))

    def matrix(self, weight: Tensor, bias: Tensor | None = None) -> structures.Matrix:
        """fp32 or bf16 weights [rows, columns]."""
        return structures.Matrix(
            weight=self.pointer(weight) if weight.dtype == torch.float32 else None,
            halves=self.pointer(weight) if weight.dtype == torch.bfloat16 else None,
            bias=None if bias is None else self.floats(bias),
            rows=weight.shape[0],
            columns=weight.shape[1],
        )

    def codes(self, weight: QuantizedWeight, bias: Tensor | None = None) -> structures.Matrix:
        """Quantized weights."""
        self.kept += [weight, *weight.buffers()]
        return weight.matrix(None if bias is None else self.floats(bias))

    def norm(self, module: nn.Module, *, scale: float = 1.0) -> structures.Norm:
        """Layer norm, group norm, or RMS norm (which has no bias); its output times `scale`."""
        bias = getattr(module, "bias", None)
        weight, offset = cast(Tensor, module.weight), cast(float, getattr(module, "offset", 0.0))
        is_own = offset == 0 and scale == 1
        return structures.Norm(
            weight=self.floats(weight) if is_own else self.derived((weight.float() + offset) * scale),
            bias=None if bias is None else self.floats(bias),
            eps=cast(float, module.eps),
        )


@torch.no_grad()
def network_weights(model: DiJiangForCausalLM) -> NetworkWeights:
    """Describes a model that `why_unsupported` has nothing against."""
    config, weights = model.config, NetworkWeights()
    names = model.paths
    offsets = model.state_spec.offsets()
    layers = (structures.Layer * config.num_layers)(*(_layer(weights, block, names, offsets) for block in model.blocks))
    half = config.rotary_dims // 2
    frequencies = torch.tensor(config.frequencies, dtype=torch.float64)
    weights.kept += [layers, frequencies]
    network = weights.network
    network.layers = ctypes.cast(layers, ctypes.POINTER(structures.Layer))
    network.num_layers = config.num_layers
    head = model.head
    network.head = weights.codes(head) if isinstance(head, QuantizedWeight) else weights.matrix(head)
    network.final_norm = weights.norm(model.get_submodule(names.final_norm))
    network.heads = _heads(model, half)
    network.frequencies = frequencies.data_ptr()
    if config.local_layers is not None:
        local = torch.tensor(config.local_frequencies, dtype=torch.float64)
        weights.kept.append(local)
        network.local_frequencies = local.data_ptr()
    network.hidden_size, network.inner_size = config.hidden_size, config.intermediate_size
    network.last_sink_position = config.last_sink_position
    network.activation = ACTIVATIONS[config.activation]
    network.is_parallel = int(config.parallel_residual)
    return weights


def token_table(weights: NetworkWeights, model: DiJiangForCausalLM) -> structures.Matrix | None:
    """What the first block reads of each token; None where it is more than a row of the embedding, in fp32 or bf16."""
    if model.learns_positions or model.config.embedding_scale != 1:
        return None
    module = model.get_submodule(model.paths.embedding)
    if isinstance(module, QuantizedEmbedding):
        return weights.codes(module.weight) if module.weight.dtype == torch.float32 else None
    return weights.matrix(module.weight) if type(module) is nn.Embedding else None


def _heads(model: DiJiangForCausalLM, half: int) -> structures.Heads:
    config = model.config
    heads, groups, size = config.num_heads, config.num_kv_heads, config.head_size
    if model.paths.key is None:  # [H, 3, d]
        places = (0, 3 * size, size, 3 * size, 2 * size, 3 * size)
    else:  # queries, keys, values
        places = (0, size, heads * size, size, (heads + groups) * size, size)
    num_scores = groups if any(layer.anchors is not None for layer in config.layers) else 0
    width = (heads + 2 * groups) * size
    return structures.Heads(heads, groups, size, half, *places, width, num_scores)


def _layer(weights: NetworkWeights, block: nn.Module, names: "Paths", offsets: Mapping[str, int]) -> structures.Layer:
    attention = cast(DiJiangAttention, block.dijiang)

    def linear(path: str | None) -> structures.Matrix:
        return weights.linear(None if path is None else block.get_submodule(path))

    def norm(path: str | None) -> structures.Norm:
        return structures.Norm() if path is None else weights.norm(block.get_submodule(path))

    layer = structures.Layer(
        input_norm=norm(names.input_norm),
        mlp_norm=norm(names.mlp_norm),
        query=linear(names.query),
        key=linear(names.key),
        value=linear(names.value),
        output=linear(names.output),
        mlp_gate=linear(names.mlp_gate),
        mlp_up=linear(names.mlp_up),
        mlp_down=linear(names.mlp_down),
        attention=_attention(weights, attention, offsets),
    )
    if names.query_norm is not None and names.key_norm is not None:
        layer.query_norm = weights.norm(block.get_submodule(names.query_norm), scale=attention.config.query_scale)
        layer.key_norm = weights.norm(block.get_submodule(names.key_norm))
        layer.norms_all_heads = int(attention.config.norms_all_heads)
    if names.attention_output_norm is not None and names.mlp_output_norm is not None:
        layer.attention_output_norm = weights.norm(block.get_submodule(names.attention_output_norm))
        layer.mlp_output_norm = weights.norm(block.get_submodule(names.mlp_output_norm))
    layer.is_local = int(attention.config.is_local(attention.layer))
    if attention.linear.attention.features.far_rank > 0:
        layer.far_down = weights.matrix(attention.linear.far_query_down)
    if attention.anchors is not None:
        layer.priority = weights.matrix(attention.linear.priority_weight, attention.linear.priority_bias)
    if attention.read_out == "group_norm":
        layer.gate = weights.linear(attention.gate)
        layer.group_norm = weights.norm(attention.group_norm)
    return layer


def _attention(weights: NetworkWeights, module: DiJiangAttention, offsets: Mapping[str, int]) -> structures.Attention:
    kernel = module.linear
    config = kernel.attention
    kept = {tensor.name.rsplit(".", 1)[-1]: tensor for tensor in module.state_tensors()}
    place = {name: offsets[tensor.name] for name, tensor in kept.items()}
    if kernel.is_whole_projection:
        nodes, log_weights = kernel.ones, kernel.zeros
    else:
        nodes, log_weights = kernel.nodes, kernel.log_weights
    attention = structures.Attention(
        basis=weights.pointer(kernel.basis),
        nodes=weights.derived(nodes * config.features.scale),
        log_weights=weights.derived(log_weights),
        decay=weights.derived(kernel.log_decay.exp()),
        num_features=kernel.num_features,
        window=config.window,
        sinks=config.sinks,
        is_softmax=int(config.features.normalisation == "softmax"),
        has_denominator=int(config.read_out == "denominator"),
        exact_numbers=NUMBERS[kept["near_keys"].dtype] if config.window > 0 else 0,
        linear_numbers=NUMBERS[kept["linear_state"].dtype],
        state_offset=place["linear_state"],
        normaliser_offset=place.get("normaliser", -1),
        keys_offset=place.get("near_keys", -1),
        values_offset=place.get("near_values", -1),
        key_scales_offset=place.get("near_key_scales", -1),
        value_scales_offset=place.get("near_value_scales", -1),
        positions_offset=place.get("near_positions", -1),
        scores_offset=place.get("near_scores", -1),
        recent_offset=place.get("recent_scores", -1),
    )
    if config.features.far_rank > 0:
        up = kernel.far_query_up
        attention.far_up, attention.far_rank = weights.derived(up.T.contiguous()), up.shape[1]
    if config.anchors is not None:
        _add_places(attention, config.anchors, weights, module)
    elif config.window > 0:
        attention.late = weights.derived((kernel.log_decay * config.window).exp())
    if config.window > 0:
        attention.mix_bias = weights.pointer(kernel.mix_bias)
        attention.mix_weight = weights.pointer(kernel.mix_weight)
    if not config.features.rotated:
        model = module.config
        own = model.local_frequencies if model.is_local(module.layer) else model.frequencies
        late = Rotary.at(torch.tensor([config.window]), frequencies=own, dtype=torch.float32)
        attention.late_cos, attention.late_sin = weights.derived(late.cos), weights.derived(late.sin)
    if config.decay == "table":
        attention.decay = weights.derived(kernel.table_log_decay.exp())
        attention.table_write = weights.pointer(kernel.table_write)
        attention.table_read = weights.pointer(kernel.table_read)
        attention.table_entries = kernel.table_write.shape[0]
    return attention


def _add_places(
    attention: structures.Attention, anchors: AnchorConfig, weights: NetworkWeights, module: DiJiangAttention
) -> None:
    config = module.config
    first = torch.tensor([0, *accumulate(anchors.places)])
    own = config.local_frequencies if config.is_local(module.layer) else config.frequencies
    windows, frequencies = torch.tensor(anchors.windows), torch.tensor(own, dtype=torch.float64)
    weights.kept += [first, windows, frequencies]
    attention.first_place, attention.windows = first.data_ptr(), windows.data_ptr()
    attention.log_decay = weights.derived(module.linear.log_decay)
    attention.frequencies = frequencies.data_ptr()
    attention.age, attention.grid, attention.span = anchors.age, anchors.grid, anchors.span
    attention.value_bits = anchors.value_bits
