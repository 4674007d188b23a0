"""Which file or folder a source means, and which slip is likely where it means nothing that can be converted."""

import re
from pathlib import Path

from dijiang_model.checkpoints.config_json import CONFIG_FILE
from dijiang_model.errors import ConfigError, ConversionError
from dijiang_model.formats.json_fields import read_json_object
from dijiang_model.formats.stub_files import stub_problem
from dijiang_model.formats.tensor_files import has_weights

GGUF_MAGIC, GGUF_SUFFIX = b"GGUF", ".gguf"
PEFT_CONFIG_FILE = "adapter_config.json"
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
    if _HUB_NAME.fullmatch(str(path)) is None:
        raise ConversionError(f"{path} does not exist; a source is a model folder or a .gguf file")
    snapshot = _cached_snapshot(str(path))
    if snapshot is None:
        raise ConversionError(
            f"{path} does not exist. If it is a name on the Hugging Face hub: `hf download {path}` fetches the model, "
            "and the same command converts it then"
        )
    return _in_folder(snapshot)


def peft_problem(folder: Path) -> str | None:
    """Returns what to do with a folder that holds an adapter of the library PEFT and no model; None: it does not."""
    if not (folder / PEFT_CONFIG_FILE).is_file() or has_weights(folder):
        return None
    try:
        base = read_json_object(folder / PEFT_CONFIG_FILE).get("base_model_name_or_path")
    except ConfigError:
        base = None
    of_base = f" of {base}" if isinstance(base, str) else ""
    return (
        f"{folder} holds a PEFT adapter{of_base}, not a whole model; merge it first: "
        "peft.AutoPeftModelForCausalLM.from_pretrained(FOLDER).merge_and_unload().save_pretrained(MERGED), "
        "and save the tokenizer beside it"
    )


def _in_folder(folder: Path) -> Path:
    problem = peft_problem(folder)
    if problem is not None:
        raise ConversionError(problem)
    if (folder / CONFIG_FILE).is_file():
        return folder
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() == GGUF_SUFFIX and path.is_file())
    if len(files) == 1:
        return _file(files[0])
    if files:
        raise ConversionError(f"{folder} holds {len(files)} GGUF files; name one: {', '.join(map(str, files))}"[:1000])
    inner = [*folder.glob(f"*/{CONFIG_FILE}"), *folder.glob(f"snapshots/*/{CONFIG_FILE}")]
    hint = f"; did you mean {sorted(inner)[0].parent}?" if inner else ""
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
