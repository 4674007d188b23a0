"""What a model says of each token of a text that it reads at once: what every other way is compared with."""

from collections.abc import Iterable

import torch
from torch import Tensor

from dijiang_model.batch import prefill
from dijiang_model.serving.network import FrozenModel
from dijiang_model.state import StateBuffer


def logits_of(model: FrozenModel, token_ids: Iterable[int]) -> Tensor:
    """[T, vocab] of what follows each token, from a fresh state."""
    tokens = torch.tensor(list(token_ids))
    state = StateBuffer(model.state_spec, 2)
    state.storage.zero_()
    slots, starts = torch.tensor([1]), torch.tensor([0])
    with torch.inference_mode():
        return prefill(model, tokens, lengths=[len(tokens)], slots=slots, starts=starts, state=state)


def log_probabilities(model: FrozenModel, token_ids: Iterable[int]) -> Tensor:
    """The same, normalised."""
    return logits_of(model, token_ids).log_softmax(dim=-1)
