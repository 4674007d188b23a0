"""A rank's network: the family's, of the rank's config, with the modules that speak to the other ranks put in.

Embedding and head are split by the vocabulary, tied or not: a rank then reads and keeps only its part of them, for one
more sum as wide as the hidden state and one collection of logits a step. See docs/parallel.md for the alternatives.
"""

from functools import cached_property

import torch
from torch import Tensor, nn
from torch.nn import functional

from dijiang_model.attention import DiJiangAttention, state_dtype
from dijiang_model.batch import PackedBatch
from dijiang_model.checkpoints.quantized import install
from dijiang_model.config import ModelConfig
from dijiang_model.families import build_model
from dijiang_model.families.parts import AllHeadsNorm, empty_embedding
from dijiang_model.model import DiJiangForCausalLM
from dijiang_model.quantization.config import Quantization
from dijiang_model.quantization.modules import QuantizedEmbedding, QuantizedLinear
from dijiang_model.state import StateBuffer, StateSpec
from dijiang_model.tensor_parallel.group import TensorGroup
from dijiang_model.tensor_parallel.modules import (
    ParallelAllHeadsNorm,
    ParallelKernel,
    ParallelResidualBlock,
    PartialLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    group_norm,
)
from dijiang_model.tensor_parallel.shards import Shard, local_config
from dijiang_model.tensor_parallel.states import rank_specs

COLLECTED_ROWS = 256
"""Rows of logits on their way to rank 0 at once, so that scoring long prompts takes no second copy of them all."""


def build_shard(
    config: ModelConfig,
    group: TensorGroup,
    *,
    device: torch.device | str = "meta",
    dtype: torch.dtype = torch.float32,
    quantization: Quantization | None = None,
) -> DiJiangForCausalLM:
    """A rank's uninitialised network; fill it with the parts of a checkpoint, then call `prepare()`.

    Args:
        config: of the whole network.
        group: the ranks; not spoken to yet.
        device: `meta` allocates nothing.
        dtype: of the weights, as for `build_model`.
        quantization: how the weights are rounded; None: they are not.

    Raises:
        ConfigError: the network cannot be split over so many ranks.
    """
    model = build_model(local_config(config, group.size, quantization, rank=group.rank), device=device, dtype=dtype)
    is_summed_once = config.parallel_residual
    with torch.device(device):
        _cut_vocabulary(model, config, dtype=dtype, group=group)
        for layer in range(config.num_layers):
            if is_summed_once:
                model.blocks[layer] = ParallelResidualBlock(model.config, layer, dtype=dtype, group=group)
            _cut_attention(model.blocks[layer].dijiang, config, dtype=dtype, group=group)
    if quantization is not None:
        install(model, quantization)
    _connect(model, config, PartialLinear if is_summed_once else RowParallelLinear, group)
    return model


def _cut_vocabulary(model: DiJiangForCausalLM, config: ModelConfig, *, dtype: torch.dtype, group: TensorGroup) -> None:
    rows, width = len(Shard(group.rank, group.size).vocabulary(config.vocab_size)), config.embedding_width
    model.set_submodule(model.paths.embedding, empty_embedding(rows, width, dtype=dtype))
    if not config.tie_word_embeddings:
        model.set_submodule(model.paths.head, nn.Linear(width, rows, bias=False, dtype=dtype))


def _cut_attention(attention: object, config: ModelConfig, *, dtype: torch.dtype, group: TensorGroup) -> None:
    """Puts in what is not just smaller."""
    assert isinstance(attention, DiJiangAttention)
    attention.linear = ParallelKernel(attention.config, attention.layer, state_dtype(dtype), group=group)
    if config.norms_all_heads:
        for name in ("q_norm", "k_norm"):
            norm = attention.get_submodule(name)
            assert isinstance(norm, AllHeadsNorm)
            attention.set_submodule(name, ParallelAllHeadsNorm(norm, group))
    if attention.read_out == "group_norm":
        attention.set_submodule("group_norm", group_norm(config, dtype=dtype, group=group))


def _connect(model: DiJiangForCausalLM, config: ModelConfig, kind: type[RowParallelLinear], group: TensorGroup) -> None:
    """Lets those modules speak to the other ranks whose own part is not the whole answer."""
    for block in model.blocks:
        for path in model.paths.row_parallel:
            linear = block.get_submodule(path)
            assert isinstance(linear, nn.Linear | QuantizedLinear)
            block.set_submodule(path, kind(linear, group))
    table = model.get_submodule(model.paths.embedding)
    assert isinstance(table, nn.Embedding | QuantizedEmbedding)
    model.set_submodule(model.paths.embedding, VocabParallelEmbedding(table, config.vocab_size, group))


class ShardedModel:
    """A rank's network at work: called like a whole one, by all ranks with the same batch."""

    def __init__(self, model: DiJiangForCausalLM, config: ModelConfig, group: TensorGroup) -> None:
        """
        Args:
            model: of this rank, ready to compute.
            config: of the whole network.
            group: the ranks, connected.
        """
        self.local = model
        self.config = config
        self.group = group
        self._vocabularies = [len(Shard(rank, group.size).vocabulary(config.vocab_size)) for rank in range(group.size)]

    @cached_property
    def state_specs(self) -> tuple[StateSpec, ...]:
        """What a slot holds on each rank."""
        return rank_specs(self.local.state_spec, self.config, size=self.group.size)

    @property
    def state_spec(self) -> StateSpec:
        """What a slot holds on this rank."""
        return self.state_specs[self.group.rank]

    def __call__(self, batch: PackedBatch, state: StateBuffer) -> Tensor | None:
        """Runs a step on this rank's part of the slots.

        Returns:
            On rank 0 [R, vocab] fp32 (fp64 for fp64 models), next-token logits of `batch.logit_rows`; else None.
        """
        hidden = self.local.hidden_states(batch, state)[-1][batch.logit_rows]
        logits = self._empty_logits(hidden) if self.group.rank == 0 else None
        for start in range(0, len(hidden), COLLECTED_ROWS):
            rows = slice(start, start + COLLECTED_ROWS)
            parts = self.group.gather(self._own_logits(hidden[rows]))
            if parts is not None and logits is not None:
                own = [part[:, :width] for part, width in zip(parts, self._vocabularies, strict=True)]
                torch.cat(own, dim=1, out=logits[rows])
        return logits

    def _own_logits(self, hidden: Tensor) -> Tensor:
        """[R, widest part of the vocabulary]; a narrower part is filled up, for all ranks' have one shape."""
        logits = self.local.logits(hidden)
        return functional.pad(logits, (0, max(self._vocabularies) - logits.shape[1]))

    def _empty_logits(self, hidden: Tensor) -> Tensor:
        dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        return torch.empty((len(hidden), self.config.vocab_size), dtype=dtype, device=hidden.device)
