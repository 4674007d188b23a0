"""Folders of models as transformers fills them: beside what is there, and never over somebody else's model."""

import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from dijiang_model.checkpoints.checkpoint import empty_network, tensor_problems, write_checkpoint
from dijiang_model.checkpoints.config_json import CONFIG_FILE, MODEL_TYPE, StoredConfig, read_config
from dijiang_model.checkpoints.outputs import is_weights_file
from dijiang_model.errors import CheckpointError, ConfigError
from dijiang_model.formats.problem_list import problem_list
from dijiang_model.formats.tensor_files import TensorInfo, has_weights

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
        CheckpointError: the folder holds another model, tensors are missing or do not fit, or it cannot be written.
    """
    _refuse_another_model(folder)
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
            for old in [path for path in folder.iterdir() if is_weights_file(path) and path.name not in names]:
                old.unlink()
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


def _refuse_another_model(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder} is a file, not a folder")
    if not (folder / CONFIG_FILE).exists():
        if folder.is_dir() and has_weights(folder):
            raise CheckpointError(f"{folder} holds weights without a {CONFIG_FILE}; name another folder")
        return
    try:
        kind = read_config(folder).get("model_type")
    except ConfigError:
        kind = None
    if kind != MODEL_TYPE:
        raise CheckpointError(
            f"{folder} holds another model ({CONFIG_FILE} says {kind!r}), which is not replaced; name another folder"
        )


def _num_bytes(size: int | str) -> int:
    if isinstance(size, int):
        return size
    text = size.strip().upper()
    unit = next((unit for unit in sorted(_UNITS, key=len, reverse=True) if text.endswith(unit)), "")
    number = text.removesuffix(unit).strip()
    if not number.isdigit() or int(number) == 0:
        raise ValueError(f"max_shard_size is {size!r}, must be a number of bytes or a text such as '5GB'")
    return int(number) * _UNITS.get(unit, 1)
