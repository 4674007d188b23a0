"""Text files as windows of tokens in a fixed order: every window once per epoch, none lost or repeated.

Files are strict UTF-8. Their tokens are cut into consecutive windows of one length; the order of the
windows is a permutation that depends on the seed and the epoch alone, so that a step's number says which
windows it reads, and a training that resumes at step n goes on with just the windows that come next.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Tokenizer
from torch import Tensor

from dijiang_model.conversion.training.chat_prompt import RenderChat, plain_chat
from dijiang_model.conversion.training.documents import read_text, text_files
from dijiang_model.errors import ConversionError

BLOCK_CHARACTERS = 2**16


@dataclass(frozen=True, slots=True)
class TokenWindows:
    """Windows of `length` tokens.

    Attributes:
        tokens: [windows, length] int32.
        seed: of the order.
    """

    tokens: npt.NDArray[np.int32]
    seed: int

    def __len__(self) -> int:
        return int(self.tokens.shape[0])

    @property
    def length(self) -> int:
        return int(self.tokens.shape[1])

    def batch(self, step: int, size: int) -> Tensor:
        """The windows of a step, [size, length] int64; epochs follow each other without a seam."""
        first = step * size
        rows = [self._row(index) for index in range(first, first + size)]
        return torch.from_numpy(self.tokens[rows].astype(np.int64))

    def _row(self, index: int) -> int:
        epoch, place = divmod(index, len(self))
        return int(np.random.default_rng((self.seed, epoch)).permutation(len(self))[place])


def load_windows(
    paths: Sequence[Path],
    tokenizer: Tokenizer,
    *,
    length: int,
    seed: int,
    vocab_size: int,
    first: int | None = None,
    render: RenderChat = plain_chat,
) -> TokenWindows:
    """Tokenises files and cuts each into windows; a file's ragged rest is left out.

    Args:
        length: tokens of a window, >= 2.
        seed: of the windows' order.
        vocab_size: of the model.
        first: only so many windows of each file, evenly spread over it; None: all.
        render: makes text of conversations (`documents.read_text`).

    Raises:
        ConversionError: unreadable or wrongly encoded files, a tokenizer that does not fit, or too little text.
    """
    parts = [_cut(_encode(read_text(file, render=render), tokenizer), length, first) for file in text_files(paths)]
    tokens = np.concatenate(parts) if parts else np.zeros((0, length), np.int32)
    if len(tokens) == 0:
        raise ConversionError(
            f"no file of text has {length:,} tokens: give more, or shorter windows "
            "(`train --sequence-length`, `evaluate --length`)"
        )
    if int(tokens.max()) >= vocab_size:
        raise ConversionError(f"the tokenizer gives the id {int(tokens.max()):,}, the model has {vocab_size:,} tokens")
    return TokenWindows(tokens, seed)


def load_tokenizer(folder: Path) -> Tokenizer:
    """`tokenizer.json` of a model folder.

    Raises:
        ConversionError: it is missing or unreadable.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ConversionError(f"{folder} has no tokenizer.json, which training on text needs")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the tokenizers library raises plain Exception
        raise ConversionError(f"{path} is not a readable tokenizer: {error}") from error


def _encode(text: str, tokenizer: Tokenizer) -> npt.NDArray[np.int32]:
    encoded = tokenizer.encode_batch(list(_blocks(text)), add_special_tokens=False)
    return np.array([token for block in encoded for token in block.ids], dtype=np.int32)


def _blocks(text: str) -> Iterable[str]:
    """Cuts at line ends near every `BLOCK_CHARACTERS`: tokenizers slow down on megabytes in one piece."""
    start = 0
    while start < len(text):
        end = text.find("\n", start + BLOCK_CHARACTERS)
        end = len(text) if end < 0 else end
        yield text[start:end]
        start = end


def _cut(tokens: npt.NDArray[np.int32], length: int, first: int | None) -> npt.NDArray[np.int32]:
    whole = len(tokens) // length
    windows = tokens[: whole * length].reshape(whole, length)
    if first is None or first >= whole:
        return windows
    chosen: npt.NDArray[np.int32] = windows[np.linspace(0, whole - 1, first).round().astype(int)]
    return chosen
