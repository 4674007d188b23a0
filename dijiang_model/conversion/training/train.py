"""Training in two stages that can be killed at any moment and resumed without a trace.

What a step does follows from its number, the options and the trained tensors alone: batches come from
`text_windows` by step, and the one checkpoint file holds step, tokens, time, trained tensors and optimiser. It
is replaced as a whole. With a limit in minutes the learning rate also follows the clock, so that only runs
limited in tokens repeat bit for bit.
"""

import io
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dijiang_model.checkpoints.config_json import attention_document
from dijiang_model.conversion.training.adapters import Adapter, AdapterInfo, save_adapter
from dijiang_model.conversion.training.distill import Precision, imitation_loss, layer_losses, random_offset
from dijiang_model.conversion.training.kernel_training import (
    MATRICES,
    VECTORS,
    fill_kernels,
    kernel_tensors,
    make_trainable,
    silence,
    trained_parameters,
)
from dijiang_model.conversion.training.layer_fit import fit_layers, record
from dijiang_model.conversion.training.log import TrainingLog
from dijiang_model.conversion.training.lora import DOWN, UP, LoraLinear, attach_lora, factors
from dijiang_model.conversion.training.process_group import ALONE, ProcessGroup
from dijiang_model.errors import CheckpointError
from dijiang_model.formats.atomic_file import write_atomically
from dijiang_model.formats.model_folder import ADAPTER_FILE
from dijiang_model.model import DiJiangForCausalLM
from dijiang_model.ops.training.attention import HybridAttention, WindowAttention

CHECKPOINT_FILE = "checkpoint.pt"
WARM_UP_STEPS = 8
LAST_RATE = 0.05
STAGE_ONE_FACTOR = 3.0
VECTOR_FACTOR = 10.0
"""Vectors (nodes, weights, decays, mixing) take steps so many times those of the matrices."""
MAX_GRADIENT_NORM = 1.0


@dataclass(frozen=True, slots=True)
class TrainingOptions:
    """What decides a run; a resumed run must have the same.

    Attributes:
        tokens: of training in all stages.
        minutes: end (and anneal) after so many minutes of work, if that comes first; None: no such limit.
        stages: (1,), (2,) or (1, 2).
        stage_one_share: of the tokens or minutes, where both stages run.
        sequence_length, batch_size: tokens of a window, windows of a step.
        learning_rate: of matrices in stage 2.
        lora_rank: of the updates of the attention's projections in stage 2; 0: kernels only.
        precision: of the projections' products; the trained tensors are fp32 in either.
        linear: False trains a control, the window alone: the linear part is silent and stays so.
        seed: of the order of the text and of fresh updates.
    """

    tokens: int
    minutes: float | None
    stages: tuple[int, ...]
    stage_one_share: float
    sequence_length: int
    batch_size: int
    learning_rate: float
    lora_rank: int
    precision: Precision
    linear: bool
    seed: int


class Batches(Protocol):
    """Text by step number."""

    def batch(self, step: int, size: int) -> Tensor:
        """[size, length] int64."""
        ...


