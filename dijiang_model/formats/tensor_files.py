"""Named tensors in a folder: safetensors or `pytorch_model.bin`, whole or sharded, read one by one.

Files are mapped into memory where the format allows it, so that a tensor costs nothing until it is used.
One file is kept open at a time; a tensor that was read keeps its own mapping alive. Pickles are read
with torch's `weights_only` loader: anything in them but tensors is refused, no code is run.
"""

import pickle
import re
import warnings
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dijiang_model.errors import CheckpointError, ConfigError
from dijiang_model.formats.json_fields import read_json_object
from dijiang_model.formats.model_folder import SAFETENSORS_FILE, SAFETENSORS_INDEX, TORCH_FILE, TORCH_INDEX
from dijiang_model.formats.problem_list import problem_list
from dijiang_model.formats.stub_files import stub_problem

SAFETENSORS_SUFFIX = ".safetensors"

REMAPPED_BYTES = 2**28
UNFINISHED = "was a download broken off? The same `hf download` again fetches what is missing"

SAFETENSORS_DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Shape and dtype of a stored tensor, known without reading it."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class TensorSource(Protocol):
    """Named tensors that can be read one by one."""

    def infos(self) -> Mapping[str, TensorInfo]:
        """All tensors, in the order in which reading them is cheapest."""
        ...

    def read(self, name: str) -> Tensor:
        """One tensor on the CPU; it may alias a file and must not be written to.

        Raises:
            CheckpointError: the file cannot be read any more.
        """
        ...


class _Files:
    """Tensors spread over files, of which one is open at a time."""

    def __init__(self, locations: Mapping[str, Path], infos: Mapping[str, TensorInfo]) -> None:
        self._locations = locations
        self._infos = infos
        self._open_path: Path | None = None
        self._read_open: Callable[[str], Tensor] | None = None
        self._bytes_read = 0

    def infos(self) -> Mapping[str, TensorInfo]:
        return self._infos

    def read(self, name: str) -> Tensor:
        path = self._locations[name]
        # Pages of a mapped file that were read stay in memory as long as its mapping, so it is made anew now and then.
        is_stale = self._bytes_read > REMAPPED_BYTES and _can_map(path)
        if path != self._open_path or self._read_open is None or is_stale:
            self._read_open = None  # frees the last file's memory before the next one is opened
            self._read_open, self._open_path, self._bytes_read = _open(path)[1], path, 0
        tensor = self._read_open(name)
        self._bytes_read += tensor.nbytes
        return tensor


class RenamedTensors:
    """A source under other names."""

    def __init__(self, source: TensorSource, rename: Callable[[str], str]) -> None:
        self._source = source
        self._names = {rename(name): name for name in source.infos()}
        self._infos = {rename(name): info for name, info in source.infos().items()}

    def infos(self) -> Mapping[str, TensorInfo]:
        return self._infos

    def read(self, name: str) -> Tensor:
        return self._source.read(self._names[name])


