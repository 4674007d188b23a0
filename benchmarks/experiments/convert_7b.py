"""Converting a checkpoint of LLaMA-2-7B's shape: how much memory and time it takes.

    python -m benchmarks.experiments.convert_7b --folder /somewhere/with/28/GB --form safetensors

Writes random half-precision weights in the published shapes, sharded as published, then converts them in a process
of its own and watches that process. Anonymous memory is what a machine must have; pages of mapped files count in the
resident size too, but the system takes them back when it needs them. Everything is deleted at the end.
"""

import json
import multiprocessing
import shutil
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import psutil
import torch
import typer
from rich.console import Console
from torch import Tensor

from benchmarks.machine import this_machine, write_result
from dijiang_model.checkpoints.config_json import read_stored_config
from dijiang_model.checkpoints.hf_config import base_model_config
from dijiang_model.conversion.convert import convert
from dijiang_model.conversion.recipes import Recipe, converted_config
from dijiang_model.families import build_model
from dijiang_model.formats.safetensors_writer import num_bytes, plan_shards, write_tensors
from dijiang_model.formats.tensor_files import TensorInfo

LLAMA_2_7B: dict[str, object] = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "num_hidden_layers": 32,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
}
SHARD_BYTES = 5 * 10**9
NOISE_VALUES = 2**22
SAMPLE_S = 0.01


@dataclass(slots=True)
class Peak:
    """The most memory that a process had, in bytes.

    Attributes:
        anonymous: its own memory.
        resident: with the pages of mapped files.
    """

    anonymous: int = 0
    resident: int = 0


class Noise:
    """Random tensors that cost little: one block of noise, repeated."""

    def __init__(self, infos: dict[str, TensorInfo]) -> None:
        self._infos = infos
        self._block = (0.02 * torch.randn(NOISE_VALUES, generator=torch.Generator().manual_seed(0))).half()

    def read(self, name: str) -> Tensor:
        """A tensor; norms are near one."""
        info = self._infos[name]
        count = num_bytes(info) // info.dtype.itemsize
        values = self._block.repeat(-(-count // NOISE_VALUES))[:count].view(info.shape)
        return 1 + values if "norm" in name else values


def source_infos(document: dict[str, object]) -> dict[str, TensorInfo]:
    """The published tensors: all of the network but what conversion adds."""
    config = converted_config(base_model_config(document), Recipe.PURE, window=0, sinks=0)
    state = build_model(config, dtype=torch.float16).state_dict()
    return {name: TensorInfo(tuple(t.shape), t.dtype) for name, t in state.items() if ".linear." not in name}


def write_source(folder: Path, document: dict[str, object], form: str, *, shard_bytes: int = SHARD_BYTES) -> int:
    """Writes a sharded HF folder; answers its weights' bytes.

    Args:
        form: `safetensors` or `bin`.
    """
    infos = source_infos(document)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(document))
    noise = Noise(infos)
    if form == "safetensors":
        write_tensors(folder, infos, noise.read, max_shard_bytes=shard_bytes)
    else:
        _write_bin(folder, infos, noise, shard_bytes)
    return sum(map(num_bytes, infos.values()))


def _write_bin(folder: Path, infos: dict[str, TensorInfo], noise: Noise, shard_bytes: int) -> None:
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(plan_shards(infos, shard_bytes), start=1):
        name = f"pytorch_model-{number:05d}.bin"
        torch.save({tensor: noise.read(tensor) for tensor in shard.names}, folder / name)
        weight_map |= dict.fromkeys(shard.names, name)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))


def watched(source: Path, out: Path) -> tuple[Peak, float]:
    """Converts in a fresh process; answers its peak and the seconds it took."""
    process = multiprocessing.get_context("spawn").Process(target=convert, args=(source, out))
    peak, started = Peak(), time.monotonic()
    process.start()
    watcher = threading.Thread(target=_watch, args=(process.pid, peak))
    watcher.start()
    process.join()
    watcher.join()
    if process.exitcode != 0:
        raise typer.Exit(1)
    return peak, time.monotonic() - started


def _watch(pid: int | None, peak: Peak) -> None:
    path = Path(f"/proc/{pid}/status")
    while psutil.pid_exists(pid or 0):
        try:
            lines = dict(line.split(":", 1) for line in path.read_text().splitlines())
        except OSError:
            return
        if "RssAnon" not in lines:  # it has ended
            return
        peak.anonymous = max(peak.anonymous, 1024 * int(lines["RssAnon"].split()[0]))
        peak.resident = max(peak.resident, 1024 * int(lines["VmHWM"].split()[0]))
        time.sleep(SAMPLE_S)


def main(
    folder: Annotated[Path, typer.Option(help="A new folder on a disk with 28 GB free; removed at the end.")],
    form: Annotated[str, typer.Option(help="Of the source: safetensors or bin.")] = "safetensors",
    layers: Annotated[int, typer.Option(min=1, help="Fewer than 32 for a smaller trial.")] = 32,
) -> None:
    """Measure a conversion of LLaMA-2-7B's shape."""
    console = Console(stderr=True)
    if form not in ("safetensors", "bin"):
        raise typer.BadParameter(f"{form!r} is neither safetensors nor bin", param_hint="--form")
    folder.mkdir(parents=True)
    try:
        size = write_source(folder / "source", LLAMA_2_7B | {"num_hidden_layers": layers}, form)
        console.print(f"source: {size / 1e9:.2f} GB of {form}")
        peak, seconds = watched(folder / "source", folder / "out")
        config = read_stored_config(folder / "out").config
        result = {"form": form, "layers": config.num_layers, "source_bytes": size, "seconds": round(seconds, 1)}
        console.print(
            f"{config.num_layers} layers in {seconds:.0f} s; peak {peak.anonymous / 2**20:,.0f} MiB of its own memory, "
            f"{peak.resident / 2**20:,.0f} MiB resident with mapped files"
        )
        typer.echo(write_result(f"convert-7b-{form}", this_machine(), result | asdict(peak)))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    typer.run(main)
