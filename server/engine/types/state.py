"""Plain values about saved and cached states that cross the engine's process boundary. Standard library only."""

from dataclasses import dataclass
from math import prod

DTYPE_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}


@dataclass(frozen=True, slots=True)
class StateTensorLayout:
    """One tensor of a slot.

    Attributes:
        name: unique, e.g. `layers.3.linear_state`.
        shape: of one conversation.
        dtype: as safetensors spells it, e.g. `F32`.
        offset: first byte in the slot.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    offset: int

    @property
    def num_bytes(self) -> int:
        return prod(self.shape) * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class StateLayout:
    """What a saved state of this model looks like.

    Attributes:
        fingerprint: of the model; states of another one are refused.
        vocab_size: token ids are 0 .. vocab_size - 1.
        bytes_per_slot: of a slot, alignment included.
        tensors: in storage order.
    """

    fingerprint: str
    vocab_size: int
    bytes_per_slot: int
    tensors: tuple[StateTensorLayout, ...]

    @property
    def num_data_bytes(self) -> int:
        """All tensors together, without alignment: the size of a file's data."""
        return sum(tensor.num_bytes for tensor in self.tensors)


@dataclass(frozen=True, slots=True)
class StateOptions:
    """Where a request's conversation comes from, and where it goes.

    Files are names in the folder that service and engine share (`EngineConfig.states_folder`).

    Attributes:
        load_from: file of the state to go on from; the prompt is what comes after it. None: a new conversation.
        save_to: file to write at the end, before the terminal event; None: none.
        prompt_only: save the state after the prompt, whatever is sampled; use with `max_tokens` 1.
        note: text to keep in the file, at most 1,024 characters.
        cache_namespace: prefixes are shared within it alone (it stands for the owner, the salt, and the state that
            the prompt follows); None: the request neither uses nor fills the prefix cache.
        cache_points: lengths of prefixes of the prompt that are worth keeping, such as the system prompt's.
    """

    load_from: str | None = None
    save_to: str | None = None
    prompt_only: bool = False
    note: str = ""
    cache_namespace: str | None = None
    cache_points: tuple[int, ...] = ()


NO_STATE = StateOptions()


@dataclass(frozen=True, slots=True)
class Resumption:
    """How far a request had come when it was suspended, for the request that goes on with it.

    Attributes:
        num_outputs: tokens that it had put out; they are the last ones of the prompt now.
        num_fed: tokens of the prompt that are in the state of `load_from`; 0: that state comes before the prompt.
    """

    num_outputs: int
    num_fed: int


@dataclass(frozen=True, slots=True)
class SavedState:
    """What the engine has written, in a terminal event.

    Attributes:
        file: the name that the request gave.
        position: tokens that were fed.
        pending: tokens that were sampled after those, and come first when the conversation goes on.
        last_token: the last token, fed or pending.
        num_bytes: size of the file.
    """

    file: str
    position: int
    pending: tuple[int, ...]
    last_token: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class PrefixCacheStats:
    """How the prefix cache does: gauges of this moment, and totals since the start."""

    num_entries: int = 0
    num_bytes: int = 0
    num_lookups: int = 0
    num_hits: int = 0
    num_cached_tokens: int = 0
    num_evictions: int = 0


NO_PREFIX_CACHE = PrefixCacheStats()
