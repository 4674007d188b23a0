"""Where the default model is kept, and whether it is there as this installation makes it. Imports no torch.

A server asks at every start. The whole answer (`default_model.ensure_default_model`) takes torch, which takes longer to
import than everything else that the serving process needs. So it is noted beside the model, together with size and
time of change of all that it depends on: the model's own files, this package's code and adapters. Whatever changes
among these, the note is void.
"""

import hashlib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

MODEL_NAME = "smollm2-135m-dijiang"
UNQUANTIZED = "-float32"
"""At the end of the folder's name where the weights are not quantized."""
_PACKAGE = Path(__file__).parents[1]


def default_home() -> Path:
    """Where models are kept unless the operator says otherwise: `~/.cache/dijiang`."""
    return Path.home() / ".cache" / "dijiang"


def default_folder(home: Path | None = None, *, is_quantized: bool = True) -> Path:
    """The default model's folder, there or not."""
    name = MODEL_NAME if is_quantized else MODEL_NAME + UNQUANTIZED
    return (default_home() if home is None else home) / "models" / name


def is_noted(folder: Path) -> bool:
    """Whether the model in `folder` was found current, and nothing has changed since."""
    with suppress(OSError):
        return _note(folder).read_text() == _signature(folder)
    return False


def note(folder: Path) -> None:
    """Notes that the model in `folder` is current; where that cannot be written, the next start looks again."""
    with suppress(OSError):
        _note(folder).write_text(_signature(folder))


def _note(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.current")


def _signature(folder: Path) -> str:
    """Hexadecimal digits; raises OSError when a file is gone."""
    digest = hashlib.sha256()
    for path in _files(folder):
        status = path.stat()
        digest.update(f"{path}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def _files(folder: Path) -> Iterator[Path]:
    yield folder / "config.json"
    yield from sorted(path for path in folder.iterdir() if path.is_file())
    yield from sorted(_PACKAGE.rglob("*.py"))
    yield from sorted((_PACKAGE / "adapters").glob("*"))
