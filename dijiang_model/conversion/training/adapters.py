"""Adapters: what training changed, in one small safetensors file that names its base.

The file holds the kernels' tensors (whole, under their checkpoint names) and low-rank updates of the
attention's projections (`<weight name>.lora_down` [r, in] and `.lora_up` [out, r]). Its metadata hold the
layers' attention, which may differ from the base's, and the fingerprint of the only base it fits.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as safetensors_bytes
from torch import Tensor

from dijiang_model.checkpoints.checkpoint import write_checkpoint
from dijiang_model.checkpoints.config_json import StoredConfig, attention_document, parse_layers, read_stored_config
from dijiang_model.checkpoints.fingerprint import fingerprint, is_kernel_tensor, model_fingerprint
from dijiang_model.checkpoints.outputs import CALIBRATION_FILE
from dijiang_model.config import ModelConfig
from dijiang_model.conversion.sources.tokenizer_files import write_tokenizer
from dijiang_model.conversion.training.lora import DOWN, UP, merged
from dijiang_model.errors import CheckpointError
from dijiang_model.families import build_model
from dijiang_model.formats.atomic_file import write_atomically
from dijiang_model.formats.model_folder import ADAPTER_FILE, peft_problem
from dijiang_model.formats.problem_list import problem_list
from dijiang_model.formats.stub_files import stub_problem
from dijiang_model.formats.tensor_files import SAFETENSORS_SUFFIX, TensorInfo, TensorSource, open_tensors, unreadable
from dijiang_model.model import DiJiangForCausalLM

FORMAT = "dijiang-adapter-1"
"""In the folder of a training run."""


@dataclass(frozen=True, slots=True)
class AdapterInfo:
    """What an adapter says about itself.

    Attributes:
        base: name of the model that it fits, for people.
        fingerprint: of that model; see `fingerprint`.
        tokens_trained: seen in all stages.
        lora_rank: 0 without updates of the projections.
        recipe: how it was trained, in words.
        tokens_before: those of `tokens_trained` that an adapter which it started from had seen.
    """

    base: str
    fingerprint: str
    tokens_trained: int
    lora_rank: int
    recipe: str
    tokens_before: int = 0


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter in memory.

    Attributes:
        layers: the attention of each layer, a list of `config_json.attention_document`.
        tensors: by their names in the file.
        sha256: of the file that it came from; None: it came from none.
        calibration: text of the base's `calibration.json`, where the layers have anchors.
    """

    info: AdapterInfo
    layers: list[dict[str, object]]
    tensors: Mapping[str, Tensor]
    sha256: str | None = None
    calibration: str | None = None

    def config(self, base: ModelConfig) -> ModelConfig:
        """The adapted network.

        Raises:
            ConfigError: layers that this code does not support, or that do not fit the base.
        """
        return replace(base, layers=parse_layers(self.layers, base=base))

    def read(self, name: str, read_base: Callable[[str], Tensor]) -> Tensor:
        """A tensor of the adapted model under its checkpoint name."""
        if name in self.tensors:
            return self.tensors[name]
        weight = read_base(name)
        down, up = self.tensors.get(f"{name}.{DOWN}"), self.tensors.get(f"{name}.{UP}")
        return weight if down is None or up is None else merged(weight, down, up)


def save_adapter(adapter: Adapter, path: Path) -> None:
    """Writes an adapter file that appears complete or not at all.

    Raises:
        CheckpointError: it cannot be written.
    """
    metadata = {
        "format": FORMAT,
        "info": json.dumps(asdict(adapter.info)),
        "layers": json.dumps(adapter.layers),
    }
    if adapter.calibration is not None:
        metadata["calibration"] = adapter.calibration
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in adapter.tensors.items()}
    write_atomically(path, safetensors_bytes(tensors, metadata))


