"""A conversation's state as a file: safetensors with the state's tensors, and who, where and how far in its metadata.

A saved state continues exactly because it holds everything that the next step needs:
    - the tensors after `position` tokens were fed,
    - `pending`, the tokens that were sampled after those and not fed yet (one, or none), which come first
      when the conversation goes on,
    - the fingerprint of the model, and a SHA-256 over metadata and tensors.

Written beside its place, flushed, renamed: a file is wholly there or not at all. Read strictly: names, shapes,
dtypes, sizes, finite values, fingerprint, checksum. Needs no torch, so that the service reads them too.
"""

import hashlib
import json
import os
import re
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from server.engine.types.state import StateLayout, StateTensorLayout

FORMAT, VERSION = "dijiang-state", "1"
MAX_HEADER_BYTES = 4 << 20
MAX_PENDING = 16
MAX_NOTE_CHARACTERS = 1024
MAX_POSITION = 2**62
FILE_NAME = re.compile(r"[A-Za-z0-9_-]{1,100}\.safetensors")
_LENGTH = struct.Struct("<Q")
_NUM_OUTPUTS = "num_outputs"
_METADATA_KEYS = frozenset(
    ("format", "version", "model", "position", "pending", "last_token", "note", "checksum"),
)
Bytes = NDArray[np.uint8]


