"""Loading and saving models, strictly: everything that is wrong is found before anything is loaded, and listed.

Two formats are read: our own (`dijiang_model.checkpoints.config_json` beside safetensors) and the authors' released
one (`dijiang_model.checkpoints.released_format`). The network is built without memory and gets the files' tensors;
where the dtype fits they stay mapped files, without a copy. Loading reads each tensor once, to see that
its values are finite: one pass at memory speed, which also brings the file into memory. No code that a
checkpoint names or holds is ever run.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from dijiang_model.checkpoints.atomic_folder import atomic_folder
from dijiang_model.checkpoints.config_json import (
    CONFIG_FILE,
    MODEL_TYPE,
    Origin,
    StoredConfig,
    base_document,
    parse_stored_config,
    read_config,
    stored_config_text,
)
from dijiang_model.checkpoints.quantized import choose, install, weights_to_quantize
from dijiang_model.checkpoints.released_format import (
    ReleasedTensors,
    is_released_format,
    released_model_config,
)
from dijiang_model.config import ModelConfig
from dijiang_model.errors import CheckpointError, QuantizationError
from dijiang_model.families import FAMILIES, build_model
from dijiang_model.formats.problem_list import problem_list
from dijiang_model.formats.safetensors_writer import DEFAULT_SHARD_BYTES, num_bytes, write_tensors, write_text
from dijiang_model.formats.tensor_files import TensorInfo, TensorSource, open_tensors
from dijiang_model.model import DiJiangForCausalLM
from dijiang_model.program import program
from dijiang_model.quantization.config import Quantization, WeightKind
from dijiang_model.quantization.modules import quantized_weights
from dijiang_model.quantization.tensors import QuantizedTensors

CHECKED_ELEMENTS = 2**24
MIX_BIAS = "linear.mix_bias"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint opened but not loaded: what it describes, and its tensors under our names."""

    config: ModelConfig
    tensors: TensorSource
    quantization: Quantization | None = None


def open_checkpoint(path: Path) -> Checkpoint:
    """Opens a model folder of either format and reads its config, not its tensors.

    Raises:
        ConfigError: unsupported or contradictory values.
        CheckpointError: no weights, damaged files, or the weights of an unconverted model.
    """
    document = read_config(path)
    if document.get("model_type") == MODEL_TYPE:
        stored = parse_stored_config(document)
        return Checkpoint(stored.config, open_tensors(path), quantization=stored.quantization)
    tensors = open_tensors(path)
    if is_released_format(tensors.infos()):
        config = released_model_config(document)
        return Checkpoint(config, ReleasedTensors(tensors, config))
    raise CheckpointError(
        f"{path} holds a {document.get('model_type')} model with softmax attention; `{program()} convert {path} OUT` "
        "makes a model of it that this command takes"
    )


def load_config(path: str | Path) -> ModelConfig:
    """The network that a model folder of either format describes.

    Raises:
        ConfigError, CheckpointError: see `open_checkpoint`.
    """
    return open_checkpoint(Path(path)).config


def load_quantization(path: str | Path) -> Quantization | None:
    """How the weights of a model folder of either format are rounded; None: they are not.

    Raises:
        ConfigError: unsupported or contradictory values.
    """
    document = read_config(Path(path))
    return parse_stored_config(document).quantization if document.get("model_type") == MODEL_TYPE else None


def load_model(
    path: str | Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    weights: WeightKind | Quantization | None = None,
) -> DiJiangForCausalLM:
    """Loads a model of either format, ready to compute and without gradients.

    Args:
        path: the model's folder.
        device: of all parameters.
        dtype: of the weights; the kernel's own parameters stay fp32 (fp64 in a fp64 model). In a quantized model of
            those that are not rounded, and of what is computed.
        weights: rounds weights while loading, to the same codes as `dijiang quantize`; None: as they are stored.

    Raises:
        QuantizationError: `weights` is not what the checkpoint's were rounded to already.
        ConfigError: unsupported or contradictory configuration values.
        CheckpointError: missing, surplus, misshapen or non-finite tensors (all of them listed), or
            unreadable files. Nothing is loaded then.
    """
    checkpoint, model = open_network(Path(path), dtype=dtype, weights=weights)
    fill_model(model, checkpoint.tensors, Path(path), device=torch.device(device))
    return model.prepare()


