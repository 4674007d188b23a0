"""What lies where the folder of a model should: known by its files' names, without reading weights."""

from pathlib import Path

from dijiang_model.errors import ConfigError
from dijiang_model.formats.json_fields import read_json_object
from dijiang_model.program import program

CONFIG_FILE = "config.json"
SAFETENSORS_FILE = "model.safetensors"
SAFETENSORS_INDEX = "model.safetensors.index.json"
TORCH_FILE = "pytorch_model.bin"
TORCH_INDEX = "pytorch_model.bin.index.json"
ADAPTER_FILE = "adapter.safetensors"
PEFT_CONFIG_FILE = "adapter_config.json"
GGUF_SUFFIX = ".gguf"


def has_weights(folder: Path) -> bool:
    """Whether `open_tensors` would find files of weights in a folder, readable or not."""
    names = (SAFETENSORS_FILE, SAFETENSORS_INDEX, TORCH_FILE, TORCH_INDEX)
    patterns = ("model-*-of-*.safetensors", "pytorch_model-*-of-*.bin")
    return any((folder / name).is_file() for name in names) or any(any(folder.glob(name)) for name in patterns)


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


def inner_models(folder: Path) -> list[Path]:
    """Folders of models below one that is none: its folders, the snapshots of a hub's repository, of a whole cache."""
    patterns = ("*", "snapshots/*", "models--*/snapshots/*")
    return sorted(path.parent for pattern in patterns for path in folder.glob(f"{pattern}/{CONFIG_FILE}"))


def no_model_problem(path: Path) -> str | None:
    """Returns why a path is not the folder of a model, and what to type; None: it may be one."""
    if path.is_dir():
        return _folder_problem(path)
    if not path.exists():
        return f"{path} is not the folder of a model: it does not exist, and nothing is downloaded"
    if path.suffix.lower() == GGUF_SUFFIX:
        return f"{path} is a file, not the folder of a model; `{program()} convert {path} OUT` makes one of it"
    if path.name == ADAPTER_FILE:
        return f"{path} is an adapter, not the folder of a model; `{program()} merge MODEL {path} OUT` makes one of it"
    return f"{path} is a file, not the folder of a model"


def _folder_problem(folder: Path) -> str | None:
    problem = peft_problem(folder)
    if problem is not None or (folder / CONFIG_FILE).is_file():
        return problem
    if (folder / ADAPTER_FILE).is_file():
        return (
            f"{folder} is the folder of a training run, not of a model; `{program()} merge MODEL {folder} OUT` makes "
            "one of the MODEL that was trained"
        )
    if any(path.suffix.lower() == GGUF_SUFFIX for path in folder.iterdir()):
        return f"{folder} holds a GGUF file; `{program()} convert {folder} OUT` makes a model of it"
    inner = inner_models(folder)
    hint = f"; did you mean {inner[0]}?" if inner else ""
    return f"{folder} is not the folder of a model: it has no {CONFIG_FILE}{hint}"
