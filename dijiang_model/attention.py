"""What both families' attention modules share: the kernel's parameters, the read-out, the state's shape."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from dijiang_model.config import AnchorConfig, ModelConfig
from dijiang_model.kernel import LinearKernel
from dijiang_model.ops import AttentionOp, LayerState
from dijiang_model.ops.layout import StepLayout
from dijiang_model.ops.selection import gated_norm, grid_scores
from dijiang_model.state import StateBuffer, StateTensor


def state_dtype(weights_dtype: torch.dtype) -> torch.dtype:
    """fp32 for every storage dtype of weights; fp64 models (tests) keep fp64 states."""
    return torch.float64 if weights_dtype == torch.float64 else torch.float32


class DiJiangAttention(nn.Module):
    """Linear attention of one layer between the family's projections, which subclasses own.

    Parameters besides the family's: `linear` (see `LinearKernel`); with the `group_norm` read-out also
    `gate` (W_G) and `group_norm` over the concatenated heads, in head_size groups as released.
    """

    def __init__(self, config: ModelConfig, layer: int, *, dtype: torch.dtype) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        self.weights_dtype = dtype
        self.has_bf16_sums = False
        """Whether states are kept in bf16, all but the normaliser (`DiJiangForCausalLM.keep_states_in`)."""
        self.has_int8_window = False
        """Whether keys and values of the window are kept in int8, with a scale for each token and head."""
        self.linear = LinearKernel(config, layer, state_dtype(dtype))
        width = config.num_heads * config.head_size
        if self.read_out == "group_norm":
            self.gate = nn.Linear(config.hidden_size, width, bias=False, dtype=dtype)
            self.group_norm = nn.GroupNorm(config.head_size, width, dtype=dtype)

    @property
    def read_out(self) -> str:
        return self.config.layers[self.layer].read_out

    @property
    def anchors(self) -> AnchorConfig | None:
        return self.config.layers[self.layer].anchors

    def attend(
        self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, *, op: AttentionOp, layout: StepLayout, state: LayerState
    ) -> Tensor:
        """x [T, D] (normed input), q [T, H, d], k and v [T, G, d] -> [T, H * d] in x's dtype, before the output map."""
        if self.config.is_local(self.layer):
            assert layout.local is not None
            layout = layout.local
        if self.anchors is not None:
            weight, bias = self.linear.priority_weight, self.linear.priority_bias
            state = replace(state, token_scores=grid_scores(x, weight, bias, grid=self.anchors.grid))
        attended: Tensor = op(q, k, v, kernel=self.linear, layout=layout, state=state)
        if self.read_out == "group_norm":
            return gated_norm(attended, self.gate(x), self.group_norm)
        return attended.flatten(1).to(x.dtype)

    def state_tensors(self) -> tuple[StateTensor, ...]:
        """What one slot holds for this layer, in storage order."""
        config, attention = self.config, self.config.layers[self.layer]
        groups, head, features = config.num_kv_heads, config.head_size, config.num_features(self.layer)
        dtype = state_dtype(self.weights_dtype)
        near_dtype = self._near_dtype()
        linear_dtype = torch.bfloat16 if self.has_bf16_sums else dtype
        tensors = [StateTensor(self._name("linear_state"), (groups, features, head), linear_dtype)]
        if attention.read_out == "denominator":
            tensors.append(StateTensor(self._name("normaliser"), (groups, features), dtype))
        if attention.anchors is not None:
            tensors += self._place_tensors(attention.anchors)
        elif attention.window > 0:
            rows = (groups, attention.sinks + attention.window)
            near_dtype = torch.int8 if self.has_int8_window else near_dtype
            tensors += [
                StateTensor(self._name(name), (*rows, head), near_dtype) for name in ("near_keys", "near_values")
            ]
            if self.has_int8_window:
                scales = ("near_key_scales", "near_value_scales")
                tensors += [StateTensor(self._name(name), rows, torch.float32) for name in scales]
        return tuple(tensors)

    def _place_tensors(self, anchors: AnchorConfig) -> list[StateTensor]:
        """Of the places of all heads, in 8 bits (values perhaps in 4) whatever the rest of the state is kept in."""
        num_places, dtype = sum(anchors.places), state_dtype(self.weights_dtype)
        size = self.config.head_size
        values = ((num_places, size), torch.int8) if anchors.value_bits == 8 else ((num_places, size // 2), torch.uint8)
        scales = ("near_key_scales", "near_value_scales")
        return [
            StateTensor(self._name("near_keys"), (num_places, size), torch.int8),
            StateTensor(self._name("near_values"), *values),
            *(StateTensor(self._name(name), (num_places,), torch.float32) for name in scales),
            StateTensor(self._name("near_positions"), (num_places,), torch.int32),
            StateTensor(self._name("near_scores"), (num_places,), dtype),
            StateTensor(self._name("recent_scores"), (self.config.num_kv_heads, anchors.num_scores), dtype),
        ]

    def layer_state(self, buffer: StateBuffer) -> LayerState:
        """This layer's views into a buffer."""
        get = buffer.tensors.get
        return LayerState(
            linear_state=buffer.tensors[self._name("linear_state")],
            normaliser=get(self._name("normaliser")),
            near_keys=get(self._name("near_keys")),
            near_values=get(self._name("near_values")),
            near_key_scales=get(self._name("near_key_scales")),
            near_value_scales=get(self._name("near_value_scales")),
            near_positions=get(self._name("near_positions")),
            near_scores=get(self._name("near_scores")),
            recent_scores=get(self._name("recent_scores")),
        )

    def _near_dtype(self) -> torch.dtype:
        """Of the window: the weights' own, but fp32 beside bf16 weights on a CPU, whose kernels compute in fp32."""
        is_half = self.weights_dtype == torch.bfloat16 and self.linear.log_decay.device.type == "cpu"
        if self.weights_dtype == torch.float32 or is_half:
            return torch.bfloat16 if self.has_bf16_sums else torch.float32
        return self.weights_dtype

    def _name(self, tensor: str) -> str:
        return f"layers.{self.layer}.{tensor}"
