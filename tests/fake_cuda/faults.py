"""Mistakes that a CPU forgives and a CUDA device does not, for an engine that is clean without them."""

from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any

import pytest
import torch
from torch import Tensor

from dijiang_model.ops.triton import decode as decode_module
from dijiang_model.serving.network import FrozenModel
from server.engine import runner as runner_module
from server.engine.runner import ModelRunner
from server.engine.sampling import sampler as sampler_module
from server.engine.sampling.sampler import Sampler
from server.engine.transfer import Transfer, TransferredFields
from tests.fake_cuda.engines import CUDA

Fault = Callable[[pytest.MonkeyPatch, FrozenModel], None]


def _around(patch: pytest.MonkeyPatch, owner: Any, name: str, change: Callable[..., Any]) -> None:
    """Replaces `owner.name` by what calls `change` with the original and its arguments."""
    original = getattr(owner, name)
    patch.setattr(owner, name, wraps(original)(lambda *args, **kwargs: change(original, *args, **kwargs)))


def parameter_on_the_host(patch: pytest.MonkeyPatch, network: FrozenModel) -> None:
    """A parameter of a kernel stayed where it was loaded."""
    kernel = next(iter(network._model.attentions)).linear
    patch.setitem(kernel._parameters, "mix_bias", torch.nn.Parameter(torch.empty_like(kernel.mix_bias, device="cpu")))


def norm_on_the_host(patch: pytest.MonkeyPatch, network: FrozenModel) -> None:
    """The same for an operation of torch: the first norm, which adds nothing."""
    norm = network._model.blocks[0].get_submodule(network._model.paths.input_norm)
    patch.setitem(norm._parameters, "weight", torch.nn.Parameter(torch.empty_like(norm.weight, device="cpu")))


def item_in_a_step(patch: pytest.MonkeyPatch, network: FrozenModel) -> None:
    """The host asks for one number."""

    def look(sample: Any, self: Sampler, logits: Tensor, *rest: Any) -> Tensor:
        assert logits.sum().item() == 0
        return sample(self, logits, *rest)

    _around(patch, Sampler, "sample", look)


def mask_as_an_index(patch: pytest.MonkeyPatch, network: FrozenModel) -> None:
    """The number of tokens that pass is known to the device alone."""

    def pick(draw: Any, logits: Tensor, *rest: Any, **named: Any) -> Tensor:
        logits[logits < 0] = 0.0 * logits[logits < 0]
        return draw(logits, *rest, **named)

    _around(patch, sampler_module, "draw", pick)


def memory_that_is_not_pinned(patch: pytest.MonkeyPatch, network: FrozenModel) -> None:
    """A step's lists wait for the device to have room for them."""

    def send(self: Transfer, device: torch.device) -> TransferredFields:
        content = bytearray(self._integers.tobytes() + self._reals.tobytes()) or bytearray(8)
        words = torch.frombuffer(content, dtype=torch.int64).to(device, non_blocking=True)
        return TransferredFields(words, len(self._integers))

    patch.setattr(Transfer, "send", send)


def copy_to_the_host_that_waits(patch: pytest.MonkeyPatch, network: FrozenModel) -> None:
    """`.cpu()` in a step."""

    def wait(sample: Any, self: Sampler, logits: Tensor, *rest: Any) -> Tensor:
        logits.amax().cpu()
        return sample(self, logits, *rest)

    _around(patch, Sampler, "sample", wait)


def tokens_read_too_early(patch: pytest.MonkeyPatch, network: FrozenModel) -> None:
    """The event is not waited for."""

    def forget(collect: Any, self: ModelRunner) -> Any:
        step = self._in_flight[0]
        self._in_flight[0] = runner_module.replace(step, arrived=None)
        return collect(self)

    _around(patch, ModelRunner, "collect", forget)


def positions_of_another_dtype(patch: pytest.MonkeyPatch, network: FrozenModel) -> None:
    """A kernel would read two positions as one."""

    def narrow(decode: Any, *args: Any, layout: Any, **named: Any) -> None:
        decode(*args, layout=runner_module.replace(layout, positions=layout.positions.int()), **named)

    from dijiang_model.ops.triton import attention

    _around(patch, attention, "decode", narrow)


def argument_that_was_forgotten(patch: pytest.MonkeyPatch, network: FrozenModel) -> None:
    """A kernel has learned an argument that its launch does not know."""
    kind = decode_module._kind
    patch.setattr(decode_module, "_kind", lambda kernel: {k: v for k, v in kind(kernel).items() if k != "WINDOW"})


def numbers_of_the_host_in_a_captured_step(patch: pytest.MonkeyPatch, network: FrozenModel) -> None:
    """A replay would copy from where the host's memory was."""
    model = network._model

    def embed(original: Any, token_ids: Tensor, positions: Tensor) -> Tensor:
        return original(token_ids + torch.tensor([0], device=token_ids.device), positions)

    _around(patch, model, "embed", embed)


def indices_on_the_host(patch: pytest.MonkeyPatch, network: FrozenModel) -> None:
    """Torch brings them over by itself, and waits."""

    def pick(sample: Any, self: Sampler, logits: Tensor, *rest: Any) -> Tensor:
        return sample(self, logits[torch.arange(len(logits))], *rest)

    _around(patch, Sampler, "sample", pick)


def tensor_of_another_device(patch: pytest.MonkeyPatch, network: FrozenModel) -> None:
    """As a rank's that stayed on the first device."""

    def mix(sample: Any, self: Sampler, logits: Tensor, *rest: Any) -> Tensor:
        return sample(self, logits + torch.zeros(logits.shape[-1], device=torch.device("cuda", 1)), *rest)

    assert CUDA.index == 0
    _around(patch, Sampler, "sample", mix)


FAULTS: Mapping[str, Fault] = {
    fault.__name__: fault
    for fault in (
        parameter_on_the_host,
        norm_on_the_host,
        item_in_a_step,
        mask_as_an_index,
        memory_that_is_not_pinned,
        copy_to_the_host_that_waits,
        tokens_read_too_early,
        positions_of_another_dtype,
        argument_that_was_forgotten,
        numbers_of_the_host_in_a_captured_step,
        indices_on_the_host,
        tensor_of_another_device,
    )
}
