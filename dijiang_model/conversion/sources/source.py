"""What can be converted: an HF folder, a GGUF file, or a DiJiang checkpoint to be saved anew."""

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dijiang_model.checkpoints.checkpoint import open_checkpoint
from dijiang_model.checkpoints.config_json import CONFIG_FILE, MODEL_TYPE, read_stored_config
from dijiang_model.checkpoints.fingerprint import fingerprint
from dijiang_model.checkpoints.hf_config import base_model_config
from dijiang_model.checkpoints.released_format import is_released_format
from dijiang_model.config import ModelConfig
from dijiang_model.conversion.sources.folded_scale import with_folded_scale
from dijiang_model.conversion.sources.gguf_source import GgufSource
from dijiang_model.conversion.sources.gguf_tokenizer import write_gguf_tokenizer
from dijiang_model.conversion.sources.tokenizer_files import write_tokenizer
from dijiang_model.conversion.sources.unfused import unfused
from dijiang_model.errors import ConversionError
from dijiang_model.families import FAMILIES, build_model
from dijiang_model.families.config_fields import eos_ids
from dijiang_model.formats.json_fields import read_json_object
from dijiang_model.formats.tensor_files import RenamedTensors, TensorSource, open_tensors

COMPARED_ROWS = 4096
HASH_BYTES = 2**22
UNTIED_NOTE = (
    "The config ties the output head to the embedding, but the stored head differs from it: the head is kept, untied."
)
_COMPILED, _WRAPPER = "_orig_mod.", "module."
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
        eos_token_ids: that the source's configs name; the tokenizer may name another. Empty: none is named.
        notes: sentences on what was found and decided, for the user.
        source_sha256, teacher_fingerprint: of a DiJiang checkpoint of our format, as it has recorded them.
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
    eos_token_ids: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()
    source_sha256: str | None = None
    teacher_fingerprint: str | None = None


def open_source(path: Path) -> Source:
    """Opens a folder or a GGUF file, as `find_source` gives it.

    Raises:
        ConversionError: nothing that can be converted.
        ConfigError, CheckpointError: it can, but its config or its weights are unsupported or damaged.
    """
    return _open_folder(path) if path.is_dir() else _open_gguf(path)