@dataclass(slots=True)
class Progress:
    """How far a run has come."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    stage: int = 0
    stage_step: int = 0


class Trainer:
    """Trains a model in place.

    Attributes:
        progress: after the last step.
        processes: processes that do the same.
    """

    def __init__(
        self,
        model: DiJiangForCausalLM,
        text: Batches,
        options: TrainingOptions,
        *,
        info: AdapterInfo,
        processes: ProcessGroup = ALONE,
    ) -> None:
        """Takes a model over: its kernels become trainable, its projections get updates.

        Args:
            info: of the adapter that comes out, but for the tokens.
            processes: processes that train the same; each takes `options.batch_size` windows of a step.
        """
        self.model, self.text, self.options, self._info, self.processes = model, text, options, info, processes
        self._layers = [attention_document(layer) for layer in model.config.layers]
        make_trainable(model)
        if not options.linear:
            silence(model)
        self.updates: Mapping[str, LoraLinear] = {}
        if options.lora_rank > 0 and 2 in options.stages:
            self.updates = attach_lora(model, rank=options.lora_rank, seed=options.seed)
        processes.broadcast_([parameter.detach() for _, parameter in self.trained()])
        self.progress = Progress()
        self._optimizer = self._enter(options.stages[0])

    @property
    def share_done(self) -> float:
        """0 ... 1 of the tokens or of the minutes, whichever is further."""
        done = self.progress.tokens / self.options.tokens
        if self.options.minutes is not None:
            done = max(done, self.progress.seconds / (60 * self.options.minutes))
        return min(done, 1.0)

    @property
    def is_done(self) -> bool:
        return self.share_done >= 1.0

    def step(self) -> dict[str, Any]:
        """One batch; what happened, for the log."""
        started = time.monotonic()
        wanted = self._wanted_stage()
        if wanted != self.progress.stage:
            self._optimizer = self._enter(wanted)
        rate = self._set_rate()
        processes = self.processes
        place = self.progress.step * processes.num + processes.rank
        token_ids = self.text.batch(place, self.options.batch_size).to(self.model.device)
        loss = self._backward(wanted, token_ids)
        trained = [parameter for group in self._optimizer.param_groups for parameter in group["params"]]
        processes.average_([loss, *(parameter.grad for parameter in trained if parameter.grad is not None)])
        norm = nn.utils.clip_grad_norm_(trained, MAX_GRADIENT_NORM if wanted == 2 else math.inf)
        if not bool(torch.isfinite(norm)):
            raise CheckpointError(f"step {self.progress.step:,}: the gradient is not finite; try a lower --lr")
        self._optimizer.step()
        num_tokens = token_ids.numel() * processes.num
        self.progress.step += 1
        self.progress.stage_step += 1
        self.progress.tokens += num_tokens
        seconds = processes.broadcast_number(time.monotonic() - started)
        self.progress.seconds += seconds
        return {
            "step": self.progress.step,
            "stage": wanted,
            "tokens": self.progress.tokens,
            "loss": float(loss),
            "gradient_norm": float(norm),
            "rate": rate,
            "seconds": round(self.progress.seconds, 3),
            "tokens_per_s": round(num_tokens / seconds, 1),
        }

    def _backward(self, stage: int, token_ids: Tensor) -> Tensor:
        """Leaves fresh gradients of a batch; answers its loss, []."""
        self._optimizer.zero_grad(set_to_none=True)
        offset = random_offset(torch.Generator().manual_seed(1_000_003 * self.options.seed + self.progress.step))
        precision = self.options.precision
        if stage == 1:
            fitted = partial(layer_losses, offset=offset, precision=precision, processes=self.processes)
            return fitted(self.model, token_ids, self.updates).mean().to(self.model.device)
        return imitation_loss(
            self.model,
            token_ids,
            self.updates,
            offset=offset,
            precision=precision,
            attention=HybridAttention() if self.options.linear else WindowAttention(),
        )

    @property
    def num_steps(self) -> int:
        """Batches of fresh text that the tokens make."""
        return -(-self.options.tokens // (self.options.batch_size * self.options.sequence_length))

    def replay(
        self,
        folder: Path,
        *,
        epochs: int,
        on_segment: Callable[[], None] = lambda: None,
        on_layer: Callable[[int], None] = lambda layer: None,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> bool:
        """Stage 1 on a record of the teacher (see `layer_fit`); steps are layers, saved and logged one by one.

        Returns:
            Whether all layers are done.

        Raises:
            CheckpointError, ConversionError: see `train` and `fit_layers`.
        """
        log = TrainingLog(folder, last_step=self.progress.step)
        batches = [self.text.batch(step, self.options.batch_size) for step in range(self.num_steps)]
        segments = torch.cat(batches).to(self.model.device)
        self.progress.tokens = segments.numel()

        def done(layer: int, before: float, after: float) -> None:
            self.progress.step = layer + 1
            line = {"step": layer + 1, "stage": 1, "tokens": segments.numel(), "first_epoch": before, "loss": after}
            log.write(line)
            self.save(folder)
            on_layer(layer)

        with log:
            return fit_layers(
                self.model,
                record(self.model, segments, on_segment=on_segment),
                epochs=epochs,
                learning_rate=self.options.learning_rate * STAGE_ONE_FACTOR * VECTOR_FACTOR,
                seed=self.options.seed,
                first_layer=self.progress.step,
                on_layer=done,
                should_stop=should_stop,
            )

    def adapter(self) -> Adapter:
        """What was trained so far."""
        info = replace(self._info, tokens_trained=self._info.tokens_before + self.progress.tokens)
        tensors = kernel_tensors(self.model)
        tensors |= {name: tensor.to(torch.float16) for name, tensor in factors(self.updates).items()}
        return Adapter(info, self._layers, tensors)

    def save(self, folder: Path) -> None:
        """Writes checkpoint and adapter, if this is the first process; each file is replaced as a whole.

        Raises:
            CheckpointError: the folder cannot be written.
        """
        if not self.processes.is_first:
            return
        buffer = io.BytesIO()
        torch.save(
            {
                "options": asdict(self.options),
                "num_processes": self.processes.num,
                "fingerprint": self._info.fingerprint,
                "progress": asdict(self.progress),
                "trained": {name: parameter.detach() for name, parameter in self.trained()},
                "optimizer": self._optimizer.state_dict(),
            },
            buffer,
        )
        write_atomically(folder / CHECKPOINT_FILE, buffer.getvalue())
        save_adapter(self.adapter(), folder / ADAPTER_FILE)

    def resume(self, folder: Path) -> None:
        """Goes on where `save` was called last.

        Raises:
            CheckpointError: no checkpoint there, a damaged one, or one of another base or other options.
        """
        path = folder / CHECKPOINT_FILE
        try:
            saved = torch.load(path, map_location=self.model.device, weights_only=True)
        except FileNotFoundError:
            raise CheckpointError(f"{path} does not exist: there is nothing to resume") from None
        except Exception as error:  # torch raises many kinds on damaged files
            raise CheckpointError(f"{path} is damaged: {error}") from error
        if saved["fingerprint"] != self._info.fingerprint:
            raise CheckpointError(f"{path} belongs to another base model")
        mine = json.loads(json.dumps(asdict(self.options)))
        theirs = json.loads(json.dumps(saved["options"]))
        changed = [f"{name} was {theirs[name]}, is {mine[name]}" for name in mine if mine[name] != theirs.get(name)]
        if changed:
            raise CheckpointError(f"{path} was made with other options: {'; '.join(changed)}")
        num = saved.get("num_processes", 1)
        if num != self.processes.num:
            raise CheckpointError(f"{path} was made by {num} processes, this run has {self.processes.num}")
        self.progress = Progress(**saved["progress"])
        with torch.no_grad():
            for name, parameter in self.trained():
                parameter.copy_(saved["trained"][name])
        step = self.progress.stage_step
        self._optimizer = self._enter(self.progress.stage)
        self.progress.stage_step = step
        self._optimizer.load_state_dict(saved["optimizer"])

    def fill(self, adapter: Adapter) -> None:
        """Takes over an adapter's tensors.

        Raises:
            CheckpointError: the adapter has updates of the projections, and this run none of their rank.
        """
        with torch.no_grad():
            fill_kernels(self.model, adapter.tensors)
            for name, tensor in adapter.tensors.items():
                stem, _, part = name.rpartition(".")
                if part not in (DOWN, UP):
                    continue
                mine = getattr(self.updates.get(stem), part, None)
                if not isinstance(mine, Tensor) or mine.shape != tensor.shape:
                    raise CheckpointError(f"{name} {list(tensor.shape)} needs a stage 2 with --lora-rank of its rank")
                mine.copy_(tensor)

    def trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The tensors that training changes, by their names in the model."""
        kernels = {id(p) for p in trained_parameters(self.model, (*VECTORS, *MATRICES))}
        low = {id(p) for update in self.updates.values() for p in (update.lora_down, update.lora_up)}
        for name, parameter in self.model.named_parameters():
            if id(parameter) in kernels | low:
                yield name, parameter

    def _wanted_stage(self) -> int:
        stages = self.options.stages
        if len(stages) == 1 or self.share_done < self.options.stage_one_share:
            return stages[0]
        return stages[-1]

    def _enter(self, stage: int) -> torch.optim.Optimizer:
        self.progress.stage, self.progress.stage_step = stage, 0
        rate = self.options.learning_rate * (STAGE_ONE_FACTOR if stage == 1 else 1.0)
        matrices = list(trained_parameters(self.model, MATRICES))
        if stage == 2:
            matrices += [p for update in self.updates.values() for p in (update.lora_down, update.lora_up)]
        groups = [
            {
                "params": list(trained_parameters(self.model, VECTORS)),
                "lr": rate * VECTOR_FACTOR,
                "full": rate * VECTOR_FACTOR,
            },
            {"params": matrices, "lr": rate, "full": rate},
        ]
        return torch.optim.Adam([group for group in groups if group["params"]], betas=(0.9, 0.95))

    def _set_rate(self) -> float:
        """Warm-up, then half a cosine over the stage; answers the factor."""
        share, done = self.options.stage_one_share, self.share_done
        if len(self.options.stages) == 2:
            done = done / share if self.progress.stage == 1 else (done - share) / (1 - share)
        cosine = 0.5 + 0.5 * math.cos(math.pi * min(max(done, 0.0), 1.0))
        factor = min(1.0, (self.progress.stage_step + 1) / WARM_UP_STEPS) * (LAST_RATE + (1 - LAST_RATE) * cosine)
        for group in self._optimizer.param_groups:
            group["lr"] = group["full"] * factor
        return factor


def train(
    trainer: Trainer,
    folder: Path,
    *,
    save_every_s: float = 300.0,
    on_step: Callable[[dict[str, Any]], None] = lambda line: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> bool:
    """Steps until the run is done; saves every `save_every_s` seconds and at the end, logs every step.

    Args:
        should_stop: asked after each step; the run is saved then and can be resumed.

    Returns:
        Whether the run is done.

    Raises:
        CheckpointError: the folder cannot be written, or the training diverged.
    """
    processes = trainer.processes
    log = TrainingLog(folder, last_step=trainer.progress.step, is_kept=processes.is_first)
    if trainer.progress.step == 0:
        trainer.save(folder)  # so that a kill at any moment leaves something to resume
    saved_at = time.monotonic()
    with log:
        while not trainer.is_done and not processes.any(should_stop()):
            line = trainer.step()
            log.write(line)
            on_step(line)
            if time.monotonic() - saved_at > save_every_s:
                trainer.save(folder)
                saved_at = time.monotonic()
    trainer.save(folder)
    return trainer.is_done
