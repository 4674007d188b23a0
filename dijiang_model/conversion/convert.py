"""Converts a pretrained model, tensor by tensor, into a folder that appears complete or not at all."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from dijiang_model.checkpoints.checkpoint import has_valid, tensor_problems, write_checkpoint
from dijiang_model.checkpoints.config_json import Origin, StoredConfig
from dijiang_model.checkpoints.outputs import CALIBRATION_FILE, CARD_FILE, check_replaceable, output_folder
from dijiang_model.checkpoints.quantized import choose, weights_to_quantize
from dijiang_model.config import ModelConfig
from dijiang_model.conversion.calibration.calibrate import Calibrated, calibrate
from dijiang_model.conversion.calibration.reading import calibration_contexts
from dijiang_model.conversion.model_card import UNTRAINED_WARNING, model_card, needs_training, title
from dijiang_model.conversion.quantize import with_rounding
from dijiang_model.conversion.recipes import Recipe, converted_config, fresh_tensor, is_fresh
from dijiang_model.conversion.sources.find_source import find_source
from dijiang_model.conversion.sources.source import Source, open_source, sha256_of, source_fingerprint, with_ends
from dijiang_model.conversion.sources.tokenizer_files import StagedTokenizer, staged_tokenizer
from dijiang_model.errors import ConversionError
from dijiang_model.families import FAMILIES, build_model
from dijiang_model.formats.problem_list import problem_list
from dijiang_model.formats.safetensors_writer import DEFAULT_SHARD_BYTES, num_bytes, write_text
from dijiang_model.formats.tensor_files import TensorInfo, TensorSource
from dijiang_model.quantization.config import WeightKind
from dijiang_model.quantization.tensors import QuantizedTensors

CONVERTER_VERSION = 2
"""Raised whenever the same source and options would give another model."""
DTYPES: Mapping[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}

Progress = Callable[[int, int], None]
"""Called with (bytes written, bytes in all) after each tensor."""


@dataclass(frozen=True, slots=True)
class Conversion:
    """What a conversion made.

    Attributes:
        out: the model's folder.
        title: what it may be called, e.g. `DiJiang hybrid, window 60+4`.
        state_bytes: of one conversation.
        memory: what such a state holds, in words.
        has_tokenizer: without one the model serves token ids only.
        ends: the tokens at which an answer ends, as text with the id.
        warnings: sentences that the user should read.
    """

    out: Path
    title: str
    state_bytes: int
    memory: str
    has_tokenizer: bool
    ends: tuple[str, ...]
    warnings: tuple[str, ...]


def convert(
    source: str | Path,
    out: str | Path,
    *,
    recipe: Recipe | None = None,
    window: int = 60,
    sinks: int = 4,
    state_bytes: int | None = None,
    calibration_text: Sequence[Path] = (),
    dtype: str | None = None,
    weights: WeightKind | None = None,
    seed: int = 0,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    overwrite: bool = False,
    on_progress: Progress = lambda written, total: None,
    on_layer: Progress = lambda done, total: None,
) -> Conversion:
    """Makes a DiJiang model of an HF folder, a GGUF file or a released DiJiang checkpoint.

    At most one tensor is in memory at a time, and one layer while it is calibrated.

    Args:
        source: folder or `.gguf` file.
        out: folder to write.
        recipe: None: `hybrid`, or the attention of the checkpoint where the source is a DiJiang model.
        window, sinks: recent tokens >= 1 and first ones >= 0 that `hybrid` attends to by exact softmax.
        state_bytes: of one conversation, `hybrid` only: calibration chooses what is kept, and the window too.
        calibration_text: what the teacher reads then; none: a text of this package.
        dtype: of the stored weights, a key of `DTYPES`; None: the source's (float32 if it is quantized).
        weights: projections, embeddings and head rounded to int8 or int4 (`dijiang_model.quantization`).
        overwrite: replace a model that this program saved in `out` (`outputs.check_replaceable`).
        on_layer: called with layers calibrated and in all.

    Raises:
        ModelError: the source is unsupported or damaged, the options do not fit it, or `out` cannot be written.
    """
    source, out = find_source(Path(source)), Path(out)
    place = output_folder(out, inputs=[source])
    check_replaceable(place, overwrite=overwrite)
    opened = open_source(source)
    with staged_tokenizer(opened.write_tokenizer) as tokenizer:
        opened = with_ends(opened, tokenizer.end_id)
        window = window if state_bytes is None else 1  # the budget chooses another one
        config, origin = _target(opened, source, recipe=recipe, window=window, sinks=sinks, seed=seed)
        config, calibrated = _within_budget(opened, config, origin, tokenizer, state_bytes, calibration_text, on_layer)
        weights_dtype = DTYPES[dtype] if dtype is not None else _stored_dtype(opened)
        plan = _plan(opened, config, origin, calibrated, dtype=weights_dtype, weights=weights, name=out.absolute().name)
        write_checkpoint(
            place,
            plan.stored,
            plan.tensors.infos(),
            plan.tensors.read,
            fill=partial(_fill, plan=plan, tokenizer=tokenizer, calibrated=calibrated),
            max_shard_bytes=max_shard_bytes,
            overwrite=overwrite,
            on_written=_ByteCounter(on_progress, sum(map(num_bytes, plan.tensors.infos().values()))),
        )
        return _made(plan, out, opened, tokenizer)


@dataclass(frozen=True, slots=True)
class _Plan:
    """What will be written, known before anything is.

    Attributes:
        tensors: of the target, each made when it is read.
        card: text of the model card.
        state_bytes: of one conversation.
    """

    stored: StoredConfig
    tensors: TensorSource
    card: str
    state_bytes: int


def _fill(folder: Path, *, plan: _Plan, tokenizer: StagedTokenizer, calibrated: Calibrated | None) -> None:
    """Writes what stands beside the weights."""
    tokenizer.copy_to(folder)
    write_text(folder / CARD_FILE, plan.card)
    if calibrated is not None:
        write_text(folder / CALIBRATION_FILE, calibrated.calibration.json())


def _made(plan: _Plan, out: Path, opened: Source, tokenizer: StagedTokenizer) -> Conversion:
    config, has_tokenizer = plan.stored.config, tokenizer.is_there
    return Conversion(
        out=out,
        title=title(config),
        state_bytes=plan.state_bytes,
        memory=config.memory,
        has_tokenizer=has_tokenizer,
        ends=tokenizer.described(config.eos_token_ids),
        warnings=_warnings(config, plan.stored.origin, opened, has_tokenizer=has_tokenizer),
    )


def _with_whole_window(config: ModelConfig, state_bytes: int) -> ModelConfig:
    """The network of a teacher that sees a window alone, which is kept whole: it computes what the teacher does.

    Raises:
        ConversionError: the budget has no room for it.
    """
    seen = config.teacher_window
    config = converted_config(config, Recipe.HYBRID, window=seen, sinks=0)
    needed = build_model(config).state_spec.bytes_per_slot
    if needed > state_bytes:
        raise ConversionError(
            f"the teacher sees the last {seen:,} tokens alone, and never learned to recall older ones; all of them "
            f"take {needed:,} bytes: give --state-bytes {needed} or more, or a shorter --window in its place"
        )
    return config


def _within_budget(
    opened: Source,
    config: ModelConfig,
    origin: Origin,
    tokenizer: StagedTokenizer,
    state_bytes: int | None,
    text: Sequence[Path],
    on_layer: Progress,
) -> tuple[ModelConfig, Calibrated | None]:
    """A config whose state has so many bytes at most, and what calibration found, where it had to look."""
    if state_bytes is None:
        return config, None
    if origin.recipe != Recipe.HYBRID:
        raise ConversionError(f"a budget of bytes is for the recipe hybrid, not for {origin.recipe}")
    if config.teacher_window > 0:
        return _with_whole_window(config, state_bytes), None
    contexts = calibration_contexts(config, tokenizer.folder if tokenizer.is_there else None, text)
    calibrated = calibrate(config, opened.tensors.read, contexts, state_bytes=state_bytes, on_layer=on_layer)
    return calibrated.config, calibrated


def _plan(
    opened: Source,
    config: ModelConfig,
    origin: Origin,
    calibrated: Calibrated | None,
    *,
    dtype: torch.dtype,
    weights: WeightKind | None,
    name: str,
) -> _Plan:
    """Raises ConversionError if the source's tensors do not fit the config."""
    model = build_model(config, device="meta", dtype=dtype)
    spec = model.state_spec
    expected = {name: TensorInfo(tuple(t.shape), t.dtype) for name, t in model.state_dict().items()}
    learned = {} if calibrated is None else calibrated.tensors
    reader = _Reader(opened, config, expected, learned, seed=origin.seed)
    card = model_card(
        config,
        origin,
        spec,
        name=name,
        dtype=str(dtype).removeprefix("torch."),
        calibration=None if calibrated is None else calibrated.calibration,
    )
    stored = StoredConfig(config=config, base=opened.base, origin=origin)
    if weights is None:
        return _Plan(stored, reader, card, spec.bytes_per_slot)
    quantization = choose(weights, reader, model)
    tensors = QuantizedTensors(reader, weights_to_quantize(model, quantization))
    stored = replace(stored, quantization=quantization)
    return _Plan(stored, tensors, with_rounding(card, quantization), spec.bytes_per_slot)