def open_network(
    path: Path, *, dtype: torch.dtype, weights: WeightKind | Quantization | None = None
) -> tuple[Checkpoint, DiJiangForCausalLM]:
    """A checkpoint and the network, without memory, that its tensors fit; arguments and errors are `load_model`'s."""
    checkpoint = open_readable(path)
    model = build_model(checkpoint.config, device="meta", dtype=dtype)
    if weights is not None:
        checkpoint = _rounded(checkpoint, model, weights, path)
    if checkpoint.quantization is not None:
        install(model, checkpoint.quantization)
    require_fit(checkpoint, model, path)
    return checkpoint, model


def empty_network(stored: StoredConfig) -> DiJiangForCausalLM:
    """Returns the network of a configuration, without memory, quantized as it says."""
    model = build_model(stored.config, device="meta")
    if stored.quantization is not None:
        install(model, stored.quantization)
    return model


def _rounded(
    checkpoint: Checkpoint, model: DiJiangForCausalLM, wanted: WeightKind | Quantization, path: Path
) -> Checkpoint:
    """The same checkpoint with its weights rounded while they are read."""
    stored = checkpoint.quantization
    kind = wanted.weights if isinstance(wanted, Quantization) else wanted
    if stored is not None:
        if wanted not in (stored, stored.weights):
            raise QuantizationError(f"the weights in {path} are {stored.weights} already, and cannot become {kind}")
        return checkpoint
    require_fit(checkpoint, model, path)
    quantization = choose(wanted, checkpoint.tensors, model) if isinstance(wanted, str) else wanted
    chosen = weights_to_quantize(model, quantization)
    return replace(checkpoint, tensors=QuantizedTensors(checkpoint.tensors, chosen), quantization=quantization)


