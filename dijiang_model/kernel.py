"""The parameters of one layer's linear attention, and what is derived from them once after loading."""

import math
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn import functional

from dijiang_model.config import AttentionConfig, FeatureConfig, ModelConfig
from dijiang_model.features import basis_matrix, feature_map


def released_log_decay(num_heads: int) -> Tensor:
    """log gamma_h of the released code, gamma_h = 1 - exp(linspace(log 1/32, log 1/512, H)); [H] fp64."""
    return torch.log1p(-torch.exp(torch.linspace(math.log(1 / 32), math.log(1 / 512), num_heads, dtype=torch.float64)))


@lru_cache(maxsize=32)
@torch.inference_mode(mode=False)
def _shared_basis(features: FeatureConfig, head_size: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """One tensor for all layers that have the same: a step then finds it in a cache. Nobody writes it."""
    return basis_matrix(features, head_size).to(device=device, dtype=dtype)


def wide_product(x: Tensor, weight: Tensor) -> Tensor:
    """x [T, C] times a weight [R, C] in the weight's dtype, [T, R]."""
    return functional.linear(x.to(weight.dtype), weight)


class LinearKernel(nn.Module):
    """Feature map, decay and mixing weight of one layer.

    Parameters (G key-value heads, H query heads, d head size, K features, N table entries):
        nodes, log_weights: [G, K]; absent with basis `matrix`, where `projection` [d, K] stands instead.
        log_decay: [G], <= 0.
        read_table, write_table: [H, N], the released D1 and D2; only with decay `table`.
        far_query_down [r, H * d], far_query_up [H * d, r]: only with a `far_rank`.
        mix_bias [H], mix_weight [H, d]: only with a window; a bias of -inf silences the linear part.
        priority_weight [G, D], priority_bias [G]: only with anchors; they score the layer's normed input.
    """

    basis: Tensor
    """[d, K], derived."""
    ones: Tensor
    zeros: Tensor
    """[G, K], derived: nodes and log weights of a whole projection."""
    table_log_decay: Tensor
    table_write: Tensor
    table_read: Tensor
    """[N + 1, H] each, derived from the tables; the last entry holds for every position past them."""

    def __init__(self, config: ModelConfig, layer: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.attention: AttentionConfig = config.layers[layer]
        self.head_size = config.head_size
        self.num_kv_heads = config.num_kv_heads
        self.teacher_window = config.seen_by_teacher(layer)
        num_features = config.num_features(layer)
        self.num_features = num_features

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=False)

        if self.is_whole_projection:
            self.projection = parameter(config.head_size, num_features)
        else:
            self.nodes = parameter(config.num_kv_heads, num_features)
            self.log_weights = parameter(config.num_kv_heads, num_features)
        self.log_decay = parameter(config.num_kv_heads)
        if self.attention.decay == "table":
            self.read_table = parameter(config.num_heads, config.position_table_length)
            self.write_table = parameter(config.num_heads, config.position_table_length)
        rank = self.attention.features.far_rank
        if rank > 0:
            self.far_query_down = parameter(rank, config.num_heads * config.head_size)
            self.far_query_up = parameter(config.num_heads * config.head_size, rank)
        if self.attention.window > 0:
            self.mix_bias = parameter(config.num_heads)
            self.mix_weight = parameter(config.num_heads, config.head_size)
        if self.attention.anchors is not None:
            self.priority_weight = parameter(config.num_kv_heads, config.hidden_size)
            self.priority_bias = parameter(config.num_kv_heads)

    @property
    def is_whole_projection(self) -> bool:
        return self.attention.features.bases == ("matrix",)

    @torch.no_grad()
    def prepare(self) -> None:
        """Derives the buffers from the loaded parameters; call it again when those change."""
        device, dtype = self.log_decay.device, self.log_decay.dtype
        if self.is_whole_projection:
            ones = torch.ones(self.num_kv_heads, self.num_features, dtype=dtype, device=device)
            self.register_buffer("basis", self.projection.data, persistent=False)
            self.register_buffer("ones", ones, persistent=False)
            self.register_buffer("zeros", torch.zeros_like(ones), persistent=False)
        else:
            basis = _shared_basis(self.attention.features, self.head_size, device, dtype)
            self.register_buffer("basis", basis, persistent=False)
        if self.attention.decay == "table":
            derived = position_factors(self.read_table, self.write_table, self.log_decay)
            for name, table in zip(("table_log_decay", "table_write", "table_read"), derived, strict=True):
                self.register_buffer(name, table.T.contiguous().to(device=device, dtype=dtype), persistent=False)

    def phi(self, x: Tensor) -> Tensor:
        """Features of x [..., G, R, d] -> [..., G, R, K]."""
        if self.is_whole_projection:
            return feature_map(x, self.basis, self.ones, self.zeros, self.attention.features)
        return feature_map(x, self.basis, self.nodes, self.log_weights, self.attention.features)

    def far_query(self, q: Tensor) -> Tensor:
        """What reads the linear part: q + U D q over all heads, before the rotary embedding; [T, H, d] -> the same.

        A learned update of the query projection for the far branch alone. The keys have none: a key that leaves
        the window comes from the ring.
        """
        if self.attention.features.far_rank == 0:
            return q
        return q + functional.linear(self.far_query_low(q), self.far_query_up).view_as(q)

    def far_query_low(self, q: Tensor, product: Callable[[Tensor, Tensor], Tensor] = wide_product) -> Tensor:
        """D q of `far_query`, in the kernel's dtype: [T, H, d] -> [T, r].

        Args:
            product: of x [T, C] and a weight [r, C] of the kernel's dtype, [T, r] in that dtype.
        """
        return product(q.flatten(1), self.far_query_down)

    def mix(self, q: Tensor) -> Tensor:
        """beta_h(q) = K exp(a_h + w_h . q), the weight of the linear part beside the window.

        Args:
            q: [T, G, R, d] the window's queries, rotated if the features are.

        Returns:
            [T, G, R].
        """
        bias = self.mix_bias.view(self.num_kv_heads, -1)
        weight = self.mix_weight.view(self.num_kv_heads, -1, self.head_size)
        return self.num_features * torch.exp(bias + (q * weight).sum(-1))


def position_factors(read: Tensor, write: Tensor, log_decay: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The released position tables as a stable recurrence, exact for any table.

    The released layer computes `o_t = D1[t] phi(q_t) sum_{j<=t} D2[j] phi(k_j) v_j^T`. With the normaliser
    `c_t = 1 / max_{j<=t} |D2[j]|` the state `S_t = (c_t / c_{t-1}) S_{t-1} + c_t D2[t] phi(k_t) v_t^T` has
    decays <= 1 and write factors of at most 1, and `o_t = (D1[t] / c_t) phi(q_t)^T S_t`: nothing is divided by
    D1, so zeros and sign changes need no special case, and untrained tables give decay gamma, factors 1.

    Args:
        read, write: [H, N], D1 and D2.
        log_decay: [H], log gamma, for positions past the tables.

    Returns:
        log decay, write factor and read factor, each [H, N + 1] fp64; entry N serves every position >= N.
    """
    read, write = read.double(), write.double()
    largest = torch.cummax(write.abs(), dim=1).values
    first = torch.where(largest > 0, largest, torch.inf).amin(dim=1, keepdim=True)
    largest = torch.where(largest > 0, largest, torch.where(torch.isfinite(first), first, 1.0))
    log_largest = largest.log()
    log_steps = torch.cat([torch.zeros_like(log_largest[:, :1]), -log_largest.diff(dim=1)], dim=1)
    log_steps = torch.cat([log_steps, log_decay.double()[:, None]], dim=1)
    write_factor, read_factor = write / largest, read * largest
    return (
        log_steps,
        torch.cat([write_factor, write_factor[:, -1:]], dim=1),
        torch.cat([read_factor, read_factor[:, -1:]], dim=1),
    )