class _Reader:
    """The target's tensors: the source's, cast, calibrated, or fresh ones."""

    def __init__(
        self,
        source: Source,
        config: ModelConfig,
        expected: Mapping[str, TensorInfo],
        learned: Mapping[str, Tensor],
        *,
        seed: int,
    ) -> None:
        """Raises ConversionError if the source's tensors do not fit its config; all of it listed."""
        self._source, self._config, self._learned, self._seed = source, config, learned, seed
        fresh = {} if source.is_dijiang else _fresh_parts(config, expected)
        self._fresh = {name: part for name, part in fresh.items() if name not in learned}
        made = self._fresh.keys() | learned.keys()
        taken = {name: info for name, info in expected.items() if name not in made}
        found = source.tensors.infos()
        problems = tensor_problems(config, taken, found)
        if problems:
            hint = _misfit_hint(source, found)
            raise ConversionError(problem_list(f"the source's tensors do not fit its config{hint}", problems))
        order = [*(name for name in found if name in taken), *self._fresh, *learned]
        self._infos = {name: expected[name] for name in order}

    def infos(self) -> Mapping[str, TensorInfo]:
        """The source's in its order, then those that no source has."""
        return self._infos

    def read(self, name: str) -> Tensor:
        """One tensor in the target's dtype.

        Raises:
            ConversionError: it has values that are not finite.
        """
        info = self._infos[name]
        if name in self._fresh:
            layer, inner = self._fresh[name]
            value = fresh_tensor(inner, info.shape, self._config, layer=layer, seed=self._seed)
        elif name in self._learned:
            value = self._learned[name]
        else:
            value = self._source.tensors.read(name)
        value = value.to(info.dtype)
        if not has_valid(name, value):
            raise self._damage(name)
        return value

    def _damage(self, first: str) -> ConversionError:
        """Looks at all that comes after `first` too."""
        names = [*self._infos]
        made = self._fresh.keys() | self._learned.keys()
        later = [name for name in names[names.index(first) + 1 :] if name not in made]
        read = self._source.tensors.read
        damaged = [first, *(name for name in later if not has_valid(name, read(name).to(self._infos[name].dtype)))]
        problems = [f"{name} has values that are not finite in {self._infos[name].dtype}" for name in damaged]
        return ConversionError(problem_list("the source is damaged, or --dtype cannot represent it", problems))


