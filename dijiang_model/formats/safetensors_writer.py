"""Sharded safetensors, written tensor by tensor: at most one tensor is in memory at a time.

All names, shapes and dtypes are known beforehand, so each file's header is written first and the data
streamed after it. Data starts at a multiple of 64 bytes, and wide dtypes come before narrow ones, so
that mapped tensors are aligned.
"""

import json
import os
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from dijiang_model.formats.model_folder import SAFETENSORS_FILE, SAFETENSORS_INDEX
from dijiang_model.formats.tensor_files import SAFETENSORS_DTYPES, TensorInfo

DEFAULT_SHARD_BYTES = 2 * 2**30
HEADER_ALIGNMENT_BYTES = 64
WRITE_BYTES = 64 * 2**20

_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}


@dataclass(frozen=True, slots=True)
class Shard:
    """One file and the tensors in it, in order."""

    file_name: str
    names: tuple[str, ...]


def plan_shards(infos: Mapping[str, TensorInfo], max_shard_bytes: int) -> list[Shard]:
    """Splits tensors, in their order, over files of at most `max_shard_bytes` of data each.

    A tensor that is larger alone gets a file of its own.
    """
    groups: list[list[str]] = [[]]
    size = 0
    for name, info in infos.items():
        if groups[-1] and size + num_bytes(info) > max_shard_bytes:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += num_bytes(info)
    if len(groups) == 1:
        return [Shard(SAFETENSORS_FILE, tuple(groups[0]))]
    return [
        Shard(f"model-{number:05d}-of-{len(groups):05d}.safetensors", tuple(names))
        for number, names in enumerate(groups, start=1)
    ]


def write_tensors(
    folder: Path,
    infos: Mapping[str, TensorInfo],
    read: Callable[[str], Tensor],
    *,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    on_written: Callable[[int], None] = lambda num_bytes: None,
) -> None:
    """Writes all tensors of `infos` into an existing folder, with an index if there are several files.

    Args:
        folder: gets the files; each is flushed to the disk.
        infos: what to write, in this order.
        read: gives one tensor, on any device, of exactly the shape and dtype that `infos` says.
        max_shard_bytes: see `plan_shards`.
        on_written: called with the bytes of each tensor after it was written.

    Raises:
        OSError: the disk is full, or another failure to write.
    """
    shards = plan_shards(infos, max_shard_bytes)
    for shard in shards:
        with (folder / shard.file_name).open("wb") as file:
            names = _aligned_order(shard.names, infos)
            file.write(_header(names, infos))
            for name in names:
                _write_data(file, read(name), infos[name])
                on_written(num_bytes(infos[name]))
            flush_to_disk(file)
    if len(shards) > 1:
        write_index(folder, shards, total_bytes=sum(map(num_bytes, infos.values())))


def write_index(folder: Path, shards: Sequence[Shard], *, total_bytes: int) -> None:
    """`model.safetensors.index.json`, as HF reads it."""
    weight_map = {name: shard.file_name for shard in shards for name in shard.names}
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    write_text(folder / SAFETENSORS_INDEX, json.dumps(index, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """A whole UTF-8 file, flushed to the disk."""
    with path.open("wb") as file:
        file.write(text.encode())
        flush_to_disk(file)


def flush_to_disk(file: BinaryIO) -> None:
    """Returns when the file's bytes are on the disk, as far as the system tells."""
    file.flush()
    os.fsync(file.fileno())


def num_bytes(info: TensorInfo) -> int:
    """Bytes of a tensor's data."""
    return prod(info.shape) * info.dtype.itemsize


def _aligned_order(names: Sequence[str], infos: Mapping[str, TensorInfo]) -> list[str]:
    return sorted(names, key=lambda name: -infos[name].dtype.itemsize)


def _header(names: Sequence[str], infos: Mapping[str, TensorInfo]) -> bytes:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name in names:
        end = position + num_bytes(infos[name])
        header[name] = {
            "dtype": _NAMES[infos[name].dtype],
            "shape": list(infos[name].shape),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    padding = -(len(text) + 8) % HEADER_ALIGNMENT_BYTES
    return struct.pack("<Q", len(text) + padding) + text + b" " * padding


def _write_data(file: BinaryIO, tensor: Tensor, info: TensorInfo) -> None:
    assert (tuple(tensor.shape), tensor.dtype) == (info.shape, info.dtype), "the plan and the tensor differ"
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    for start in range(0, data.size, WRITE_BYTES):
        file.write(data[start : start + WRITE_BYTES].data)