def open_tensors(folder: Path) -> TensorSource:
    """The tensors of a model folder; safetensors are preferred where both formats are there.

    Raises:
        CheckpointError: no weights, damaged files, or files that contradict their index; all of it listed.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder")
    for single, index in ((SAFETENSORS_FILE, SAFETENSORS_INDEX), (TORCH_FILE, TORCH_INDEX)):
        # As transformers looks: a whole file is read even where an index of other files was left beside it.
        if (folder / single).is_file():
            infos, _ = _open(folder / single)
            return _Files(dict.fromkeys(infos, folder / single), infos)
        if (folder / index).is_file():
            return _open_sharded(folder, _weight_map(folder / index), index)
    for stem, suffix in (("model", SAFETENSORS_SUFFIX), ("pytorch_model", ".bin")):
        shards = _shards(folder, stem, suffix)
        if shards:
            owners = {name: shard for shard in shards for name in _open(folder / shard)[0]}
            return _open_sharded(folder, owners, "their names")
    raise CheckpointError(f"{folder} has neither {SAFETENSORS_FILE} nor {TORCH_FILE} nor shards of them; {UNFINISHED}")


def _shards(folder: Path, stem: str, suffix: str) -> list[str]:
    """Names such as `model-00001-of-00003.safetensors` where no index lists them.

    Raises:
        CheckpointError: some of them are missing.
    """
    pattern = re.compile(re.escape(stem) + r"-(\d{1,6})-of-(\d{1,6})" + re.escape(suffix))
    found = {
        name: match for name in sorted(path.name for path in folder.iterdir()) if (match := pattern.fullmatch(name))
    }
    if not found:
        return []
    totals, numbers = {int(match[2]) for match in found.values()}, [int(match[1]) for match in found.values()]
    if len(totals) > 1 or sorted(numbers) != list(range(1, max(totals) + 1)):
        wanted = " or ".join(map(str, sorted(totals)))
        listed = f"{folder} has no index, and only {len(found)} of {wanted} shards: {', '.join(found)}"[:500]
        raise CheckpointError(f"{listed}; {UNFINISHED}")
    return list(found)


def _open_sharded(folder: Path, weight_map: Mapping[str, str], index: str) -> TensorSource:
    """Args: weight_map: file by tensor; index: what says so."""
    locations: dict[str, Path] = {}
    infos: dict[str, TensorInfo] = {}
    problems: list[str] = []
    for shard in dict.fromkeys(weight_map.values()):
        try:
            shard_infos, _ = _open(folder / shard)
        except CheckpointError as error:
            problems.append(str(error))
            continue
        problems += [f"{name} is twice there" for name in shard_infos if name in infos]
        infos |= shard_infos
        locations |= dict.fromkeys(shard_infos, folder / shard)
        expected = [name for name, owner in weight_map.items() if owner == shard]
        problems += [f"{name} is not in {shard}, as {index} says" for name in expected if name not in shard_infos]
    if problems:
        raise CheckpointError(problem_list(f"{folder} is damaged or not complete ({UNFINISHED})", problems))
    return _Files(locations, infos)


def _weight_map(path: Path) -> dict[str, str]:
    try:
        weight_map = read_json_object(path).get("weight_map")
    except ConfigError as error:
        raise CheckpointError(str(error)) from error
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path} has no weight_map")
    for shard in weight_map.values():
        # A shard is a plain file name: an index must not reach out of its folder.
        if not isinstance(shard, str) or Path(shard).name != shard or shard in ("", ".", ".."):
            raise CheckpointError(f"{path} names the shard {shard!r}, which is not a plain file name")
    return weight_map


def _open(path: Path) -> tuple[dict[str, TensorInfo], Callable[[str], Tensor]]:
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist")
    problem = stub_problem(path)
    if problem is not None:
        raise CheckpointError(problem)
    return _open_safetensors(path) if path.suffix == SAFETENSORS_SUFFIX else _open_torch(path)


def unreadable(path: Path, kind: str) -> str:
    """Returns that a file is not what its name says, in words that say what to do."""
    size = path.stat().st_size
    return f"{path} is not a readable {kind}: it is cut short or damaged ({size:,} bytes); fetch it again"


def _open_safetensors(path: Path) -> tuple[dict[str, TensorInfo], Callable[[str], Tensor]]:
    try:
        file = safe_open(path, framework="pt")
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    except SafetensorError as error:
        raise CheckpointError(unreadable(path, "safetensors file")) from error
    infos = {}
    for name in file.offset_keys():
        view = file.get_slice(name)
        dtype = SAFETENSORS_DTYPES.get(view.get_dtype())
        if dtype is None:
            raise CheckpointError(f"{path}: {name} has the unsupported dtype {view.get_dtype()}")
        infos[name] = TensorInfo(tuple(view.get_shape()), dtype)

    def read(name: str) -> Tensor:
        tensor: Tensor = file.get_tensor(name)
        return tensor

    return infos, read


def _open_torch(path: Path) -> tuple[dict[str, TensorInfo], Callable[[str], Tensor]]:
    loaded = _load_torch(path)
    if not isinstance(loaded, dict):
        raise CheckpointError(f"{path} holds {type(loaded).__name__}, not named tensors")
    tensors: dict[str, Tensor] = {}
    for name, tensor in loaded.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise CheckpointError(f"{path}: the entry {name!r} is {type(tensor).__name__}, not a tensor")
        if tensor.layout != torch.strided or tensor.is_quantized:
            raise CheckpointError(f"{path}: {name} is not a dense tensor")
        tensors[name] = tensor.detach()
    return {
        name: TensorInfo(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()
    }, tensors.__getitem__


def _can_map(path: Path) -> bool:
    """PyTorch files from before torch 1.6 are no zip archives and cannot be mapped."""
    return path.suffix == SAFETENSORS_SUFFIX or zipfile.is_zipfile(path)


def _load_torch(path: Path) -> object:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch comments on pickles that it is about to refuse
            return torch.load(path, map_location="cpu", weights_only=True, mmap=_can_map(path))
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{path} holds more than tensors and is refused; no code in it was run") from error
    except Exception as error:  # the unpickler raises whatever the damage provokes
        raise CheckpointError(f"{path} is not a readable PyTorch file: {error}") from error
