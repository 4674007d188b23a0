"""Folders of models as transformers fills them: beside what is there, and never over somebody else's model."""

import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from dijiang_model.checkpoints.checkpoint import empty_network, tensor_problems, write_checkpoint
from dijiang_model.checkpoints.config_json import CONFIG_FILE, MODEL_TYPE, StoredConfig
from dijiang_model.checkpoints.default_sampling import SAMPLING_FILE
from dijiang_model.checkpoints.outputs import is_weights_name
from dijiang_model.errors import CheckpointError, ConfigError
from dijiang_model.formats.json_fields import read_json_object
from dijiang_model.formats.model_folder import SAFETENSORS_FILE, SAFETENSORS_INDEX
from dijiang_model.formats.problem_list import problem_list
from dijiang_model.formats.tensor_files import TensorInfo

_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def save(
    folder: Path,
    stored: StoredConfig,
    tensors: Mapping[str, Tensor],
    *,
    eos_token_ids: tuple[int, ...],
    max_shard_size: int | str,
) -> None:
    """Writes weights and `config.json` into a folder that may hold other files, e.g. a trainer's.

    Each file is replaced whole, so that a model which is mapped from the same folder stays what it is.

    Args:
        stored: the model's configuration.
        tensors: its state dict, on any device; a tied head may be beside the embedding.
        eos_token_ids: at which answers end besides those of `stored`.
        max_shard_size: bytes of a file of weights, or a text such as `5GB`.

    Raises:
        CheckpointError: the folder holds another model or files of one, tensors are missing or do not fit, or it cannot
            be written.
    """
    own = _own_files(folder)
    max_shard_bytes = _num_bytes(max_shard_size)
    tensors = _fitting(tensors, stored)
    ends = tuple(dict.fromkeys((*stored.config.eos_token_ids, *eos_token_ids)))
    stored = replace(stored, config=replace(stored.config, eos_token_ids=ends))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".dijiang-", dir=folder) as beside:
            written = Path(beside) / "model"
            write_checkpoint(written, stored, _infos(tensors), tensors.__getitem__, max_shard_bytes=max_shard_bytes)
            names = {path.name for path in written.iterdir()}
            taken = sorted(name for name in names - own if (folder / name).exists())
            if taken:
                raise CheckpointError(f"{folder} holds {taken[0]}, which its model does not name; name another folder")
            for old in own - names:
                (folder / old).unlink(missing_ok=True)
            for name in sorted(names, key=lambda name: name == CONFIG_FILE):
                (written / name).replace(folder / name)
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be written: {error.strerror}") from error


def _fitting(tensors: Mapping[str, Tensor], stored: StoredConfig) -> dict[str, Tensor]:
    """Returns just the model's own; raises CheckpointError if they are not all there as they should be."""
    expected = empty_network(stored).state_dict()
    problems = tensor_problems(stored.config, _infos(expected), _infos(tensors))
    if problems:
        hint = " (an adapter that is not merged? `merge_and_unload()` merges one)"
        raise CheckpointError(problem_list(f"the state dict does not fit the model{hint}", problems))
    return {name: tensors[name].detach() for name in expected}


def _infos(tensors: Mapping[str, Tensor]) -> dict[str, TensorInfo]:
    return {name: TensorInfo(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}


def _own_files(folder: Path) -> set[str]:
    """Names of the config and the weights, there or not, of the model in a folder; empty: there is none.

    Raises:
        CheckpointError: it is somebody else's model, or what would be replaced is a link, as in a hub's cache.
    """
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder} is a file, not a folder")
    if not folder.exists():
        return set()
    written = (CONFIG_FILE, SAMPLING_FILE)
    found = sorted(path for path in folder.iterdir() if path.name in written or is_weights_name(path.name))
    linked = next((path for path in found if path.is_symlink()), None)
    if linked is not None:
        raise CheckpointError(f"{linked} is a link, and what it leads to is not replaced; name another folder")
    if not found:
        return set()
    if not (folder / CONFIG_FILE).exists():
        raise CheckpointError(f"{folder} holds {found[0].name} without a {CONFIG_FILE}; name another folder")
    try:
        kind = read_json_object(folder / CONFIG_FILE).get("model_type")
    except ConfigError:
        kind = None
    if kind != MODEL_TYPE:
        raise CheckpointError(
            f"{folder} holds another model ({CONFIG_FILE} says {kind!r}), which is not replaced; name another folder"
        )
    return {CONFIG_FILE, SAFETENSORS_FILE, *_indexed_files(folder / SAFETENSORS_INDEX)}


def _indexed_files(index: Path) -> set[str]:
    """Names of an index and of what it lists; empty where it is none."""
    try:
        listed = read_json_object(index).get("weight_map") if index.is_file() else None
    except ConfigError:
        listed = None
    if not isinstance(listed, dict):
        return set()
    return {index.name, *(name for name in map(str, listed.values()) if is_weights_name(name))}


def _num_bytes(size: int | str) -> int:
    if isinstance(size, int):
        return size
    text = size.strip().upper()
    unit = next((unit for unit in sorted(_UNITS, key=len, reverse=True) if text.endswith(unit)), "")
    number = text.removesuffix(unit).strip()
    if not number.isdigit() or int(number) == 0:
        raise ValueError(f"max_shard_size is {size!r}, must be a number of bytes or a text such as '5GB'")
    return int(number) * _UNITS.get(unit, 1)
