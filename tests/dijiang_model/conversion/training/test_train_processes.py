"""Several processes train as one does with the whole batch; a launcher starts them, a kill does not disturb them."""

import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from typer import Typer
from typer.testing import CliRunner

from dijiang_model.conversion.training.adapters import ADAPTER_FILE
from dijiang_model.conversion.training.cli import train_command
from dijiang_model.conversion.training.distill import imitation_loss, layer_losses
from dijiang_model.conversion.training.kernel_training import make_trainable
from dijiang_model.conversion.training.lora import attach_lora
from dijiang_model.conversion.training.process_group import ALONE, ProcessGroup, joined
from dijiang_model.conversion.training.setup import prepare_run
from dijiang_model.conversion.training.train import train
from dijiang_model.errors import CheckpointError, ConversionError
from dijiang_model.model import DiJiangForCausalLM
from tests.dijiang_model.conversion.training.test_train import STUDENT, options
from tests.tiny_models import HYBRID, llama_config, tiny_model, write_tiny_model
from tests.waiting import PATIENCE_S

app = Typer()
app.command()(train_command)

TOLERANCE = 2e-4
"""Of a tensor's norm: fp32 sums in another order, and Adam divides small gradients by small numbers."""


class ThreadProcessGroup(ProcessGroup):
    """Processes that are threads of this one."""

    def __init__(self, rank: int, num: int, table: list[Sequence[Tensor]], barrier: threading.Barrier) -> None:
        self.rank, self.num = rank, num
        self._table, self._barrier = table, barrier

    def average_(self, tensors: Sequence[Tensor]) -> None:
        self._table[self.rank] = [tensor.clone() for tensor in tensors]
        self._barrier.wait()
        means = [torch.stack(column).mean(0) for column in zip(*self._table, strict=True)]
        self._barrier.wait()
        for tensor, mean in zip(tensors, means, strict=True):
            tensor.copy_(mean)


@pytest.fixture
def text(tmp_path: Path) -> str:
    path = tmp_path / "text.txt"
    path.write_text("".join(f"Line {n} of a text about {n % 7} things.\n" for n in range(400)))
    return str(path)


def trainable() -> tuple[DiJiangForCausalLM, dict[str, object]]:
    model = tiny_model(llama_config(HYBRID, HYBRID))
    make_trainable(model)
    updates = attach_lora(model, rank=2, seed=0)
    with torch.no_grad():
        for update in updates.values():
            update.lora_up.normal_(std=0.1, generator=torch.Generator().manual_seed(1))
    return model, updates  # type: ignore[return-value]


def gradients(stage: int, token_ids: Tensor, processes: ProcessGroup) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients that a step would see."""
    model, updates = trainable()
    if stage == 1:
        loss = layer_losses(model, token_ids, updates, offset=5, processes=processes).mean()  # type: ignore[arg-type]
    else:
        loss = imitation_loss(model, token_ids, updates, offset=5)  # type: ignore[arg-type]
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    processes.average_([loss, *found.values()])
    return loss, found


@pytest.mark.parametrize("stage", [1, 2])
def test_two_processes_see_the_gradients_of_the_double_batch(stage: int) -> None:
    """Stage 1 divides by the batch's energy, which the two must share: their texts are not equally loud."""
    quiet, loud = torch.arange(60), torch.randint(0, 256, (60,), generator=torch.Generator().manual_seed(0))
    both = torch.stack([quiet, loud])
    loss, expected = gradients(stage, both, ALONE)
    table: list[Sequence[Tensor]] = [[], []]
    barrier = threading.Barrier(2, timeout=PATIENCE_S)
    results: dict[int, tuple[Tensor, dict[str, Tensor]]] = {}

    def work(rank: int) -> None:
        results[rank] = gradients(stage, both[rank : rank + 1], ThreadProcessGroup(rank, 2, table, barrier))

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for rank in range(2):
        assert float(results[rank][0]) == pytest.approx(float(loss), rel=1e-5)
        found = results[rank][1]
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            assert (found[name] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-9, name


def test_each_process_reads_its_share_of_every_batch(text: str, tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "model", llama_config(HYBRID, HYBRID))
    whole = prepare_run(model, [text], tmp_path / "a", options(batch_size=4), STUDENT).text
    half = prepare_run(model, [text], tmp_path / "b", options(batch_size=2), STUDENT).text
    for step in range(3):
        shares = [half.batch(step * 2 + rank, 2) for rank in range(2)]
        assert torch.equal(torch.cat(shares), whole.batch(step, 4))


def test_a_run_of_other_processes_is_not_resumed(text: str, tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "model", llama_config(HYBRID, HYBRID))
    train(prepare_run(model, [text], tmp_path / "run", options(), STUDENT), tmp_path / "run", should_stop=lambda: True)
    two = ProcessGroup()
    two.num = 2
    with pytest.raises(CheckpointError, match="made by 1 processes, this run has 2"):
        prepare_run(model, [text], tmp_path / "run", options(), STUDENT, resume=True, processes=two)


def test_a_process_alone_needs_no_launcher() -> None:
    with joined("cpu") as (processes, device):
        assert (processes, device) == (ALONE, "cpu")


@pytest.mark.parametrize(("device", "words"), [("cuda:1", "not cuda:1"), ("cuda", "has no GPU: there are 0")])
def test_devices_that_processes_cannot_share_are_refused(
    monkeypatch: pytest.MonkeyPatch, device: str, words: str
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ConversionError, match=words), joined(device):
        pass


def launched(num: int, *arguments: object) -> None:
    """`dijiang train` as `torchrun --nproc-per-node` starts it, on loopback."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num}"]
    command += ["-m", "server", "train", *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
def test_two_processes_of_torchrun_give_the_weights_of_one_with_the_double_batch(text: str, tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "model", llama_config(HYBRID, HYBRID))
    common = [model, "--data", text, "--tokens", 2048, "--stage-one-share", 0.5, "--sequence-length", 128]
    common += ["--lora-rank", 2, "--far-rank", 2]
    launched(2, *common, "--batch-size", 1, "--out", tmp_path / "two")
    alone = CliRunner().invoke(app, [*map(str, common), "--batch-size", "2", "--out", str(tmp_path / "one")])
    assert alone.exit_code == 0, alone.output
    two, one = (load_file(tmp_path / name / ADAPTER_FILE) for name in ("two", "one"))
    assert two.keys() == one.keys()
    for name, tensor in one.items():
        error = (two[name].float() - tensor.float()).norm() / tensor.float().norm().clamp(min=1e-6)
        assert error < TOLERANCE, f"{name}: {float(error):.1e}"
    logs = [(tmp_path / name / "log.jsonl").read_text().splitlines() for name in ("two", "one")]
    assert [len(log) for log in logs] == [8, 8]
