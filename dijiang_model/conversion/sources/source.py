"""What can be converted: an HF folder, a GGUF file, or a DiJiang checkpoint to be saved anew."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from dijiang_model.checkpoints.checkpoint import open_checkpoint
from dijiang_model.checkpoints.config_json import CONFIG_FILE, MODEL_TYPE, read_stored_config
from dijiang_model.checkpoints.hf_config import base_model_config, eos_ids
from dijiang_model.checkpoints.released_format import is_released_format
from dijiang_model.config import ModelConfig
from dijiang_model.conversion.sources.gguf_tokenizer import write_gguf_tokenizer
from dijiang_model.conversion.sources.tokenizer_files import write_tokenizer
from dijiang_model.errors import ConversionError
from dijiang_model.formats.gguf_source import GgufSource
from dijiang_model.formats.json_fields import read_json_object
from dijiang_model.formats.tensor_files import RenamedTensors, TensorSource, open_tensors

GENERATION_CONFIG_FILE = "generation_config.json"
MAX_CARD_BYTES = 2**20


@dataclass(frozen=True, slots=True)
class Source:
    """An opened source.

    Attributes:
        base: its HF config, verbatim but for `auto_map`.
        config: the network; of a DiJiang checkpoint with its attention, else the backbone.
        is_dijiang: already a DiJiang model, which keeps its attention.
        tensors: under our names.
        teacher, licence: of the model, as far as the source tells.
        dequantised_from: quantized types, e.g. `Q4_1, Q8_0`.
        write_tokenizer: writes the tokenizer into a folder; False where the source has none.
        tokens_trained: seen since the swap, of a DiJiang checkpoint of our format.
    """

    base: Mapping[str, object]
    config: ModelConfig
    is_dijiang: bool
    tensors: TensorSource
    teacher: str
    licence: str | None
    dequantised_from: str | None
    write_tokenizer: Callable[[Path], bool]
    tokens_trained: int = 0


def open_source(path: Path) -> Source:
    """Opens a folder or a `.gguf` file.

    Raises:
        ConversionError: nothing that can be converted.
        ConfigError, CheckpointError: it can, but its config or its weights are unsupported or damaged.
    """
    if path.is_dir():
        return _open_folder(path)
    if path.is_file() and path.suffix.lower() == ".gguf":
        return _open_gguf(path)
    raise ConversionError(f"{path} is neither a model folder nor a .gguf file")


def _open_gguf(path: Path) -> Source:
    gguf = GgufSource(path)
    base = gguf.hf_config()
    config = replace(base_model_config(base), eos_token_ids=gguf.eos_token_ids())
    name = gguf.metadata.get("general.name")
    licence = gguf.metadata.get("general.license")
    return Source(
        base=base,
        config=config,
        is_dijiang=False,
        tensors=gguf,
        teacher=f"{name} ({path.name})" if isinstance(name, str) else path.name,
        licence=licence if isinstance(licence, str) else None,
        dequantised_from=", ".join(gguf.quantized_types) or None,
        write_tokenizer=lambda folder: write_gguf_tokenizer(path, gguf.metadata, folder, vocab_size=config.vocab_size),
    )


def _open_folder(path: Path) -> Source:
    document = read_json_object(path / CONFIG_FILE)
    if document.get("model_type") == MODEL_TYPE:
        return _open_own(path)
    base = {name: value for name, value in document.items() if name != "auto_map"}
    backbone = base_model_config(base)
    tensors = _with_prefix(open_tensors(path), backbone)
    is_dijiang = is_released_format(tensors.infos())
    if is_dijiang:
        checkpoint = open_checkpoint(path)
        backbone, tensors = checkpoint.config, checkpoint.tensors
    config = _with_generation_config(path, backbone)
    return Source(
        base=base,
        config=config,
        is_dijiang=is_dijiang,
        tensors=tensors,
        teacher=_name(path, document),
        licence=_licence(path),
        dequantised_from=None,
        write_tokenizer=lambda folder: write_tokenizer(path, folder, vocab_size=config.vocab_size),
    )


def _with_prefix(tensors: TensorSource, config: ModelConfig) -> TensorSource:
    """The first OPT checkpoints were saved without the outer module's prefix, as HF's loader knows too."""
    if config.family != "opt" or not any(name.startswith("decoder.") for name in tensors.infos()):
        return tensors
    return RenamedTensors(tensors, lambda name: f"model.{name}" if name.startswith("decoder.") else name)


def _open_own(path: Path) -> Source:
    stored = read_stored_config(path)
    if stored.quantization is not None:
        raise ConversionError(
            f"the weights in {path} are {stored.quantization.weights}; take the model it was made from"
        )
    return Source(
        base=stored.base,
        config=stored.config,
        is_dijiang=True,
        tensors=open_tensors(path),
        teacher=stored.origin.teacher,
        licence=stored.origin.licence,
        dequantised_from=stored.origin.dequantised_from,
        write_tokenizer=lambda folder: write_tokenizer(path, folder, vocab_size=stored.config.vocab_size),
        tokens_trained=stored.origin.tokens_trained,
    )


def _with_generation_config(path: Path, config: ModelConfig) -> ModelConfig:
    """The ids that HF's `generate` would stop at: those of generation_config.json, if it names any."""
    file = path / GENERATION_CONFIG_FILE
    value = read_json_object(file).get("eos_token_id") if file.is_file() else None
    if value is None:
        return config
    ids = eos_ids(value)
    if ids is None or any(item >= config.vocab_size for item in ids):
        raise ConversionError(f"{file} has eos_token_id {value!r}, must be ids below vocab_size {config.vocab_size}")
    return replace(config, eos_token_ids=ids)


def _name(path: Path, document: Mapping[str, object]) -> str:
    """The name that the config states, unless it is a path on somebody's machine."""
    name = document.get("_name_or_path")
    is_hub_name = isinstance(name, str) and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) is not None
    if is_hub_name and not str(name).startswith("."):
        return str(name)
    # A hub cache keeps `models--owner--name/snapshots/<commit>`.
    cached = re.search(r"/models--([^/]+)/snapshots/[^/]+$", path.absolute().as_posix())
    return cached[1].replace("--", "/") if cached else path.resolve().name


def _licence(path: Path) -> str | None:
    """`license` in the front matter of the source's model card."""
    card = path / "README.md"
    if not card.is_file() or card.stat().st_size > MAX_CARD_BYTES:
        return None
    front_matter = re.match(r"---\n(.*?)\n---", card.read_text("utf-8", errors="replace"), re.DOTALL)
    match = re.search(r"^license:\s*['\"]?([\w.+-]+)", front_matter[1], re.MULTILINE) if front_matter else None
    return match[1] if match else None
