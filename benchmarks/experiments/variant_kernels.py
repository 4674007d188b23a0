"""Linear parts that were tried and are no part of the model, written out in full, quadratic in length, for training.

An experiment that wins moves into `dijiang_model` with all its forms; here it has the one that shows whether it would.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from dijiang_model.kernel import LinearKernel
from dijiang_model.ops.layout import StepLayout
from dijiang_model.ops.training.attention import RecordedAttention

EXPERIMENTS = ("diagonal", "initial state", "gate")


class Experiment(nn.Module):
    """A kernel with one more learned part, at no cost in state.

    diagonal: scales the channels of queries (per head) and keys (per group) before the DCT.
    initial state: a text does not begin with an empty state, but with a learned one, which decays like any other.
    gate: how much of the state a token keeps depends on its key, beside the learned decay.

    Parameters: query_scale [H, d], key_scale [G, d] (logarithms); initial_state [G, K, d], initial_weight [G, K]
    (logarithm); gate_weight [G, d], gate_bias [G].
    """

    def __init__(self, kernel: LinearKernel, name: str) -> None:
        """Starts as the kernel itself, or nearly: an initial state of no weight to speak of, a gate that keeps all."""
        super().__init__()
        self.kernel = kernel
        self.extra = nn.ParameterDict()
        groups, heads, size = kernel.num_kv_heads, len(kernel.mix_bias), kernel.head_size
        if name == "diagonal":
            self.extra["query_scale"] = nn.Parameter(torch.zeros(heads, size))
            self.extra["key_scale"] = nn.Parameter(torch.zeros(groups, size))
        elif name == "initial state":
            self.extra["initial_state"] = nn.Parameter(torch.zeros(groups, kernel.num_features, size))
            self.extra["initial_weight"] = nn.Parameter(torch.full((groups, kernel.num_features), -2.0))
        elif name == "gate":
            self.extra["gate_weight"] = nn.Parameter(torch.zeros(groups, size))
            self.extra["gate_bias"] = nn.Parameter(torch.full((groups,), -9.0))

    def answer(self, recorded: RecordedAttention, layout: StepLayout) -> Tensor:
        """[T, H, d], as `RecordedAttention.answer`, of one segment."""
        kernel, groups = self.kernel, (self.kernel.num_kv_heads, -1)
        linear_q, linear_k, mix_q = self._branch(recorded, layout)
        phi_q = kernel.phi(linear_q.unflatten(1, groups))  # [T, G, R, K]
        phi_k = kernel.phi(linear_k[:, :, None]).squeeze(2)  # [T, G, K]
        log_kept = self._log_kept(recorded.k)  # [T, G]
        token = torch.arange(len(phi_k), device=phi_k.device)
        config = kernel.attention
        is_far = (token[None, :] <= token[:, None] - config.window) & (token[None, :] >= config.sinks)
        decay = (log_kept.T[:, :, None] - log_kept.T[:, None, :]).masked_fill(~is_far, -torch.inf).exp()
        weights = torch.einsum("tgrk,jgk->grtj", phi_q, phi_k) * decay[:, None]
        numerator = torch.einsum("grtj,jgd->tgrd", weights, recorded.v.to(weights.dtype))
        denominator = weights.sum(-1).permute(2, 0, 1)
        if "initial_state" in self.extra:
            left = phi_q * log_kept.exp()[:, :, None, None]
            weight = self.extra["initial_weight"].exp()
            numerator = numerator + torch.einsum(
                "tgrk,gkd->tgrd", left, self.extra["initial_state"] * weight[..., None]
            )
            denominator = denominator + torch.einsum("tgrk,gk->tgr", left, weight)
        mix = kernel.mix(mix_q.unflatten(1, groups))
        whole = recorded.exact_denominator + mix * denominator
        return ((recorded.exact + mix[..., None] * numerator) / whole[..., None]).flatten(1, 2)

    def _branch(self, recorded: RecordedAttention, layout: StepLayout) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys of the linear part and queries of the mixing weight, [T, H or G, d]."""
        linear_q, linear_k, mix_q = self.kernel.far_query(recorded.q), recorded.k, recorded.q
        if self.kernel.attention.features.rotated:
            linear_q, linear_k, mix_q = (layout.rotary.apply(x) for x in (linear_q, linear_k, mix_q))
        if "query_scale" in self.extra:
            linear_q, linear_k = linear_q * self.extra["query_scale"].exp(), linear_k * self.extra["key_scale"].exp()
        return linear_q, linear_k, mix_q

    def _log_kept(self, k: Tensor) -> Tensor:
        """[T, G]: logarithm of what is left at each token of a state at the beginning."""
        steps = self.kernel.log_decay.expand(len(k), -1)
        if "gate_weight" in self.extra:
            score = (functional.rms_norm(k, k.shape[-1:]) * self.extra["gate_weight"]).sum(-1)
            steps = steps - (score + self.extra["gate_bias"]).exp()
        return steps.cumsum(0)
