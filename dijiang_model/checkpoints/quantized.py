"""Which weights of a network are quantized, and putting quantized ones in their places."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from dijiang_model.formats.tensor_files import TensorSource
from dijiang_model.model import DiJiangForCausalLM
from dijiang_model.quantization.config import DEFAULT_GROUP_SIZE, EMBEDDINGS, INT8, Quantization, WeightKind
from dijiang_model.quantization.modules import QuantizedEmbedding, QuantizedLinear
from dijiang_model.quantization.tensors import InMemory, QuantizedTensors, minimums_pay
from dijiang_model.quantization.weight import Int8Weight, QuantizedWeight, quantized_weight


def weights_to_quantize(model: DiJiangForCausalLM, quantization: Quantization) -> dict[str, Quantization]:
    """Checkpoint names of the weights that are rounded, and how each is."""
    names = {f"{path}.weight": quantization for path, _ in _projections(model)}
    return names | {f"{path}.weight": EMBEDDINGS for path in _token_tables(model)}


def install(model: DiJiangForCausalLM, quantization: Quantization) -> DiJiangForCausalLM:
    """Puts empty quantized weights, to be loaded, in the places of those that are rounded; returns the model.

    They lie where the weights lay: on `meta` in a model without memory.
    """
    for path, linear in list(_projections(model)):
        _replace(model, path, QuantizedLinear(_empty(linear.weight, quantization), linear.bias))
    for path in _token_tables(model):
        module = model.get_submodule(path)
        assert isinstance(module, nn.Embedding | nn.Linear)
        weight = _empty(module.weight, EMBEDDINGS)
        assert isinstance(weight, Int8Weight)
        is_table = isinstance(module, nn.Embedding)
        _replace(model, path, QuantizedEmbedding(weight) if is_table else QuantizedLinear(weight, None))
    model.quantization = quantization
    return model


def choose(
    kind: WeightKind,
    source: TensorSource,
    model: DiJiangForCausalLM,
    *,
    group_size: int = DEFAULT_GROUP_SIZE,
    has_minimums: bool | None = None,
) -> Quantization:
    """The form of int8 or int4 that suits a checkpoint's weights.

    Args:
        model: of the checkpoint's shape, not quantized.
        group_size: int4 only.
        has_minimums: int4 only; None: where they pay.
    """
    if kind == "int8":
        return INT8
    if has_minimums is None:
        names = [f"{path}.weight" for path, _ in _projections(model)]
        has_minimums = minimums_pay(source, names, group_size=group_size)
    return Quantization("int4", group_size=group_size, has_minimums=has_minimums)


@torch.no_grad()
def quantize_(model: DiJiangForCausalLM, quantization: Quantization) -> DiJiangForCausalLM:
    """Rounds the weights of a model on the CPU in place; returns it, prepared."""
    tensors = QuantizedTensors(InMemory(model.state_dict()), weights_to_quantize(model, quantization))
    install(model, quantization).load_state_dict(
        {name: tensors.read(name) for name in tensors.infos()}, strict=True, assign=True
    )
    return model.prepare()


def _projections(model: DiJiangForCausalLM) -> Iterator[tuple[str, nn.Linear]]:
    """Of all blocks; the read-out's gate is one."""
    paths = {module: path for path, module in model.named_modules()}
    for block in model.blocks:
        for module in block.modules():
            if isinstance(module, nn.Linear):
                yield paths[module], module


def _token_tables(model: DiJiangForCausalLM) -> list[str]:
    """Modules with a row for each token: the embedding, and the output head if it is another one."""
    return [model.paths.embedding] if model.config.tie_word_embeddings else [model.paths.embedding, model.paths.head]


def _empty(weight: Tensor, quantization: Quantization) -> QuantizedWeight:
    with torch.device(weight.device):
        return quantized_weight(weight.shape[0], weight.shape[1], quantization, dtype=weight.dtype)


def _replace(model: nn.Module, path: str, module: nn.Module) -> None:
    way, _, name = path.rpartition(".")
    setattr(model.get_submodule(way), name, module)