def _misfit_hint(source: Source, names: Iterable[str]) -> str:
    """What a misfit is likely to come from."""
    if any(".lora_" in name or "base_model.model." in name for name in names):
        return " (an adapter of PEFT that was not merged? `merge_and_unload()` before `save_pretrained` merges it)"
    architectures = source.base.get("architectures")
    kind = architectures[0] if isinstance(architectures, list) and architectures else ""
    is_other = isinstance(kind, str) and kind.endswith(("Classification", "Answering", "RewardModel"))
    return f" (a {kind} has another head than a language model's)" if is_other else ""


def _fresh_parts(config: ModelConfig, names: Iterable[str]) -> dict[str, tuple[int, str]]:
    """Layer and name under the attention module of each tensor that no teacher has."""
    paths = FAMILIES[config.family].paths
    parts: dict[str, tuple[int, str]] = {}
    for layer in range(config.num_layers):
        prefix = f"{paths.attention_of(layer)}."
        parts |= {name: (layer, name.removeprefix(prefix)) for name in names if name.startswith(prefix)}
    return {name: part for name, part in parts.items() if is_fresh(part[1])}


class _ByteCounter:
    def __init__(self, on_progress: Progress, total: int) -> None:
        self._on_progress, self._total, self._written = on_progress, total, 0

    def __call__(self, num: int) -> None:
        self._written += num
        self._on_progress(self._written, self._total)