def sha256_of(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(HASH_BYTES):
            digest.update(block)
    return digest.hexdigest()


def source_fingerprint(source: Source) -> str | None:
    """Of the weights in an HF folder (see `checkpoints.fingerprint`); of another source what it has recorded."""
    if source.is_dijiang:
        return source.teacher_fingerprint
    own = build_model(source.config).state_dict()
    infos = {name: info for name, info in source.tensors.infos().items() if name in own}
    return fingerprint(source.config, infos, source.tensors.read)


def _open_gguf(path: Path) -> Source:
    gguf = GgufSource(path, FAMILIES.values())
    base = gguf.hf_config()
    config = replace(base_model_config(base), eos_token_ids=gguf.eos_token_ids())
    name = gguf.metadata.get("general.name")
    licence = gguf.metadata.get("general.license")
    return Source(
        base=base,
        config=config,
        is_dijiang=False,
        tensors=with_folded_scale(unfused(gguf, config), config),
        teacher=f"{name} ({path.name})" if isinstance(name, str) else path.name,
        licence=licence if isinstance(licence, str) else None,
        dequantised_from=", ".join(gguf.quantized_types) or None,
        write_tokenizer=lambda folder: write_gguf_tokenizer(path, gguf.metadata, folder, vocab_size=config.vocab_size),
        eos_token_ids=gguf.eos_token_ids(),
    )


def _open_folder(path: Path) -> Source:
    document = read_json_object(path / CONFIG_FILE)
    if document.get("model_type") == MODEL_TYPE:
        return _open_own(path)
    base = {name: value for name, value in document.items() if name != "auto_map"}
    backbone = base_model_config(base)
    tensors = unfused(with_usual_names(open_tensors(path), backbone), backbone)
    is_dijiang = is_released_format(tensors.infos())
    if is_dijiang:
        checkpoint = open_checkpoint(path)
        backbone, tensors = checkpoint.config, checkpoint.tensors
    notes: tuple[str, ...] = ()
    if backbone.tie_word_embeddings and not has_equal_head(tensors, backbone):
        base, notes = base | {"tie_word_embeddings": False}, (UNTIED_NOTE,)
        backbone = replace(backbone, tie_word_embeddings=False)
    config, eos_token_ids = backbone, _named_ends(path, document, backbone)
    tensors = tensors if is_dijiang else with_folded_scale(tensors, config)
    return Source(
        base=base,
        config=config,
        is_dijiang=is_dijiang,
        tensors=tensors,
        teacher=_name(path, document),
        licence=_licence(path),
        dequantised_from=None,
        write_tokenizer=lambda folder: write_tokenizer(path, folder, vocab_size=config.vocab_size),
        eos_token_ids=eos_token_ids,
        notes=notes,
    )


def with_usual_names(tensors: TensorSource, config: ModelConfig) -> TensorSource:
    """The tensors under the family's names, whatever wrapped the module that was saved.

    `torch.compile` puts `_orig_mod.` into names, data-parallel training `module.` before them; a backbone that was
    saved without its head lacks the outer prefix, as the first OPT checkpoints do. A tied embedding may be stored as
    the head.
    """
    names = [name.replace(_COMPILED, "") for name in tensors.infos()]
    wrapper = _WRAPPER if names and all(name.startswith(_WRAPPER) for name in names) else ""
    names = [name.removeprefix(wrapper) for name in names]
    paths = FAMILIES[config.family].paths
    head, embedding, outer = f"{paths.head}.weight", f"{paths.embedding}.weight", paths.outer
    lacks_outer = not any(name.startswith(outer) for name in names)
    is_stored_as_head = config.tie_word_embeddings and head in names and embedding not in names and not lacks_outer

    def usual(name: str) -> str:
        name = name.replace(_COMPILED, "").removeprefix(wrapper)
        if name == head:
            return embedding if is_stored_as_head else name
        return f"{outer}{name}" if lacks_outer else name

    return RenamedTensors(tensors, usual) if any(usual(name) != name for name in tensors.infos()) else tensors


def has_equal_head(tensors: TensorSource, config: ModelConfig) -> bool:
    """Whether the output head may be the embedding: it is not stored, or stored with the same values."""
    paths, infos = FAMILIES[config.family].paths, tensors.infos()
    head, embedding = f"{paths.head}.weight", f"{paths.embedding}.weight"
    if head not in infos or embedding not in infos:
        return True
    if infos[head].shape != infos[embedding].shape:
        return False
    pairs = zip(tensors.read(head).split(COMPARED_ROWS), tensors.read(embedding).split(COMPARED_ROWS), strict=True)
    return all(bool((one == other).all()) for one, other in pairs)


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
        eos_token_ids=stored.config.eos_token_ids,
        source_sha256=stored.origin.source_sha256,
        teacher_fingerprint=stored.origin.teacher_fingerprint,
    )


def _named_ends(path: Path, document: Mapping[str, object], config: ModelConfig) -> tuple[int, ...]:
    """The ends of an answer that generation_config.json and config.json name."""
    file = path / GENERATION_CONFIG_FILE
    value = read_json_object(file).get("eos_token_id") if file.is_file() else None
    ids = eos_ids(value)
    if ids is None or any(item >= config.vocab_size for item in ids):
        raise ConversionError(f"{file} has eos_token_id {value!r}, must be ids below vocab_size {config.vocab_size}")
    return _united(ids, config.eos_token_ids if "eos_token_id" in document else ())


def with_ends(source: Source, tokenizer_end: int | None) -> Source:
    """The source with every end of an answer that is named: by its configs, and by its tokenizer.

    A chat model made of a base model often ends its turns with a token that only the tokenizer names. Where nothing
    names one, the family's default stays.

    Args:
        tokenizer_end: id of the tokenizer's end of sequence; None: it names none.
    """
    ids = _united(source.eos_token_ids, () if tokenizer_end is None else (tokenizer_end,))
    return replace(source, config=replace(source.config, eos_token_ids=ids)) if ids else source


def _united(*ids: Sequence[int]) -> tuple[int, ...]:
    """Every id once, in the order in which they are named."""
    return tuple(dict.fromkeys(item for some in ids for item in some))


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
