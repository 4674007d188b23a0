"""Sequences that decode token after token in the same slots: what their steps need is made once.

Weights of a step sweep the interpreter's own data from the caches, so that every operation on a tensor between two
steps takes 20 to 100 us. Here there is none.
"""

import ctypes
from array import array
from collections.abc import Sequence
from ctypes import CDLL

import torch
from torch import Tensor

from dijiang_model.native.structures import DrawRules, Matrix, Network
from dijiang_model.state import StateBuffer


class Decoding:
    """N sequences of one token a step. The same bits as `NativeDecoder.step` of the embedded tokens.

    Attributes:
        logits: [N, vocab] fp32 of the last step; the next one overwrites them.
    """

    def __init__(
        self,
        library: CDLL,
        network: Network,
        table: Matrix,
        *,
        kept: object,
        slots: Sequence[int],
        positions: Sequence[int],
        last_token_ids: Tensor,
        state: StateBuffer,
    ) -> None:
        """
        Args:
            library: of `library.load_library`.
            network: the weights.
            kept: what keeps them alive, for as long as these steps may be taken.
            table: what the first block reads of each token.
            slots: N >= 1 of the state's; distinct, but for scratch slot 0.
            positions: N, of the tokens that the first step feeds; the next one feeds those at the positions behind.
            last_token_ids: [slots of the state] int64 on the CPU: a step feeds those of its slots, as they are then.
            state: a buffer on the CPU.

        Raises:
            IndexError: a slot is not among the state's.
        """
        assert len(slots) == len(positions) >= 1
        assert last_token_ids.dtype == torch.int64
        assert last_token_ids.is_contiguous()
        assert len(last_token_ids) == state.num_slots
        assert state.storage.is_contiguous()
        # The kernels do not check: an index out of range would write anywhere.
        if min(slots) < 0 or max(slots) >= state.num_slots:
            raise IndexError(f"slots {min(slots)} to {max(slots)} are not all in 0 to {state.num_slots - 1}")
        num_rows = len(slots)
        self.logits = torch.empty((num_rows, network.head.rows), dtype=torch.float32)
        hidden = torch.empty((num_rows, network.hidden_size), dtype=torch.float32)
        self._chosen = array("q", bytes(8 * num_rows))
        places = (array("q", positions), array("q", slots), array("q", range(num_rows)), array("q", [1]) * num_rows)
        self._run, self._draw, self._table = library.dijiang_decode, library.dijiang_draw, table
        self._alive = (network, kept, hidden, places, last_token_ids, state.storage)
        self._arguments = (
            ctypes.addressof(network),
            ctypes.addressof(table),
            last_token_ids.data_ptr(),
            *(place.buffer_info()[0] for place in places),
            num_rows,
            state.storage.data_ptr(),
            state.storage.shape[1],
            hidden.data_ptr(),
            self.logits.data_ptr(),
        )
        self._num_threads = torch.get_num_threads()
        self._slots = tuple(slots)
        self._last = (ctypes.c_int64 * len(last_token_ids)).from_address(last_token_ids.data_ptr())

    def step(self) -> Tensor:
        """Feeds every sequence's last token and moves its slot on; `logits`. The caller notes the next last tokens."""
        self._feed(None)
        return self.logits

    def choose(self, rules: "ctypes.Array[DrawRules] | None" = None) -> list[int]:
        """The same, then the most likely token of each row, or a drawn one, the sequence's last one from now on.

        Args:
            rules: N, of rows that are drawn; a temperature of 0: the most likely token. None: that of every row.

        Returns:
            N tokens; `choose.NOT_FINITE` where not all logits are finite, and token 0 is the last one.

        Raises:
            MemoryError: there was none.
        """
        chosen, num_rows = self._chosen.buffer_info()
        self._feed(chosen)
        if rules is not None:
            logits = self.logits
            if self._draw(logits.data_ptr(), num_rows, logits.shape[1], rules, chosen, self._num_threads):
                raise MemoryError(f"no memory to draw the tokens of {num_rows} rows")
            for slot, token in zip(self._slots, self._chosen, strict=True):
                self._last[slot] = max(token, 0)
        return self._chosen.tolist()

    def _feed(self, chosen: int | None) -> None:
        if self._run(*self._arguments, chosen, self._num_threads):
            raise MemoryError(f"no memory for a step of {len(self._chosen)} rows")
