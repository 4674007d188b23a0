"""Which file or folder a source means, and which slip is likely where it means nothing that can be converted."""

import re
from pathlib import Path

from dijiang_model.checkpoints.config_json import CONFIG_FILE
from dijiang_model.errors import ConversionError
from dijiang_model.formats.model_folder import GGUF_SUFFIX, inner_models, peft_problem
from dijiang_model.formats.stub_files import link_problem, stub_problem

GGUF_MAGIC = b"GGUF"
_HUB_URL = re.compile(r"(?:https?:/+)?(?:www\.)?(?:huggingface\.co|hf\.co)/([^/]+/[^/?#]+).*")
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")


def find_source(path: Path) -> Path:
    """Returns the folder of an HF or DiJiang model, or the GGUF file.

    A name on the Hugging Face hub means its snapshot in the local cache, a folder with nothing but one GGUF file that
    file. Nothing is downloaded.

    Raises:
        ConversionError: there is no such thing, or it is something else; the sentence names what to do.
    """
    if path.is_dir():
        return _in_folder(path)
    if path.is_file():
        return _file(path)
    url = _HUB_URL.fullmatch(str(path))
    name = str(path) if url is None else url[1]
    if _HUB_NAME.fullmatch(name) is None:
        known = _cached_names(name)
        hint = f"; did you mean {known[0]}, which the hub's cache has?" if known else ""
        raise ConversionError(f"{path} does not exist; a source is a model folder or a .gguf file{hint}")
    snapshot = _cached_snapshot(name)
    if snapshot is None:
        raise ConversionError(
            f"{path} does not exist. If it is a name on the Hugging Face hub: `hf download {name}` fetches the model, "
            "and the same command converts it then"
        )
    return _in_folder(snapshot)


def _in_folder(folder: Path) -> Path:
    problem = link_problem(folder) or peft_problem(folder)
    if problem is not None:
        raise ConversionError(problem)
    if (folder / CONFIG_FILE).is_file():
        return folder
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() == GGUF_SUFFIX and path.is_file())
    if len(files) == 1:
        return _file(files[0])
    if files:
        raise ConversionError(f"{folder} holds {len(files)} GGUF files; name one: {', '.join(map(str, files))}"[:1000])
    inner = inner_models(folder)
    hint = f"; did you mean {inner[0]}?" if inner else ""
    raise ConversionError(f"{folder} holds no {CONFIG_FILE}, so it is no model folder{hint}")


def _file(path: Path) -> Path:
    try:
        problem = stub_problem(path)
        with path.open("rb") as file:
            is_gguf = file.read(len(GGUF_MAGIC)) == GGUF_MAGIC
    except OSError as error:
        raise ConversionError(f"{path} cannot be read: {error.strerror}") from error
    if problem is not None:
        raise ConversionError(problem)
    if is_gguf or path.suffix.lower() == GGUF_SUFFIX:
        return path
    raise ConversionError(f"{path} is no GGUF file; of other formats name the folder, here {path.parent}")


def _cached_snapshot(name: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache  # rarely needed

    found = try_to_load_from_cache(name, CONFIG_FILE)
    return Path(found).parent if isinstance(found, str) else None


def _cached_names(name: str) -> list[str]:
    """Repositories in the hub's cache that have this name behind their owner's."""
    from huggingface_hub.constants import HF_HUB_CACHE  # rarely needed

    folders = Path(HF_HUB_CACHE).glob("models--*--*")
    names = sorted(folder.name.removeprefix("models--").replace("--", "/", 1) for folder in folders)
    return [found for found in names if found.partition("/")[2].lower() == name.lower()]