def _target(
    opened: Source, source: Path, *, recipe: Recipe | None, window: int, sinks: int, seed: int
) -> tuple[ModelConfig, Origin]:
    origin = Origin(
        recipe="checkpoint",
        teacher=opened.teacher,
        licence=opened.licence,
        dequantised_from=opened.dequantised_from,
        tokens_trained=opened.tokens_trained,
        seed=seed,
        converter_version=CONVERTER_VERSION,
        source_sha256=sha256_of(source) if source.is_file() else opened.source_sha256,
        teacher_fingerprint=source_fingerprint(opened) if source.is_dir() else None,
    )
    if opened.is_dijiang:
        if recipe is not None:
            raise ConversionError(f"{source} is a DiJiang model already; without a recipe it is saved as it is")
        return opened.config, origin
    recipe = Recipe.HYBRID if recipe is None else recipe
    if recipe == Recipe.HYBRID and (window < 1 or sinks < 0):
        raise ConversionError(
            f"window {window} and sinks {sinks}: a hybrid needs a window of 1 or more, sinks 0 or more"
        )
    seen = opened.config.teacher_window
    if recipe == Recipe.HYBRID and 0 < seen < window:
        raise ConversionError(f"the teacher sees the last {seen:,} tokens alone: --window is {seen:,} at most")
    config = converted_config(opened.config, recipe, window=window, sinks=sinks)
    return config, replace(origin, recipe=str(recipe))


def _stored_dtype(opened: Source) -> torch.dtype:
    """The dtype that holds most of the source's values."""
    counts: dict[torch.dtype, int] = {}
    for info in opened.tensors.infos().values():
        counts[info.dtype] = counts.get(info.dtype, 0) + num_bytes(info) // info.dtype.itemsize
    most = max(counts, key=lambda dtype: counts[dtype], default=torch.float32)
    return most if most in DTYPES.values() else torch.float32


def _warnings(config: ModelConfig, origin: Origin, opened: Source, *, has_tokenizer: bool) -> tuple[str, ...]:
    warnings = [*opened.notes]
    if needs_training(config, origin):
        warnings.append(UNTRAINED_WARNING)
    if not has_tokenizer:
        warnings.append(
            "The source has no tokenizer: the model serves prompts of token ids only. Put tokenizer.json and "
            "tokenizer_config.json of the model that it was made of beside its config.json to serve text."
        )
    if not config.eos_token_ids:
        warnings.append("The source names no end of sequence: answers run to their token limit.")
    return tuple(warnings)
