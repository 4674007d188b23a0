"""The network: packed variable-length input, recurrent state in slots, no padding, no maximum length."""

from abc import abstractmethod
from collections.abc import Iterable
from typing import ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from dijiang_model.attention import DiJiangAttention
from dijiang_model.batch import PackedBatch
from dijiang_model.config import ModelConfig
from dijiang_model.ops import AttentionOp
from dijiang_model.ops.layout import PrefillLayout, StepLayout
from dijiang_model.ops.residual import Residual
from dijiang_model.ops.selection import attention_for, step_angles
from dijiang_model.paths import Paths
from dijiang_model.quantization.config import Quantization
from dijiang_model.quantization.modules import quantized_weights
from dijiang_model.quantization.weight import QuantizedWeight
from dijiang_model.state import StateBuffer, StateSpec


class DiJiangForCausalLM(nn.Module):
    """A family's network with DiJiang attention; build one with `dijiang_model.families.build_model`.

    For training and evaluation; an engine gets a `serving.network.FrozenModel`. The state dict's names are the
    checkpoint's tensor names. After loading, `prepare()` derives what steps need. A slot must be zero before its
    first token (`StateBuffer.storage[slot].zero_()`).
    """

    paths: ClassVar[Paths]
    """Where the network keeps its parts."""
    learns_positions: ClassVar[bool] = False
    """Whether the first block reads more of a token than a row of the embedding."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self._attention_op: AttentionOp | None = None
        self._has_reduced_states = False
        self.quantization: Quantization | None = None
        """How weights are rounded (`checkpoints.quantized.install`); None: they are not."""

    @property
    @abstractmethod
    def blocks(self) -> nn.ModuleList:
        """The layers, first to last; each has `dijiang`, its attention."""

    @property
    @abstractmethod
    def head(self) -> Tensor | QuantizedWeight:
        """Output head, [vocab, D] (D: the embedding's width)."""

    @abstractmethod
    def embed(self, token_ids: Tensor, positions: Tensor) -> Tensor:
        """[T] and [T] int64 -> [T, hidden], what the first block reads."""

    @abstractmethod
    def finish(self, x: Residual) -> Tensor:
        """[T, hidden] of the last block -> [T, D], what the output head reads."""

    @property
    def attentions(self) -> Iterable[DiJiangAttention]:
        """The attention of each layer."""
        return (cast(DiJiangAttention, block.dijiang) for block in self.blocks)

    @property
    def state_spec(self) -> StateSpec:
        """What one conversation's state holds."""
        return StateSpec(tuple(tensor for attention in self.attentions for tensor in attention.state_tensors()))

    @property
    def head_weight(self) -> Tensor:
        """The output head of a model that is not quantized."""
        assert isinstance(self.head, Tensor), "the head's weights are quantized"
        return self.head

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights; in a quantized model of those that are not."""
        return self.head.dtype

    @property
    def device(self) -> torch.device:
        return self.head.device

    @property
    def attention_op(self) -> AttentionOp:
        """What computes attention: one's own if it was set, else the device's."""
        return attention_for(self.device, self.dtype) if self._attention_op is None else self._attention_op

    @attention_op.setter
    def attention_op(self, op: AttentionOp) -> None:
        self._attention_op = op

    @property
    def num_parameters(self) -> int:
        """Numbers in the model, quantized ones included; a tied head counts once."""
        quantized = sum(weight.rows * weight.columns for _, weight in quantized_weights(self))
        return sum(parameter.numel() for parameter in self.parameters()) + quantized

    @property
    def has_reduced_states(self) -> bool:
        """Whether states are kept in bf16, or in bf16 and int8."""
        return self._has_reduced_states

    def keep_states_in(self, dtype: torch.dtype) -> "DiJiangForCausalLM":
        """Chooses the dtype of new states, float32, bfloat16 or int8; returns itself.

        In bfloat16 all of a state but the normaliser is; sums stay fp32 and are rounded stochastically when
        they are stored (`ops.torch.rounding`), keys and values once. In int8 the window's keys and values have a scale
        for each token and head, and the rest is as in bfloat16 (`docs/decisions/0015-int8-states.md`).

        Raises:
            ValueError: another dtype, or a fp64 model.
        """
        if dtype not in (torch.float32, torch.bfloat16, torch.int8) or self.dtype == torch.float64:
            raise ValueError(f"states are kept in float32, bfloat16 or int8, not {dtype}, of models up to float32")
        self._has_reduced_states = dtype != torch.float32
        for attention in self.attentions:
            attention.has_bf16_sums = self._has_reduced_states
            attention.has_int8_window = dtype == torch.int8
        return self

    def prepare(self) -> "DiJiangForCausalLM":
        """Derives buffers from loaded parameters and switches gradients off; returns itself."""
        for attention in self.attentions:
            attention.linear.prepare()
        for _, weight in quantized_weights(self):
            weight.prepare()
        return self.requires_grad_(False).eval()

    def forward(self, batch: PackedBatch, state: StateBuffer) -> Tensor:
        """Runs a step, moving the slots of its sequences on in place.

        Returns:
            [R, vocab] fp32 (fp64 for fp64 models): next-token logits of `batch.logit_rows`.

        Raises:
            ValueError: slots are to be held by a model that cannot.
        """
        if batch.num_uncommitted > 0:
            raise ValueError("only the compiled kernels can defer commits")
        return self.logits(self.hidden_states(batch, state)[-1][batch.logit_rows])

    def hidden_states(self, batch: PackedBatch, state: StateBuffer, *, all_layers: bool = False) -> list[Tensor]:
        """The final normed hidden states [T, D]; with `all_layers` those before each layer come first."""
        layout = self.step_layout(batch)
        x = Residual(self.embed(batch.token_ids, batch.positions))
        kept = []
        for block, attention in zip(self.blocks, self.attentions, strict=True):
            if all_layers:
                kept.append(x.value)
            x = block(x, op=self.attention_op, layout=layout, state=attention.layer_state(state))
        return [*kept, self.finish(x)]

    def logits(self, hidden: Tensor) -> Tensor:
        """[R, D] normed -> [R, vocab], fp32 or fp64."""
        head = self.head
        logits = head.product(hidden) if isinstance(head, QuantizedWeight) else functional.linear(hidden, head)
        return logits if logits.dtype == torch.float64 else logits.float()

    def step_layout(self, batch: PackedBatch) -> StepLayout:
        """Which tokens are whose, and their rotary angles; the same for all layers."""
        config, split = self.config, batch.num_decode
        kernel_dtype = next(iter(self.attentions)).linear.log_decay.dtype

        rotary, sink_rotary = step_angles(
            batch.positions,
            frequencies=config.frequencies,
            last_sink=config.last_sink_position,
            dtype=kernel_dtype,
        )
        prefill = None
        if split < len(batch.lengths):
            prefill = PrefillLayout(batch.positions[split:], batch.slots[split:], batch.lengths[split:])
        layout = StepLayout(
            num_decode=split,
            positions=batch.positions,
            decode_slots=batch.slots[:split],
            rotary=rotary,
            sink_rotary=sink_rotary,
            prefill=prefill,
        )
        if config.local_layers is not None:
            layout.local = layout.rotated(
                *step_angles(
                    batch.positions,
                    frequencies=config.local_frequencies,
                    last_sink=config.last_sink_position,
                    dtype=kernel_dtype,
                )
            )
        return layout
