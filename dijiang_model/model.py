"""The network: packed variable-length input, recurrent state in slots, no padding, no maximum length."""

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from dijiang_model.attention import DiJiangAttention
from dijiang_model.config import ModelConfig
from dijiang_model.native.decoder import NativeDecoder, decoder_for
from dijiang_model.native.decoding import Decoding
from dijiang_model.ops import AttentionOp
from dijiang_model.ops.layout import PrefillLayout, StepLayout
from dijiang_model.ops.selection import attention_for, has_kernels, step_angles
from dijiang_model.ops.torch.attention import TorchAttention
from dijiang_model.quantization.config import Quantization
from dijiang_model.quantization.modules import quantized_weights
from dijiang_model.quantization.weight import QuantizedWeight
from dijiang_model.state import StateBuffer, StateSpec

if TYPE_CHECKING:
    from dijiang_model.families.family import Paths


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """One step's input: the tokens of N sequences one after another.

    Attributes:
        token_ids: [T] int64 on the model's device.
        positions: [T] int64, each token's position in its own conversation, from 0.
        slots: [N] int64, the state slot of each sequence; distinct, but for scratch slot 0.
        lengths: tokens of each sequence, >= 1; they sum to T.
        num_decode: the first so many sequences have one token each and take the recurrent path.
        logit_rows: [R] int64, the tokens whose next-token logits are wanted.
        num_held: so many sequences behind those that decode leave their slots as they are, until
            `DiJiangForCausalLM.advance`. Only where `can_hold`.
    """

    token_ids: Tensor
    positions: Tensor
    slots: Tensor
    lengths: tuple[int, ...]
    num_decode: int
    logit_rows: Tensor
    num_held: int = 0