def load_adapter(path: Path) -> Adapter:
    """Reads an adapter file, or the one in a run's folder.

    Raises:
        CheckpointError: unreadable, or no adapter of this format.
    """
    if path.is_dir():
        folder, path = path, path / ADAPTER_FILE
        if not path.is_file():
            raise CheckpointError(
                peft_problem(folder) or f"{folder} holds no {ADAPTER_FILE}, as `dijiang train` writes it"
            )
    problem = stub_problem(path) if path.is_file() else None
    if problem is not None:
        raise CheckpointError(problem)
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a mapping
    except OSError as error:
        raise CheckpointError(f"{path} is not a readable adapter: {error.strerror or error}") from error
    except SafetensorError as error:
        other = f"{path} is not a readable adapter; name a run's folder, or {ADAPTER_FILE} in it"
        is_damaged = path.suffix == SAFETENSORS_SUFFIX
        raise CheckpointError(unreadable(path, "adapter") if is_damaged else other) from error
    if metadata.get("format") != FORMAT:
        is_peft = any(".lora_A." in name for name in tensors)
        hint = "; it is one of the library PEFT: merge it into its base, and convert the result" if is_peft else ""
        raise CheckpointError(f"{path} is no adapter of the format {FORMAT}{hint}")
    try:
        stated = json.loads(metadata["info"])
        info = AdapterInfo(**{field.name: stated[field.name] for field in fields(AdapterInfo)})
        layers = json.loads(metadata["layers"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} has damaged metadata: {error}") from error
    damaged = [f"{name} has values that are not finite" for name, tensor in tensors.items() if not _is_valid(tensor)]
    if damaged:
        raise CheckpointError(problem_list(f"{path} is damaged", damaged))
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    return Adapter(info, layers, tensors, sha256, metadata.get("calibration"))


def kernel_adapter(folder: Path, *, recipe: str) -> Adapter:
    """The DiJiang tensors of a converted model, so that conversions of its base need not make them again.

    Args:
        recipe: how they were made, in words.

    Raises:
        ModelError: no converted model.
    """
    stored, source = read_stored_config(folder), open_tensors(folder)
    found = fingerprint(stored.config, source.infos(), source.read)
    info = AdapterInfo(folder.resolve().name, found, stored.origin.tokens_trained, 0, recipe)
    tensors = {name: source.read(name) for name in source.infos() if is_kernel_tensor(name)}
    layers = [attention_document(layer) for layer in stored.config.layers]
    return Adapter(info, layers, tensors, calibration=calibration_text(folder))


def calibration_text(folder: Path) -> str | None:
    """Of a converted model's `calibration.json`; None: it has none."""
    file = folder / CALIBRATION_FILE
    return file.read_text("utf-8") if file.is_file() else None


def adapted_model(model: DiJiangForCausalLM, adapter: Adapter) -> DiJiangForCausalLM:
    """A new model with the adapter merged in; untouched tensors are shared with `model`.

    Raises:
        CheckpointError: the adapter was made for another base, or does not fit its own layers.
    """
    state = model.state_dict()
    _refuse_other_base(adapter, model_fingerprint(model))
    adapted = build_model(adapter.config(model.config), dtype=model.dtype)
    expected = adapted.state_dict()
    _refuse_misfit(adapter, expected, state)
    tensors = {
        name: adapter.read(name, state.__getitem__).to(device=model.device, dtype=wanted.dtype)
        for name, wanted in expected.items()
    }
    adapted.load_state_dict(tensors, strict=True, assign=True)
    return adapted.prepare()


def apply_adapter(folder: Path, adapter: Adapter, out: Path, *, card: str, overwrite: bool = False) -> None:
    """Merges an adapter into a converted model, tensor by tensor, into a folder that appears complete or not at all.

    Args:
        folder: the base, a model of our own format.
        card: the model card's text.

    Raises:
        CheckpointError: the adapter was made for another base, or `out` cannot be written.
    """
    stored = read_stored_config(folder)
    source = open_tensors(folder)
    _refuse_other_base(adapter, fingerprint(stored.config, source.infos(), source.read))
    config = adapter.config(stored.config)
    expected = build_model(config, dtype=_weights_dtype(source)).state_dict()
    _refuse_misfit(adapter, expected, source.infos())
    tokens = stored.origin.tokens_trained + adapter.info.tokens_trained
    origin = replace(stored.origin, tokens_trained=tokens, adapter_sha256=adapter.sha256)

    def fill(target: Path) -> None:
        write_tokenizer(folder, target, vocab_size=config.vocab_size)
        (target / "README.md").write_text(card)
        if adapter.calibration is not None:
            (target / CALIBRATION_FILE).write_text(adapter.calibration)

    write_checkpoint(
        out,
        StoredConfig(config=config, base=stored.base, origin=origin),
        {name: TensorInfo(tuple(tensor.shape), tensor.dtype) for name, tensor in expected.items()},
        lambda name: adapter.read(name, source.read).to(expected[name].dtype),
        fill=fill,
        overwrite=overwrite,
    )


def _weights_dtype(source: TensorSource) -> torch.dtype:
    return next(info.dtype for name, info in source.infos().items() if not is_kernel_tensor(name))


def _refuse_other_base(adapter: Adapter, found: str) -> None:
    if adapter.info.fingerprint != found:
        raise CheckpointError(
            f"the adapter was trained on {adapter.info.base} (fingerprint {adapter.info.fingerprint[:12]}), "
            f"this model is another one (fingerprint {found[:12]})"
        )


def _refuse_misfit(adapter: Adapter, expected: Mapping[str, Tensor], base: Mapping[str, object]) -> None:
    kernel = [name for name in expected if is_kernel_tensor(name)]
    problems = [f"{name} is missing" for name in kernel if name not in adapter.tensors]
    problems += [
        f"{name} has the shape {list(adapter.tensors[name].shape)}, the layer asks for {list(expected[name].shape)}"
        for name in kernel
        if name in adapter.tensors and adapter.tensors[name].shape != expected[name].shape
    ]
    for name, tensor in adapter.tensors.items():
        stem, _, part = name.rpartition(".")
        if part not in (DOWN, UP):
            problems += [] if name in expected else [f"{name} is surplus"]
        elif stem not in base or tensor.shape[part == DOWN] != expected[stem].shape[part == DOWN]:
            problems.append(f"{name} {list(tensor.shape)} fits no weight of the base")
    if problems:
        raise CheckpointError(problem_list("the adapter does not fit", problems))


def _is_valid(tensor: Tensor) -> bool:
    return not bool((tensor.isnan() | tensor.isposinf()).any())
