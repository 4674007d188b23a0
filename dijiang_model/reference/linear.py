"""Linear attention with decay, in its three equal forms, and the two read-outs.

Query head h belongs to key-value head (group) g = h // (H / G). `log_decay[t, g]` <= 0 is what the state
is multiplied by (as an exponent) before token t is added, so token j weighs
`exp(log_decay[j+1] + ... + log_decay[t])` at token t; a static decay is the constant case.
All three forms return the numerator `phi(q)^T S` [T, H, V], the denominator `phi(q)^T z` [T, H] (the
released read-out ignores it) and the state after the last token.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class LinearState:
    """What a sequence leaves behind: `s` [G, K, V] (sum of phi(k) v^T) and `z` [G, K] (sum of phi(k)), decayed."""

    s: Tensor
    z: Tensor

    @staticmethod
    def zeros(phi_k: Tensor, v: Tensor) -> "LinearState":
        """Before the first token."""
        num_groups, num_features = phi_k.shape[1:]
        return LinearState(
            torch.zeros((num_groups, num_features, v.shape[-1]), dtype=v.dtype),
            torch.zeros((num_groups, num_features), dtype=v.dtype),
        )


LinearResult = tuple[Tensor, Tensor, LinearState]


def parallel(
    phi_q: Tensor, phi_k: Tensor, v: Tensor, log_decay: Tensor, *, state: LinearState | None = None
) -> LinearResult:
    """All tokens at once: `((Phi_q Phi_k^T) * M) V` with M_ij the decay from j to i, zero for j > i.

    Args:
        phi_q: [T, H, K].
        phi_k: [T, G, K].
        v: [T, G, V].
        log_decay: [T, G].
        state: where the sequence stands before these tokens; None: its beginning.
    """
    num_tokens, num_heads = phi_q.shape[:2]
    num_groups = phi_k.shape[1]
    start = LinearState.zeros(phi_k, v) if state is None else state
    numerator = torch.zeros((num_tokens, num_heads, v.shape[-1]), dtype=v.dtype)
    denominator = torch.zeros((num_tokens, num_heads), dtype=v.dtype)
    end_s, end_z = torch.zeros_like(start.s), torch.zeros_like(start.z)
    for g in range(num_groups):
        gamma = log_decay[:, g].exp()
        since_start = gamma.cumprod(dim=0)
        mask = torch.eye(num_tokens, dtype=v.dtype)
        for i in range(1, num_tokens):
            mask[i, :i] = gamma[i] * mask[i - 1, :i]
        for h in range(g * num_heads // num_groups, (g + 1) * num_heads // num_groups):
            weights = (phi_q[:, h] @ phi_k[:, g].T) * mask
            numerator[:, h] = weights @ v[:, g] + since_start[:, None] * (phi_q[:, h] @ start.s[g])
            denominator[:, h] = weights.sum(dim=1) + since_start * (phi_q[:, h] @ start.z[g])
        kept = mask[-1, :, None] * phi_k[:, g]
        end_s[g] = since_start[-1] * start.s[g] + kept.T @ v[:, g]
        end_z[g] = since_start[-1] * start.z[g] + kept.sum(dim=0)
    return numerator, denominator, LinearState(end_s, end_z)


def recurrent(
    phi_q: Tensor, phi_k: Tensor, v: Tensor, log_decay: Tensor, *, state: LinearState | None = None
) -> LinearResult:
    """One token after the other: `S <- gamma S + phi(k) v^T`, read with phi(q). Arguments as for `parallel`."""
    num_tokens, num_heads = phi_q.shape[:2]
    num_groups = phi_k.shape[1]
    start = LinearState.zeros(phi_k, v) if state is None else state
    s, z = start.s.clone(), start.z.clone()
    numerator = torch.zeros((num_tokens, num_heads, v.shape[-1]), dtype=v.dtype)
    denominator = torch.zeros((num_tokens, num_heads), dtype=v.dtype)
    for t in range(num_tokens):
        for g in range(num_groups):
            gamma = log_decay[t, g].exp()
            s[g] = gamma * s[g] + torch.outer(phi_k[t, g], v[t, g])
            z[g] = gamma * z[g] + phi_k[t, g]
        for h in range(num_heads):
            g = h * num_groups // num_heads
            numerator[t, h] = phi_q[t, h] @ s[g]
            denominator[t, h] = phi_q[t, h] @ z[g]
    return numerator, denominator, LinearState(s, z)


def chunked(
    phi_q: Tensor,
    phi_k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    *,
    chunk_size: int,
    state: LinearState | None = None,
) -> LinearResult:
    """Parallel inside chunks of at most `chunk_size` tokens, recurrent between them (dijiang_model/README.md, 3)."""
    at = LinearState.zeros(phi_k, v) if state is None else state
    numerators, denominators = [], []
    for begin in range(0, phi_q.shape[0], chunk_size):
        piece = slice(begin, begin + chunk_size)
        numerator, denominator, at = parallel(phi_q[piece], phi_k[piece], v[piece], log_decay[piece], state=at)
        numerators.append(numerator)
        denominators.append(denominator)
    return torch.cat(numerators), torch.cat(denominators), at


def position_table_parallel(
    phi_q: Tensor, phi_k: Tensor, v: Tensor, *, read_table: Tensor, write_table: Tensor, log_decay: Tensor
) -> Tensor:
    """The released attention from its definition: `causal((phi(q) D1[t]) (phi(k) D2[m])^T) v`, no denominator.

    Beyond the tables' N entries they go on as they were initialised, D1[t] = gamma D1[t-1] and
    D2[t] = D2[t-1] / gamma, which leaves D1[t] D2[t] at its last value.

    Args:
        phi_q: [T, H, K] from position 0 on; phi_k: [T, H, K]; v: [T, H, V].
        read_table: D1 [H, N]; write_table: D2 [H, N].
        log_decay: [H], log gamma, used beyond the table.

    Returns:
        [T, H, V].
    """
    num_tokens, num_heads = phi_q.shape[:2]
    output = torch.zeros((num_tokens, num_heads, v.shape[-1]), dtype=v.dtype)
    for h in range(num_heads):
        read, write, gamma = list(read_table[h]), list(write_table[h]), log_decay[h].exp()
        while len(read) < num_tokens:
            read.append(read[-1] * gamma)
            write.append(write[-1] / gamma)
        q = phi_q[:, h] * torch.stack(read[:num_tokens])[:, None]
        k = phi_k[:, h] * torch.stack(write[:num_tokens])[:, None]
        output[:, h] = (q @ k.T).tril() @ v[:, h]
    return output


def position_table_factors(
    read_table: Tensor, write_table: Tensor, log_decay: Tensor, *, num_tokens: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The position tables as a decay <= 1 and two bounded factors, for the recurrent form.

    With c_t = 1 / max_{j <= t} |D2[j]| the state C_t = c_t sum_j D2[j] phi(k_j) v_j^T obeys
    C_t = (c_t / c_{t-1}) C_{t-1} + (c_t D2[t]) phi(k_t) v_t^T, and o_t = (D1[t] / c_t) phi(q_t)^T C_t.
    Exact for any table, zeros and sign changes included; beyond it the decay is gamma and both factors
    keep their last value.

    Args:
        read_table: D1 [H, N]; write_table: D2 [H, N]; log_decay: [H].

    Returns:
        log decay, write factor, read factor, each [num_tokens, H].
    """
    num_heads, length = read_table.shape
    log_decays = torch.zeros((num_tokens, num_heads), dtype=read_table.dtype)
    writes, reads = torch.zeros_like(log_decays), torch.zeros_like(log_decays)
    for h in range(num_heads):
        largest = torch.zeros((), dtype=read_table.dtype)
        for t in range(num_tokens):
            if t >= length:
                log_decays[t, h], writes[t, h], reads[t, h] = log_decay[h], writes[t - 1, h], reads[t - 1, h]
                continue
            before, largest = largest, torch.maximum(largest, write_table[h, t].abs())
            if before > 0:  # until then the state is zero, and so it does not matter what it decays by
                log_decays[t, h] = before.log() - largest.log()
            if largest > 0:  # until then nothing was written: both factors may stay zero
                writes[t, h], reads[t, h] = write_table[h, t] / largest, read_table[h, t] * largest
    return log_decays, writes, reads


def group_norm_gate(
    attended: Tensor, gate: Tensor, *, weight: Tensor, bias: Tensor, num_groups: int, eps: float = 1e-5
) -> Tensor:
    """The released read-out: `SiLU(gate) * GroupNorm(attended)`, each token by itself.

    Args:
        attended: [T, H, V], before the norm; its heads side by side are the channels [T, H * V].
        gate: [T, H * V], the layer-normed input times W_G.
        weight, bias: [H * V].
        num_groups: the released code takes the head size, so groups need not line up with heads.
        eps: torch's GroupNorm default, which the released code keeps.
    """
    channels = attended.flatten(1)
    width = channels.shape[1] // num_groups
    normed = torch.zeros_like(channels)
    for group in range(num_groups):
        part = channels[:, group * width : (group + 1) * width]
        mean = part.mean(dim=1, keepdim=True)
        variance = (part - mean).square().mean(dim=1, keepdim=True)
        normed[:, group * width : (group + 1) * width] = (part - mean) / (variance + eps).sqrt()
    return gate / (1 + (-gate).exp()) * (normed * weight + bias)
