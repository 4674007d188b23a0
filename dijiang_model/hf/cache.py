"""The recurrent state of a batch, as what `generate` carries from step to step."""

from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from dijiang_model.state import StateBuffer, StateSpec


class RecurrentCache(Cache):  # type: ignore[misc]  # transformers has no types
    """States of a batch's rows; their size does not depend on how many tokens they have seen.

    Steps move it on in place. `copy.deepcopy` makes a second one to continue from, as of any cache of transformers.

    Attributes:
        states: slot 0 is scratch, row b has slot b + 1.
        num_tokens: [B] int64 on the CPU, tokens that each row has seen; padding does not count.
        num_columns: columns of `input_ids` so far, padding included.
    """

    def __init__(self, spec: StateSpec, batch_size: int, device: torch.device) -> None:
        super().__init__(layers=[])
        self.states = StateBuffer(spec, batch_size + 1, device, cleared=True)
        self.num_tokens = torch.zeros(batch_size, dtype=torch.int64)
        self.num_columns = 0

    def __deepcopy__(self, memo: dict[int, Any]) -> "RecurrentCache":
        return self._of_rows(torch.arange(self.batch_size))

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Returns the columns that were fed."""
        return self.num_columns

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """Returns -1: there is no maximum."""
        return -1

    @property
    def batch_size(self) -> int:
        return len(self.num_tokens)

    @property
    def is_compileable(self) -> bool:
        return False

    @property
    def is_croppable(self) -> bool:
        return False

    @property
    def is_initialized(self) -> bool:
        return True

    def reset(self) -> None:
        """Forgets all tokens."""
        self.states.storage.zero_()
        self.num_tokens.zero_()
        self.num_columns = 0

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps these rows, in this order; a row may come several times."""
        chosen = self._of_rows(indices)
        self.states, self.num_tokens = chosen.states, chosen.num_tokens

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Makes every row `repeats` of them."""
        self.batch_select_indices(torch.arange(self.batch_size).repeat_interleave(repeats))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Replaces each row by another one."""
        self.batch_select_indices(beam_idx)

    def crop(self, tokens_to_remove: int) -> None:
        """Raises ValueError: a state cannot forget its last tokens."""
        raise ValueError("a recurrent state cannot be cropped; copy it (copy.deepcopy) before feeding what may go")

    def _of_rows(self, rows: Tensor) -> "RecurrentCache":
        device = self.states.storage.device
        other = RecurrentCache(self.states.spec, len(rows), device)
        other.states.storage[1:] = self.states.storage[rows.to(device) + 1]
        other.num_tokens, other.num_columns = self.num_tokens[rows.cpu()].clone(), self.num_columns
        return other
