"""Sampling with a form that does not depend on the requests, so that it can be captured; the same tokens as `Sampler`.

Rows that want more than this has (penalties, biases, grammars, ...) make the whole step go through `Sampler.sample`.
"""

from collections.abc import Sequence as Items
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from dijiang_model.ops.drawing import Draws
from dijiang_model.ops.selection import chosen_tokens
from server.engine.fast_steps.graphs import DecodeGraphs
from server.engine.sampling.penalties import is_penalised
from server.engine.sampling.sampler import KEEP_ALL_MASS, clamped_temperature, uniform_of
from server.engine.sequence import Chunk
from server.engine.transfer import Transfer

Kind = Literal["greedy", "drawn", "filtered"]
KINDS: tuple[Kind, ...] = ("greedy", "drawn", "filtered")
"""argmax; with temperatures and min-p; with top-k and top-p as well. Each is one launch where kernels draw."""
_NUM_PLACES = 2
"""Integers of a row before those of sampling: slot and position."""


def record(graphs: DecodeGraphs, vocab_size: int) -> None:
    """Records every kind for every bucket, on rows that are all padding."""
    for bucket in graphs.buckets:
        transfer = Transfer()
        transfer.integers([0] * (_NUM_PLACES * bucket))
        prepare((), bucket, vocab_size, transfer)
        graphs.feed(bucket, transfer.send(graphs.device).words)
    for kind in KINDS:
        graphs.record_sampling(kind, partial(choose, kind=kind))


def kind_of(chunks: Items[Chunk], vocab_size: int) -> Kind | None:
    """The simplest kind that serves all these rows; None: some row wants more."""
    kind: Kind = "greedy"
    for chunk in chunks:
        if not _is_plain(chunk):
            return None
        sampling = chunk.sequence.sampling
        if sampling.temperature > 0:
            if sampling.top_p < 1 or 0 < sampling.top_k < vocab_size:
                kind = "filtered"
            elif kind == "greedy":
                kind = "drawn"
    return kind


def _is_plain(chunk: Chunk) -> bool:
    sampling, sequence = chunk.sequence.sampling, chunk.sequence
    assert chunk.output_index is not None
    return (
        sequence.constraint is None
        and not (sampling.allowed_token_ids or sampling.bad_words or sampling.logit_bias)
        and not is_penalised(sequence)
        and chunk.output_index >= sampling.min_tokens
        and (sampling.temperature == 0 or sampling.typical_p >= 1)
    )


def prepare(chunks: Items[Chunk], bucket: int, vocab_size: int, transfer: Transfer) -> None:
    """Adds a step's fields, behind its slots and positions; rows up to the bucket's are greedy."""
    params = [chunk.sequence.sampling for chunk in chunks]
    rest = bucket - len(params)
    top_k = [one.top_k if 0 < one.top_k < vocab_size else vocab_size for one in params]
    transfer.integers(top_k + [vocab_size] * rest)
    transfer.reals([uniform_of(chunk) for chunk in chunks] + [0.0] * rest)
    temperatures = [clamped_temperature(one.temperature) if one.temperature > 0 else 0.0 for one in params]
    transfer.reals(temperatures + [0.0] * rest)
    transfer.reals([one.min_p for one in params] + [0.0] * rest)
    transfer.reals([one.top_p if one.top_p < 1 else KEEP_ALL_MASS for one in params] + [KEEP_ALL_MASS] * rest)


def choose(logits: Tensor, words: Tensor, *, kind: Kind) -> Tensor:
    """Device side: logits [R, vocab] fp32 and a step's words [F, R] int64 -> [R] int64, negative where not finite."""
    draws = _draws(words, logits.shape[-1], is_filtered=kind == "filtered")
    return chosen_tokens(logits, draws, is_greedy=kind == "greedy")


def _draws(words: Tensor, vocab_size: int, *, is_filtered: bool) -> Draws:
    """The fields of `prepare`; greedy rows have temperature 0."""
    top_k, reals = words[_NUM_PLACES], words[_NUM_PLACES + 1 :].view(torch.float64)
    uniforms, temperatures, min_p, top_p = reals
    if not is_filtered:
        return Draws(uniforms, temperatures, min_p)
    return Draws(uniforms, temperatures, min_p, top_k, max_top_k=vocab_size, top_p=top_p)
