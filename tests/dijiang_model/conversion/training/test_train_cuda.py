"""On CUDA devices training does what it does on a CPU: both stages, resumed, in fp32 and with products in bf16."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dijiang_model.conversion.training.adapters import ADAPTER_FILE
from dijiang_model.conversion.training.setup import prepare_run
from dijiang_model.conversion.training.train import train
from tests.dijiang_model.conversion.training.test_train import STUDENT, options
from tests.dijiang_model.conversion.training.test_train_processes import launched
from tests.tiny_models import HYBRID, llama_config, write_tiny_model

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]


@pytest.fixture
def text(tmp_path: Path) -> str:
    path = tmp_path / "text.txt"
    path.write_text("".join(f"Line {n} of a text about {n % 7} things.\n" for n in range(400)))
    return str(path)


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-2), ("bf16", 0.2)])
def test_a_run_on_the_device_ends_near_the_cpus(text: str, tmp_path: Path, precision: str, tolerance: float) -> None:
    """Ten steps; fp32 products may be in TF32 there, bf16 has eight bits."""
    model = write_tiny_model(tmp_path / "model", llama_config(HYBRID, HYBRID))
    for device in ("cpu", "cuda"):
        wanted = options(precision=precision if device == "cuda" else "fp32")
        out = tmp_path / device
        trainer = prepare_run(model, [text], out, wanted, STUDENT, device=device)
        assert not train(trainer, out, should_stop=lambda trainer=trainer: trainer.progress.step == 4)
        resumed = prepare_run(model, [text], out, wanted, STUDENT, device=device, resume=True)
        assert train(resumed, out)
        assert all(parameter.dtype == torch.float32 for parameter in resumed.model.parameters())
    cpu, cuda = (load_file(tmp_path / device / ADAPTER_FILE) for device in ("cpu", "cuda"))
    for name, tensor in cpu.items():
        if not name.endswith("lora_up"):  # starts at zero: what ten steps leave there is small and all direction
            assert (cuda[name].float() - tensor.float()).norm() <= tolerance * tensor.float().norm(), name


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_two_devices_train_together(text: str, tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "model", llama_config(HYBRID, HYBRID))
    common = ("--data", text, "--tokens", 2048, "--sequence-length", 128, "--lora-rank", 2, "--device", "cuda")
    launched(2, model, *common, "--out", tmp_path / "run")
    assert load_file(tmp_path / "run" / ADAPTER_FILE)