class SnapshotError(ValueError):
    """A state file that cannot be used; the text is fit for a client.

    Attributes:
        code: `state_invalid`, `state_of_another_model` or `state_not_found`.
    """

    def __init__(self, message: str, *, code: str = "state_invalid") -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One conversation.

    Attributes:
        row: [bytes_per_slot] uint8, the slot.
        position: tokens that were fed, >= 1.
        pending: tokens that come next and were not fed yet.
        last_token: the last token of the conversation, fed or pending.
        note: text of whoever saved it, at most 1,024 characters.
    """

    row: Bytes
    position: int
    pending: tuple[int, ...]
    last_token: int
    note: str = ""


def snapshot_bytes(snapshot: Snapshot, layout: StateLayout) -> Iterator[bytes]:
    """The file's content, in pieces.

    Raises:
        SnapshotError: the state holds NaN or infinities.
    """
    pieces = [_piece(snapshot.row, tensor) for tensor in layout.tensors]
    for tensor, piece in zip(layout.tensors, pieces, strict=True):
        _require_finite(piece, tensor)
    metadata = {
        "format": FORMAT,
        "version": VERSION,
        "model": layout.fingerprint,
        "position": str(snapshot.position),
        "pending": ",".join(map(str, snapshot.pending)),
        "last_token": str(snapshot.last_token),
        "note": snapshot.note,
    }
    header: dict[str, object] = {"__metadata__": metadata | {"checksum": _checksum(metadata, pieces)}}
    begin = 0
    for tensor, piece in zip(layout.tensors, pieces, strict=True):
        end = begin + piece.size
        header[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=True).encode()
    text += b" " * (-len(text) % 64)
    yield _LENGTH.pack(len(text)) + text
    for piece in pieces:
        yield piece.tobytes()


def with_num_outputs(note: str, num_outputs: int) -> str:
    """A note that is a JSON object, and says besides how many tokens the answer had; any other as it is."""
    try:
        content = json.loads(note)
    except ValueError:
        return note
    return json.dumps({**content, _NUM_OUTPUTS: num_outputs}) if isinstance(content, dict) else note


def num_outputs_in(note: str) -> int:
    """What `with_num_outputs` has noted; 0 if it says nothing (the file may come from anywhere)."""
    try:
        number = json.loads(note)[_NUM_OUTPUTS]
    except (ValueError, KeyError, TypeError, RecursionError):
        return 0
    return number if type(number) is int and 0 <= number <= MAX_POSITION else 0


def write_snapshot(path: Path, snapshot: Snapshot, layout: StateLayout) -> int:
    """Writes a file that is on the disk when this returns; its size in bytes.

    Raises:
        SnapshotError: the state holds NaN or infinities.
        OSError: the disk is full or not writable; nothing is left behind.
    """
    return write_file(path, snapshot_bytes(snapshot, layout))


def write_file(path: Path, pieces: Iterable[bytes]) -> int:
    """Writes a file that is wholly on the disk when this returns, or not there; its size in bytes. Raises `OSError`."""
    partial = path.with_name(f".{path.name}.partial")
    num_bytes = 0
    try:
        with partial.open("wb") as file:
            for piece in pieces:
                num_bytes += file.write(piece)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    _flush_folder(path.parent)
    return num_bytes


def read_snapshot(path: Path, layout: StateLayout) -> Snapshot:
    """Reads and checks a whole file.

    Raises:
        SnapshotError: it is not there, damaged, or not a state of this model.
    """
    limit = _LENGTH.size + MAX_HEADER_BYTES + layout.num_data_bytes
    try:
        with path.open("rb") as file:
            content = file.read(limit + 1)
    except FileNotFoundError:
        raise SnapshotError("the state's file is not there any more", code="state_not_found") from None
    except OSError as error:
        raise SnapshotError(f"the state's file cannot be read: {error.strerror}") from error
    return parse_snapshot(content, layout)


def parse_snapshot(content: bytes, layout: StateLayout) -> Snapshot:
    """The state in a file's content.

    Raises:
        SnapshotError: it is damaged, or not a state of this model.
    """
    header, data_begin = _header(content)
    metadata = _metadata(header)
    if metadata["model"] != layout.fingerprint:
        raise SnapshotError(
            f"this is a state of another model (fingerprint {metadata['model'][:24]!r}, "
            f"the model here has {layout.fingerprint!r})",
            code="state_of_another_model",
        )
    data = np.frombuffer(content, dtype=np.uint8)[data_begin:]
    pieces = _pieces(header, data, layout)
    stated = metadata.pop("checksum")
    if _checksum(metadata, pieces) != stated:
        raise SnapshotError("the state is damaged: its checksum does not fit its content")
    row = np.zeros(layout.bytes_per_slot, dtype=np.uint8)
    for tensor, piece in zip(layout.tensors, pieces, strict=True):
        _require_finite(piece, tensor)
        row[tensor.offset : tensor.offset + piece.size] = piece
    return Snapshot(
        row=row,
        position=_number(metadata, "position", least=1),
        pending=_pending(metadata["pending"], layout.vocab_size),
        last_token=_token(metadata["last_token"], layout.vocab_size, "last_token"),
        note=metadata["note"],
    )


def _header(content: bytes) -> tuple[dict[str, Any], int]:
    """The JSON header, and where the data begins."""
    if len(content) < _LENGTH.size:
        raise SnapshotError("this is not a safetensors file: it is too short")
    (length,) = _LENGTH.unpack_from(content)
    if length > MAX_HEADER_BYTES or _LENGTH.size + length > len(content):
        raise SnapshotError("this is not a safetensors file: its header does not fit into it")
    end = _LENGTH.size + length
    try:
        header = json.loads(content[_LENGTH.size : end])
    except (ValueError, RecursionError):
        raise SnapshotError("this is not a safetensors file: its header is not JSON") from None
    if not isinstance(header, dict):
        raise SnapshotError("this is not a safetensors file: its header is not an object")
    return header, end


def _metadata(header: dict[str, Any]) -> dict[str, str]:
    metadata = header.get("__metadata__")
    if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
        raise SnapshotError("this safetensors file holds no saved state")
    if metadata.get("version") != VERSION:
        raise SnapshotError(f"the state has format version {str(metadata.get('version'))[:20]!r}, not {VERSION!r}")
    if metadata.keys() != _METADATA_KEYS or not all(isinstance(value, str) for value in metadata.values()):
        raise SnapshotError("the state's metadata is not complete")
    if len(metadata["note"]) > MAX_NOTE_CHARACTERS:
        raise SnapshotError(f"the state's note has more than {MAX_NOTE_CHARACTERS} characters")
    return cast(dict[str, str], metadata)


def _pieces(header: dict[str, Any], data: Bytes, layout: StateLayout) -> list[Bytes]:
    """The data of each tensor of the layout, in its order."""
    names = header.keys() - {"__metadata__"}
    expected = {tensor.name for tensor in layout.tensors}
    if names != expected:
        differing = sorted(names ^ expected)
        raise SnapshotError(f"the state's tensors are not those of this model: {', '.join(differing[:5])[:200]}")
    if data.size != layout.num_data_bytes:
        raise SnapshotError(f"the state holds {data.size:,} bytes of tensors, this model's {layout.num_data_bytes:,}")
    pieces = []
    begin = 0
    for tensor in layout.tensors:
        end = begin + tensor.num_bytes
        wanted = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [begin, end]}
        if header[tensor.name] != wanted:
            raise SnapshotError(f"{tensor.name}: the state holds {str(header[tensor.name])[:100]}, wanted is {wanted}")
        pieces.append(data[begin:end])
        begin = end
    return pieces


def _piece(row: Bytes, tensor: StateTensorLayout) -> Bytes:
    return row[tensor.offset : tensor.offset + tensor.num_bytes]


def _require_finite(piece: Bytes, tensor: StateTensorLayout) -> None:
    if not _is_finite(piece, tensor.dtype):
        raise SnapshotError(f"the state is not finite: {tensor.name} holds NaN or infinity")


def _is_finite(piece: Bytes, dtype: str) -> bool:
    match dtype:
        case "F64" | "F32" | "F16":
            return bool(np.isfinite(piece.view(_NUMPY[dtype])).all())
        case "BF16":
            return not bool(((piece.view("<u2") & 0x7F80) == 0x7F80).any())
        case _:
            return True


_NUMPY = {"F64": "<f8", "F32": "<f4", "F16": "<f2"}


def _checksum(metadata: dict[str, str], pieces: list[Bytes]) -> str:
    digest = hashlib.sha256(json.dumps(metadata, sort_keys=True, separators=(",", ":")).encode())
    for piece in pieces:
        digest.update(piece.data)
    return digest.hexdigest()


def _number(metadata: dict[str, str], name: str, *, least: int) -> int:
    text = metadata[name]
    number = int(text) if text.isascii() and text.isdigit() and len(text) < 20 else -1
    if not least <= number <= MAX_POSITION:
        raise SnapshotError(f"the state's {name} is {text[:24]!r}, not a number from {least} on")
    return number


def _pending(text: str, vocab_size: int) -> tuple[int, ...]:
    parts = text.split(",") if text else []
    if len(parts) > MAX_PENDING:
        raise SnapshotError(f"the state has {len(parts)} pending tokens, more than {MAX_PENDING}")
    return tuple(_token(part, vocab_size, "pending") for part in parts)


def _token(text: str, vocab_size: int, name: str) -> int:
    token_id = int(text) if text.isascii() and text.isdigit() and len(text) < 12 else -1
    if not 0 <= token_id < vocab_size:
        raise SnapshotError(f"the state's {name} is {text[:24]!r}, outside of the vocabulary of {vocab_size:,} tokens")
    return token_id


def _flush_folder(folder: Path) -> None:
    """So that the new name survives a power cut too."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
