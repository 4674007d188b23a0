"""Where a command may write: never to its own inputs, and over nothing but what this program wrote.

Every command that writes a folder asks `output_folder` before it works, and `check_replaceable` decides what
`--overwrite` may remove. A folder counts as this program's where its `config.json` says so and it holds nothing but the
files of a saved model; a single file of another name beside them is somebody's work, and the folder stays.
"""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from dijiang_model.checkpoints.config_json import CONFIG_FILE, MODEL_TYPE
from dijiang_model.checkpoints.default_sampling import SAMPLING_FILE
from dijiang_model.errors import CheckpointError, ConfigError
from dijiang_model.formats.json_fields import read_json_object
from dijiang_model.formats.model_folder import SAFETENSORS_FILE, SAFETENSORS_INDEX

CARD_FILE = "README.md"
CALIBRATION_FILE = "calibration.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
)
_MODEL_FILES = frozenset((CONFIG_FILE, SAMPLING_FILE, CARD_FILE, CALIBRATION_FILE, *TOKENIZER_FILES))
_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")

_Identity = tuple[int, int]


def output_folder(out: Path, *, inputs: Iterable[Path]) -> Path:
    """Returns the folder that `out` names, links resolved.

    Folders are compared as the file system knows them, so that neither links nor another spelling hide one.

    Args:
        out: there or not.
        inputs: files and folders that the command reads; for those in a folder that are links, what they point to too.

    Raises:
        CheckpointError: `out` is, contains or lies in one of the inputs, or cannot be resolved.
    """
    place = _resolved(out)
    own, around = _identity(place), set(_identities(place))
    for given in inputs:
        for found in _with_linked_files(_resolved(given)):
            identity = _identity(found)
            if identity is None:
                continue
            if identity == own:
                same = "" if str(out) == str(given) else f" is {given}, which"
                raise CheckpointError(f"{out}{same} is read here; name another folder to write")
            if own is not None and own in _identities(found):
                raise CheckpointError(f"{out} contains {given}, which is read here; name another folder to write")
            if identity in around:
                raise CheckpointError(f"{out} lies in {given}, which is read here; name a folder outside of it")
    return place


def check_replaceable(out: Path, *, overwrite: bool) -> None:
    """Returns where a model may be written to `out`: nothing is there, an empty folder, or a model to be replaced.

    Raises:
        CheckpointError: a file, a folder with anything that is not a saved model's, or a model without `overwrite`.
    """
    if not out.is_dir():
        if out.exists():
            raise CheckpointError(f"{out} exists and is not a folder")
        return
    if not any(out.iterdir()):
        return
    foreign = foreign_entry(out)
    if foreign is not None:
        raise CheckpointError(
            f"{out} holds {foreign}, which is none of the files of a model saved here, and is never replaced; "
            "name another folder"
        )
    if not overwrite:
        raise CheckpointError(f"{out} exists and is not empty; --overwrite replaces it")


def check_new_run(out: Path, names: Iterable[str]) -> None:
    """Returns where a training run can begin in `out`.

    Args:
        names: files that a run writes.

    Raises:
        CheckpointError: one of them is there already; an empty one, of a run that ended before its first step, does
            not count.
    """
    found = next((name for name in names if _holds_something(out / name)), None)
    if found is not None:
        raise CheckpointError(
            f"{out} holds {found} of an earlier run, which is not overwritten: `--resume` continues that run, "
            "another `--out` begins a new one"
        )


def _holds_something(path: Path) -> bool:
    return path.is_symlink() or (path.exists() and not (path.is_file() and path.stat().st_size == 0))


def foreign_entry(folder: Path) -> str | None:
    """The name of something in a folder that is no file of a model saved by this program; None: there is nothing."""
    entries = sorted(folder.iterdir())
    foreign = next((entry for entry in entries if not _is_model_file(entry)), None)
    if foreign is None and not _has_own_config(folder):
        foreign = next((entry for entry in entries if entry.name == CONFIG_FILE), entries[0] if entries else None)
    return None if foreign is None else foreign.name


def holds_only_model_files(folder: Path) -> bool:
    """Whether the names are those of a saved model's files, complete or not."""
    return all(_is_model_file(entry) for entry in folder.iterdir())


def is_weights_name(name: str) -> bool:
    """Whether a file of this name holds a saved model's weights, or lists them."""
    return name in (SAFETENSORS_FILE, SAFETENSORS_INDEX) or _SHARD.fullmatch(name) is not None


def _is_model_file(entry: Path) -> bool:
    is_known = entry.name in _MODEL_FILES or is_weights_name(entry.name)
    return is_known and entry.is_file() and not entry.is_symlink()


def _has_own_config(folder: Path) -> bool:
    try:
        return read_json_object(folder / CONFIG_FILE).get("model_type") == MODEL_TYPE
    except ConfigError:
        return False


def _resolved(path: Path) -> Path:
    try:
        return path.resolve()
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{path} cannot be resolved: {error}") from error


def _with_linked_files(path: Path) -> Iterator[Path]:
    """A file or folder; of a folder also what the links in it point to, as in a cache of the Hugging Face hub."""
    yield path
    if path.is_dir():
        yield from (entry.resolve() for entry in path.iterdir() if entry.is_symlink() and entry.exists())


def _identities(path: Path) -> Iterator[_Identity]:
    """Of a resolved path and of all folders above it, as far as they exist."""
    for place in (path, *path.parents):
        identity = _identity(place)
        if identity is not None:
            yield identity


def _identity(path: Path) -> _Identity | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino
