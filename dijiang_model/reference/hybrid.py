"""The hybrid: softmax over a few tokens, linear attention over all others, one denominator.

At token t the tokens of the exact part are the s sinks (positions < s) and the last w tokens (t itself included),
each counted once; all others are of the linear part. With c_t the largest exact score s_tj = q_t . k_j / sqrt(d):

    f_tj = beta_h(q_t) gamma_g^(t-j) phi(q_t) . phi(k_j)
    y_t  = (sum_exact exp(s_tj - c_t) v_j + sum_linear f_tj v_j) / (sum_exact exp(s_tj - c_t) + sum_linear f_tj)

Sinks are scored with `q_sink`, the query rotated no further than the teacher's trained range.
"""

from dataclasses import dataclass, replace
from math import sqrt

import torch
from torch import Tensor

from dijiang_model.reference.linear import LinearState


@dataclass(frozen=True, slots=True)
class HybridInputs:
    """One layer's tensors, positions counting from 0 at the first row.

    Attributes:
        q: [T, H, d], rotated; q_sink: [T, H, d], the same rotated at min(t, trained range - 1).
        k: [T, G, d], rotated; v: [T, G, V].
        phi_q: [T, H, K]; phi_k: [T, G, K].
        beta: [T, H] >= 0, weight of the linear part.
        log_decay: [G].
    """

    q: Tensor
    q_sink: Tensor
    k: Tensor
    v: Tensor
    phi_q: Tensor
    phi_k: Tensor
    beta: Tensor
    log_decay: Tensor

    def rows(self, start: int, stop: int) -> "HybridInputs":
        """Of some of the tokens."""
        own = slice(start, stop)
        names = ("q", "q_sink", "k", "v", "phi_q", "phi_k", "beta")
        return replace(self, **{name: getattr(self, name)[own] for name in names})


@dataclass(slots=True)
class HybridState:
    """What remains of a sequence: keys and values of the sinks and of the last w tokens, and the linear state.

    Attributes:
        num_seen: tokens so far.
        sinks, ring: (position, k [G, d], v [G, V]), oldest first.
        linear: sums over the tokens that left the window, each decayed by its distance to the last token.
    """

    num_seen: int
    sinks: list[tuple[int, Tensor, Tensor]]
    ring: list[tuple[int, Tensor, Tensor, Tensor]]
    linear: LinearState


def hybrid_parallel(x: HybridInputs, *, window: int, sinks: int) -> Tensor:
    """The definition, pair by pair, from the beginning of the sequence: y [T, H, V]. `window` >= 1."""
    num_tokens, num_heads, size = x.q.shape
    output = torch.zeros((num_tokens, num_heads, x.v.shape[-1]), dtype=x.v.dtype)
    for t in range(num_tokens):
        j = torch.arange(t + 1)
        is_exact = (j < sinks) | (j > t - window)
        for h in range(num_heads):
            g = h * x.k.shape[1] // num_heads
            k, v = x.k[: t + 1, g], x.v[: t + 1, g]
            scores = torch.where(j < sinks, k @ x.q_sink[t, h], k @ x.q[t, h]) / sqrt(size)
            exact = torch.where(is_exact, (scores - scores[is_exact].max()).exp(), 0)
            linear = x.beta[t, h] * (x.log_decay[g] * (t - j)).exp() * (x.phi_k[: t + 1, g] @ x.phi_q[t, h])
            weights = torch.where(is_exact, exact, linear)
            output[t, h] = weights @ v / weights.sum()
    return output


def hybrid_recurrent(
    x: HybridInputs, *, window: int, sinks: int, state: HybridState | None = None
) -> tuple[Tensor, HybridState]:
    """The same with a constant-size state, one token at a time: y [T, H, V] and the state after the last.

    A token enters the linear state in the step in which it leaves the window (decayed by gamma^w already);
    a sink never does.
    """
    if state is None:
        state = HybridState(0, [], [], LinearState.zeros(x.phi_k, x.v))
    else:
        state = HybridState(state.num_seen, list(state.sinks), list(state.ring), state.linear)
    outputs = []
    for row in range(x.q.shape[0]):
        _push(x, state, row=row, window=window, sinks=sinks)
        outputs.append(_read(x, state, row=row))
    return torch.stack(outputs), state


def _push(x: HybridInputs, state: HybridState, *, row: int, window: int, sinks: int) -> None:
    """Takes token `row` in: decay the linear part, move what leaves the window into it, keep the new token."""
    position, gamma = state.num_seen, x.log_decay.exp()
    s, z = state.linear.s * gamma[:, None, None], state.linear.z * gamma[:, None]
    if state.ring and state.ring[0][0] == position - window:
        _, _, v, phi_k = state.ring.pop(0)
        entering = (gamma**window)[:, None] * phi_k  # [G, K]
        s, z = s + entering[:, :, None] * v[:, None, :], z + entering
    state.linear = LinearState(s, z)
    if position < sinks:
        state.sinks.append((position, x.k[row], x.v[row]))
    else:
        state.ring.append((position, x.k[row], x.v[row], x.phi_k[row]))
    state.num_seen += 1


def _read(x: HybridInputs, state: HybridState, *, row: int) -> Tensor:
    """y [H, V] of token `row`, which is in the state already."""
    num_heads, size = x.q.shape[1:]
    kept = [(k, v) for _, k, v in state.sinks] + [(k, v) for _, k, v, _ in state.ring]
    keys, values = (torch.stack(tensors) for tensors in zip(*kept, strict=True))  # [exact, G, d], [exact, G, V]
    is_sink = torch.arange(len(kept)) < len(state.sinks)
    heads = []
    for h in range(num_heads):
        g = h * keys.shape[1] // num_heads
        scores = torch.where(is_sink, keys[:, g] @ x.q_sink[row, h], keys[:, g] @ x.q[row, h]) / sqrt(size)
        exact = (scores - scores.max()).exp()
        phi = x.beta[row, h] * x.phi_q[row, h]
        heads.append((exact @ values[:, g] + phi @ state.linear.s[g]) / (exact.sum() + phi @ state.linear.z[g]))
    return torch.stack(heads)
