"""A saved model rounded into another folder, weight by weight."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from dijiang_model.checkpoints.checkpoint import open_readable, require_fit, write_checkpoint
from dijiang_model.checkpoints.config_json import StoredConfig, read_stored_config
from dijiang_model.checkpoints.outputs import CARD_FILE, check_replaceable, output_folder
from dijiang_model.checkpoints.quantized import choose, weights_to_quantize
from dijiang_model.conversion.model_card import model_card
from dijiang_model.conversion.sources.tokenizer_files import write_tokenizer
from dijiang_model.errors import QuantizationError
from dijiang_model.families import build_model
from dijiang_model.formats.safetensors_writer import DEFAULT_SHARD_BYTES, num_bytes, write_text
from dijiang_model.model import DiJiangForCausalLM
from dijiang_model.quantization.config import DEFAULT_GROUP_SIZE, Quantization, WeightKind
from dijiang_model.quantization.tensors import QuantizedTensors


@dataclass(frozen=True, slots=True)
class QuantizedFolder:
    """What was written: how weights were rounded, and the bytes of all tensors before and after."""

    quantization: Quantization
    bytes_before: int
    bytes_after: int


def quantize_folder(
    folder: Path,
    out: Path,
    *,
    kind: WeightKind,
    group_size: int = DEFAULT_GROUP_SIZE,
    has_minimums: bool | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    overwrite: bool = False,
    on_progress: Callable[[int, int], None] = lambda written, total: None,
) -> QuantizedFolder:
    """Writes `folder`, a model of our own format, into `out` with its weights rounded.

    Args:
        group_size: int4 only.
        has_minimums: int4 only; None: where they pay (`tensors.minimums_pay`).
        on_progress: called with (bytes written, bytes in all) after each tensor.

    Raises:
        QuantizationError: the weights are rounded already, or cannot be.
        ModelError: `folder` is damaged or of another format, or `out` cannot be written.
    """
    place = output_folder(out, inputs=[folder])
    check_replaceable(place, overwrite=overwrite)
    stored, checkpoint = read_stored_config(folder), open_readable(folder)
    if stored.quantization is not None:
        raise QuantizationError(
            f"the weights in {folder} are {stored.quantization.weights} already; round the model that it was made from"
        )
    model = build_model(stored.config, device="meta")
    require_fit(checkpoint, model, folder)
    quantization = choose(kind, checkpoint.tensors, model, group_size=group_size, has_minimums=has_minimums)
    tensors = QuantizedTensors(checkpoint.tensors, weights_to_quantize(model, quantization))
    known = model.state_dict()
    infos = {name: info for name, info in tensors.infos().items() if name in known or tensors.is_quantized(name)}
    total, written = sum(map(num_bytes, infos.values())), 0

    def fill(target: Path) -> None:
        write_tokenizer(folder, target, vocab_size=stored.config.vocab_size)
        card = _card(folder, stored, model, name=out.absolute().name)
        write_text(target / CARD_FILE, with_rounding(card, quantization))

    def count(num: int) -> None:
        nonlocal written
        written += num
        on_progress(written, total)

    write_checkpoint(
        place,
        replace(stored, quantization=quantization),
        infos,
        tensors.read,
        fill=fill,
        max_shard_bytes=max_shard_bytes,
        overwrite=overwrite,
        on_written=count,
    )
    before = sum(num_bytes(info) for name, info in checkpoint.tensors.infos().items() if name in known)
    return QuantizedFolder(quantization, before, total)


def _card(folder: Path, stored: StoredConfig, model: DiJiangForCausalLM, *, name: str) -> str:
    """The folder's model card; a new one where it has none."""
    card = folder / CARD_FILE
    if card.is_file():
        return card.read_text(encoding="utf-8", errors="replace")
    return model_card(stored.config, stored.origin, model.state_spec, name=name, dtype="float32")


def with_rounding(card: str, quantization: Quantization) -> str:
    """A model card with a section on the weights' rounding."""
    return f"{card.rstrip()}\n\n## Quantized weights\n\n{description(quantization)}\n"


def description(quantization: Quantization) -> str:
    """In a sentence or two, for people."""
    if quantization.weights == "int8":
        return "Projections, token embedding and output head are int8 with a scale for each row."
    groups = "a scale and a minimum" if quantization.has_minimums else "a scale"
    return (
        f"Projections are int4 with {groups} (fp16) for each group of {quantization.group_size} inputs, "
        f"{quantization.bits_per_weight:g} bits a weight; token embedding and output head are int8 with a scale for "
        "each row."
    )
