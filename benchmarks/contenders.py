"""Who is measured: our models by the kind of their weights, and steps of theirs and ours as functions to time."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from benchmarks.machine import PLAIN, synchronised
from dijiang_model.batch import PackedBatch, decode
from dijiang_model.checkpoints.checkpoint import load_model, load_quantization
from dijiang_model.errors import QuantizationError
from dijiang_model.model import DiJiangForCausalLM
from dijiang_model.native.choose import greedy_tokens
from dijiang_model.native.library import load_library
from dijiang_model.quantization.config import WeightKind
from dijiang_model.serving.network import FrozenModel, freeze
from dijiang_model.state import StateBuffer


def load_models(folder: Path, weights: Sequence[str], *, device: str) -> dict[str, DiJiangForCausalLM]:
    """One model for each kind of weights, all heads of the linear part awake."""
    return {kind: awake(load_weights(folder, kind, device=device)) for kind in weights}


def load_weights(folder: Path, kind: str, *, device: str) -> DiJiangForCausalLM:
    """The model as it is, with weights of one of the kinds `machine.WEIGHTS`.

    Raises:
        ModelError: the folder is not a model, or its weights were rounded to another kind.
    """
    if kind in PLAIN:
        if (stored := load_quantization(folder)) is not None:
            raise QuantizationError(
                f"the weights in {folder} are stored in {stored.weights}, so there is no {kind} to measure; "
                f"pass --weights {stored.weights}, or the model from which they were rounded"
            )
        return load_model(folder, device=device, dtype=getattr(torch, PLAIN[kind]))
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    return load_model(folder, device=device, dtype=dtype, weights=cast(WeightKind, kind))


@torch.no_grad()
def awake(model: DiJiangForCausalLM) -> DiJiangForCausalLM:
    """Lets the linear part speak in every head, as in a trained model: a silent one would spare us its read-out."""
    for attention in model.attentions:
        if attention.linear.attention.window > 0:
            attention.linear.mix_bias.clamp_(min=-20.0)
    return model


def our_step(network: DiJiangForCausalLM, *, num_rows: int, position: int) -> Callable[[], object]:
    """One decode step of `num_rows` conversations, then the most likely token of each, chosen as the engine does."""
    model = freeze(network)
    device = model.device
    library = load_library() if device.type == "cpu" else None
    state = StateBuffer(model.state_spec, num_rows + 1, device)
    state.storage.zero_()
    token_ids = torch.full((num_rows,), _token(model, 500), device=device)
    slots = torch.arange(1, num_rows + 1, device=device)
    positions = torch.full((num_rows,), position, device=device)

    decoding = None
    if library is not None:
        last, places = torch.full((num_rows + 1,), _token(model, 500)), range(1, num_rows + 1)
        decoding = model.decoding(slots=places, positions=[position] * num_rows, last_token_ids=last, state=state)
    if decoding is not None:
        return decoding.choose

    def step() -> Tensor:
        logits = decode(model, token_ids, slots=slots, positions=positions, state=state)
        positions.add_(1)
        return logits.argmax(-1) if library is None else greedy_tokens(logits.float(), library)

    return synchronised(step, str(device))


def our_prefill(network: DiJiangForCausalLM, *, lengths: Sequence[int]) -> Callable[[], object]:
    """Prompts of these lengths in one packed batch, each into a fresh slot; the logits of each one's last token."""
    model = freeze(network)
    device = model.device
    state = StateBuffer(model.state_spec, len(lengths) + 1, device)
    positions = torch.cat([torch.arange(length, device=device) for length in lengths])
    slots = torch.arange(1, len(lengths) + 1, device=device)
    last = torch.tensor(lengths, device=device).cumsum(0) - 1
    batch = PackedBatch(positions % _token(model, 1000), positions, slots, tuple(lengths), 0, last)

    def prefill() -> object:
        state.storage.zero_()
        return model(batch, state)

    return synchronised(prefill, str(device))


def their_prefill(twin: Any, *, lengths: Sequence[int], device: str) -> Callable[[], object]:
    """The same prompts through HF's model, padded on the left, into a new cache."""
    longest = max(lengths)
    token_ids = torch.zeros((len(lengths), longest), dtype=torch.int64, device=device)
    mask = torch.zeros_like(token_ids)
    for row, length in enumerate(lengths):
        token_ids[row, longest - length :] = torch.arange(length) % min(1000, twin.config.vocab_size)
        mask[row, longest - length :] = 1
    # Without a mask where none is needed: sdpa then takes its faster causal path.
    padding: Mapping[str, Tensor] = {} if len(set(lengths)) == 1 else {"attention_mask": mask}
    return synchronised(lambda: twin(token_ids, use_cache=True, logits_to_keep=1, **padding).logits, device)


def has_transformers_twin(folder: Path) -> bool:
    """Whether `transformers_twin` can make the softmax model of this folder: LLaMA's family, its config at hand."""
    document = json.loads((folder / "config.json").read_text())
    return isinstance(document.get("base"), dict) and document["base"].get("model_type") == "llama"


def _token(model: FrozenModel, wanted: int) -> int:
    """An id within the vocabulary."""
    return min(wanted, model.config.vocab_size - 1)