def open_readable(path: Path) -> Checkpoint:
    """As `open_checkpoint`; files that cannot be read are a `CheckpointError` too."""
    try:
        return open_checkpoint(path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error


def require_fit(checkpoint: Checkpoint, model: DiJiangForCausalLM, path: Path) -> None:
    """Compares what a checkpoint holds with the network that its config describes.

    Raises:
        CheckpointError: missing, surplus or misshapen tensors, all of them listed.
    """
    problems = tensor_problems(checkpoint.config, _infos(model.state_dict()), checkpoint.tensors.infos())
    if problems:
        raise CheckpointError(problem_list(f"the tensors in {path} do not fit its config", problems))


def fill_model(model: DiJiangForCausalLM, source: TensorSource, path: Path, *, device: torch.device) -> None:
    """Gives a network that was built without memory its tensors; call `prepare()` then.

    Args:
        model: on `meta`.
        source: tensors of just its names and shapes.
        path: of the folder, for messages.
        device: of all parameters.

    Raises:
        CheckpointError: values that are not finite.
    """
    loaded = _read_all(model.state_dict(), source, device=device)
    problems = [
        f"{name} has values that are not finite" for name, value in loaded.items() if not has_valid(name, value)
    ]
    if problems:
        raise CheckpointError(problem_list(f"{path} is damaged, or {model.dtype} cannot represent it", problems))
    model.load_state_dict(loaded, strict=True, assign=True)
    problems = [f"{name}: {text}" for name, weight in quantized_weights(model) for text in weight.problems()]
    if problems:
        raise CheckpointError(problem_list(f"{path} is damaged", problems))


def save_model(
    model: DiJiangForCausalLM,
    out: str | Path,
    *,
    origin: Origin,
    base: Mapping[str, object] | None = None,
    fill: Callable[[Path], None] = lambda folder: None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    overwrite: bool = False,
) -> None:
    """Saves a model in our own format; see `write_checkpoint`.

    Args:
        base: the source's HF config; None: one that describes the model's backbone.
    """
    config = model.config
    state = model.state_dict()
    stored = StoredConfig(
        config=config,
        base=base_document(config) if base is None else base,
        origin=origin,
        quantization=model.quantization,
    )
    write_checkpoint(
        Path(out),
        stored,
        _infos(state),
        state.__getitem__,
        fill=fill,
        max_shard_bytes=max_shard_bytes,
        overwrite=overwrite,
    )


def write_checkpoint(
    out: Path,
    stored: StoredConfig,
    infos: Mapping[str, TensorInfo],
    read: Callable[[str], Tensor],
    *,
    fill: Callable[[Path], None] = lambda folder: None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    overwrite: bool = False,
    on_written: Callable[[int], None] = lambda num_bytes: None,
) -> None:
    """Writes a folder of our own format that appears complete or not at all, one tensor in memory at a time.

    Args:
        infos: the model's tensors, in the order in which `read` shall be called.
        read: gives a tensor of just that shape and dtype.
        fill: adds further files (tokenizer, model card) to the folder before it appears.
        max_shard_bytes: data bytes of a file of weights; a larger tensor gets a file of its own.
        overwrite: replace a model that this program saved in `out`, which is refused otherwise.
        on_written: called with the bytes of each tensor after it was written.

    Raises:
        ConfigError: the configuration contradicts itself.
        CheckpointError: `out` is in the way, or the disk is full or not writable.
    """
    config_text = stored_config_text(stored)
    total_bytes = sum(map(num_bytes, infos.values()))
    with atomic_folder(out, overwrite=overwrite, needed_bytes=total_bytes) as folder:
        write_tensors(folder, infos, read, max_shard_bytes=max_shard_bytes, on_written=on_written)
        fill(folder)
        # Last, so that not even the hidden folder of a killed writer can be loaded.
        write_text(folder / CONFIG_FILE, config_text)


def tensor_problems(
    config: ModelConfig, expected: Mapping[str, TensorInfo], found: Mapping[str, TensorInfo]
) -> list[str]:
    """What is missing, surplus, misshapen or not floating-point; empty when the tensors fit the config."""
    missing = [f"{name} {list(info.shape)} is missing" for name, info in expected.items() if name not in found]
    surplus = [
        f"{name} {list(info.shape)} is surplus"
        for name, info in found.items()
        if name not in expected and not is_tolerated(name, config)
    ]
    common = [(name, info, found[name]) for name, info in expected.items() if name in found]
    shapes = [
        f"{name} has the shape {list(there.shape)}, the config asks for {list(wanted.shape)}"
        for name, wanted, there in common
        if there.shape != wanted.shape
    ]
    dtypes = [
        f"{name} has the dtype {there.dtype}, "
        + ("which is not floating-point" if wanted.dtype.is_floating_point else f"must be {wanted.dtype}")
        for name, wanted, there in common
        if (not there.dtype.is_floating_point if wanted.dtype.is_floating_point else there.dtype != wanted.dtype)
    ]
    return missing + surplus + shapes + dtypes


def is_tolerated(name: str, config: ModelConfig) -> bool:
    """Whether a surplus tensor is a known constant, or the copy of a tied embedding."""
    family = FAMILIES[config.family]
    is_tied_head = config.tie_word_embeddings and name == f"{family.paths.head}.weight"
    return is_tied_head or family.buffers.fullmatch(name) is not None


def has_valid(name: str, tensor: Tensor) -> bool:
    """Whether all values are finite, as integers are; a mixing bias may be -inf, which silences the linear part.

    A sum is finite only if all its terms are, and costs no memory; large sums are told from infinite terms
    by looking again.
    """
    if name.endswith(MIX_BIAS):
        return not bool((tensor.isnan() | tensor.isposinf()).any())
    return not tensor.dtype.is_floating_point or all(
        bool(part.sum(dtype=torch.float64 if part.dtype == torch.float64 else torch.float32).isfinite())
        or bool(part.isfinite().all())
        for part in tensor.reshape(-1).split(CHECKED_ELEMENTS)
    )


def _infos(tensors: Mapping[str, Tensor]) -> dict[str, TensorInfo]:
    return {name: TensorInfo(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}


def _read_all(expected: Mapping[str, Tensor], source: TensorSource, *, device: torch.device) -> dict[str, Tensor]:
    loaded = {}
    for name in _reading_order(expected, source):
        loaded[name] = source.read(name).to(device=device, dtype=expected[name].dtype).contiguous()
    return loaded


def _reading_order(names: Iterable[str], source: TensorSource) -> list[str]:
    wanted = set(names)
    return [name for name in source.infos() if name in wanted]