class DiJiangForCausalLM(nn.Module):
    """A family's network with DiJiang attention; build one with `dijiang_model.families.build_model`.

    The state dict's names are the checkpoint's tensor names. After loading, `prepare()` derives what the
    kernels need. A slot must be zero before its first token (`StateBuffer.storage[slot].zero_()`).
    """

    paths: "ClassVar[Paths]"
    """Where the network keeps its parts."""
    learns_positions: ClassVar[bool] = False
    """Whether the first block reads more of a token than a row of the embedding."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self._attention_op: AttentionOp | None = None
        self._has_narrow_states = False
        self.quantization: Quantization | None = None
        """How weights are rounded (`quantization.modules.install`); None: they are not."""
        self._decoder: NativeDecoder | None = None
        self._is_sealed = False

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
    def finish(self, x: Tensor) -> Tensor:
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
    def decode_path(self) -> Literal["native", "triton", "torch"]:
        """What runs steps: the compiled kernels, Triton's, or torch operations."""
        if self._decoder is not None:
            return "native"
        return "triton" if has_kernels(self.device, self.dtype) else "torch"

    @property
    def can_hold(self) -> bool:
        """Whether steps may hold slots (`PackedBatch.num_held`) and move them on afterwards, to the same bits."""
        return self._decoder is not None and self._runs_natively(self._decoder)

    @property
    def has_narrow_states(self) -> bool:
        """Whether states are kept in bf16, or in bf16 and int8."""
        return self._has_narrow_states

    def keep_states_in(self, dtype: torch.dtype) -> "DiJiangForCausalLM":
        """Chooses the dtype of new states, float32, bfloat16 or int8, and prepares; returns itself.

        In bfloat16 all of a state but the normaliser is; sums stay fp32 and are rounded by chance when they are stored
        (`ops.narrow`), keys and values once. In int8 the window's keys and values have a scale for each token and head,
        and the rest is as in bfloat16 (`docs/decisions/0015-int8-states.md`).

        Raises:
            ValueError: another dtype, or a fp64 model.
        """
        if dtype not in (torch.float32, torch.bfloat16, torch.int8) or self.dtype == torch.float64:
            raise ValueError(f"states are kept in float32, bfloat16 or int8, not {dtype}, of models up to float32")
        self._has_narrow_states = dtype != torch.float32
        for attention in self.attentions:
            attention.is_narrow = self._has_narrow_states
            attention.has_coded_window = dtype == torch.int8
        return self.prepare()

    def prepare(self, *, native: bool = True) -> "DiJiangForCausalLM":
        """Derives buffers from loaded parameters and switches gradients off; returns itself.

        Args:
            native: whether to run steps in the compiled kernels where they can run this model.
        """
        for attention in self.attentions:
            attention.linear.prepare()
        for _, weight in quantized_weights(self):
            weight.prepare()
        self._decoder = decoder_for(self) if native else None
        return self.requires_grad_(False).eval()

    def seal(self) -> "DiJiangForCausalLM":
        """Takes the promise that no weight is trained, replaced or moved from here on; returns itself.

        Each step looks for that otherwise: at some hundred tensors, 3 % of a step of 135 M parameters in int8.
        """
        self._is_sealed = True
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> "DiJiangForCausalLM":
        """A move to another device or dtype leaves the kernels' pointers behind; `prepare()` makes new ones."""
        self._decoder = None
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def forward(self, batch: PackedBatch, state: StateBuffer) -> Tensor:
        """Runs a step, moving the slots of its sequences on in place.

        Returns:
            [R, vocab] fp32 (fp64 for fp64 models): next-token logits of `batch.logit_rows`.

        Raises:
            ValueError: slots are to be held by a model that cannot.
        """
        if self._decoder is not None and self._runs_natively(self._decoder):
            return self._decoder.step(
                self.embed(batch.token_ids, batch.positions).float(),
                positions=batch.positions,
                slots=batch.slots,
                lengths=batch.lengths,
                wanted=batch.logit_rows,
                state=state,
                first_held=batch.num_decode,
                num_held=batch.num_held,
            )
        if batch.num_held > 0:
            raise ValueError("only the compiled kernels can hold slots")
        return self.logits(self.hidden_states(batch, state)[-1][batch.logit_rows])

    def decoding(
        self, *, slots: Sequence[int], positions: Sequence[int], last_token_ids: Tensor, state: StateBuffer
    ) -> Decoding | None:
        """The same for sequences that feed their last token, step after step, without an operation on a tensor.

        Returns:
            See `Decoding` for it and for the arguments; None where other than the compiled kernels run steps, where a
            token is more than looked up, or where no `seal` has promised that the weights stay.
        """
        if self._decoder is None or not self._is_sealed or not self._runs_natively(self._decoder):
            return None
        return self._decoder.decoding(slots=slots, positions=positions, last_token_ids=last_token_ids, state=state)

    def advance(self, counts: Sequence[int], state: StateBuffer) -> None:
        """Moves the slots that the last step has held on, each by its first `counts` tokens; once for each step."""
        assert self._decoder is not None
        self._decoder.advance(counts, state)

    def _runs_natively(self, decoder: NativeDecoder) -> bool:
        """The kernels know neither gradients nor other attention, nor what was put in after `prepare()`."""
        own = self._attention_op  # None: the processor's, for kernels are made for models on it alone
        if self.training or (own is not None and type(own) is not TorchAttention):
            return False
        if not (self._is_sealed or decoder.is_current):
            return False
        return not torch.is_grad_enabled() or not any(parameter.requires_grad for parameter in self.parameters())

    def hidden_states(self, batch: PackedBatch, state: StateBuffer, *, all_layers: bool = False) -> list[Tensor]:
        """The final normed hidden states [T, D]; with `all_layers` those before each layer come first."""
        layout = self._layout(batch)
        x = self.embed(batch.token_ids, batch.positions)
        kept = []
        for block, attention in zip(self.blocks, self.attentions, strict=True):
            if all_layers:
                kept.append(x)
            x = block(x, op=self.attention_op, layout=layout, state=attention.layer_state(state))
        return [*kept, self.finish(x)]

    def logits(self, hidden: Tensor) -> Tensor:
        """[R, D] normed -> [R, vocab], fp32 or fp64."""
        head = self.head
        logits = head.product(hidden) if isinstance(head, QuantizedWeight) else functional.linear(hidden, head)
        return logits if logits.dtype == torch.float64 else logits.float()

    def prefill(
        self, token_ids: Tensor, *, lengths: Sequence[int], slots: Tensor, starts: Tensor, state: StateBuffer
    ) -> Tensor:
        """Feeds a segment to each of N sequences; next-token logits of every token, [T, vocab].

        Args:
            token_ids: [T] int64, packed.
            lengths: tokens of each segment.
            slots, starts: [N] int64: slot, and position of the segment's first token.
        """
        tokens = torch.tensor(lengths, device=starts.device)
        first = torch.repeat_interleave(starts - (tokens.cumsum(0) - tokens), tokens)
        rows = torch.arange(len(token_ids), device=starts.device)
        return cast(Tensor, self(PackedBatch(token_ids, first + rows, slots, tuple(lengths), 0, rows), state))

    def decode(self, token_ids: Tensor, *, slots: Tensor, positions: Tensor, state: StateBuffer) -> Tensor:
        """Feeds one token to each of N sequences; next-token logits [N, vocab]. All arguments [N] int64."""
        num = len(token_ids)
        rows = torch.arange(num, device=token_ids.device)
        return cast(Tensor, self(PackedBatch(token_ids, positions, slots, (1,) * num, num, rows), state))

    def _layout(self, batch: PackedBatch) -> StepLayout:
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
        return StepLayout(
            num_decode=split,
            positions=batch.positions,
            decode_slots=batch.slots[:split],
            rotary=rotary,
            sink_rotary=sink_rotary,
            prefill=prefill,
        )
