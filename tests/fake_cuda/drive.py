"""Drives everything on the device without memory: `python -m tests.fake_cuda.drive FOLDER`.

A process of its own, for torch asks for `triton` and for devices once. Prints a JSON line for each part: its name, and
what it found, or its error.
"""

import json
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.fake_cuda.machine import Machine, build_guard

machine = Machine(build_guard(Path(sys.argv[1])))  # before anything imports triton

from benchmarks.gpu.models import config_of  # noqa: E402
from dijiang_model.config import ModelConfig  # noqa: E402
from dijiang_model.families import build_model  # noqa: E402
from server.engine.fast_steps import graph_sampling  # noqa: E402
from tests.byte_tokenizer import write_byte_tokenizer  # noqa: E402
from tests.fake_cuda.engines import (  # noqa: E402
    FAMILIES,
    KINDS,
    OWN_MODULES,
    Kind,
    all_requests,
    engine_of,
    network_of,
    on_device,
    run,
    run_grammars,
    run_states,
    sampling_launches,
    step_launches,
)
from tests.fake_cuda.faults import FAULTS, Fault  # noqa: E402
from tests.fake_cuda.ranks import leading_engine  # noqa: E402
from tests.fake_cuda.training import trained_stages  # noqa: E402
from tests.tiny_models import HYBRID, PURE, llama_config  # noqa: E402

COUNTED = {
    "SmolLM2, the default model": Kind(config_of("smollm2-135m", "anchors"), weights="int8"),
    "SmolLM2, hybrid": Kind(config_of("smollm2-135m", "hybrid")),
    "SmolLM2, hybrid, int8": Kind(config_of("smollm2-135m", "hybrid"), weights="int8"),
    "SmolLM2, hybrid, int4": Kind(config_of("smollm2-135m", "hybrid"), weights="int4"),
    "LLaMA-2-7B, hybrid": Kind(config_of("llama-2-7b", "hybrid")),
    "LLaMA-2-7B, pure": Kind(config_of("llama-2-7b", "pure")),
    "Pythia-2.8B, released": Kind(config_of("pythia-2.8b", "released")),
}
TINY = Kind(llama_config(HYBRID, PURE))


def launches(kind: Kind, lengths: tuple[int, ...] = (1, 1, 1)) -> int:
    """Of a step of the whole model."""
    one, two = (sum(step_launches(kind, layers, machine, lengths=lengths).values()) for layers in (1, 2))
    return one + (two - one) * (kind.config.num_layers - 1)


def engine(name: str, folder: Path) -> dict[str, int]:
    """Requests of all kinds; what was replayed."""
    served = engine_of(network_of(KINDS[name], machine), machine, folder)
    before = Counter(machine.launches)
    found = run(served, all_requests() if name == next(iter(KINDS)) else all_requests()[:3])
    return {**found, "replays": (machine.launches - before)["replay"]}


def states(folder: Path) -> dict[str, int]:
    """Snapshots, files, and all tiers of the cache."""
    served = engine_of(network_of(TINY, machine), machine, folder)
    return run_states(served)


def grammars(folder: Path) -> dict[str, int]:
    write_byte_tokenizer(folder)
    return run_grammars(engine_of(network_of(TINY, machine), machine, folder))


def ranks(family: str, folder: Path) -> int:
    """Rank 0 of two: how many requests end. Two kinds of split blocks keep states as well."""
    served = leading_engine(FAMILIES[family], machine, folder, size=2)
    with machine.loading():
        run(served, all_requests()[:1])  # makes what is made once
    ends = run(served, all_requests()[:3])["ends"]
    return ends + (run_states(served)["ends"] if family in ("llama", "gpt_neox, released") else 0)


def training(config: ModelConfig) -> list[int]:
    """Both stages, their products in bf16."""
    with machine.loading():
        return trained_stages(on_device(build_model(config)))


def fault(change: Fault, folder: Path) -> str | None:
    """The kind of error that an engine with a mistake in it raises; None: none."""
    network = network_of(Kind(llama_config(HYBRID)), machine)
    with pytest.MonkeyPatch.context() as patch:
        change(patch, network)
        try:
            run(engine_of(network, machine, folder, max_num_slots=2), all_requests()[:3])
        except Exception as error:
            return type(error).__name__
        finally:
            machine.reset()
    return None


def report(part: str, work: Callable[[], object]) -> None:
    """A line of JSON."""
    try:
        found = {"found": work()}
    except Exception:
        found = {"error": traceback.format_exc()}
    sys.stdout.write(json.dumps({"part": part, **found}) + "\n")


def main() -> None:
    with machine, tempfile.TemporaryDirectory() as name:
        root = Path(name)

        def folder() -> Path:
            return Path(tempfile.mkdtemp(dir=root))

        for kind in KINDS:
            report(f"engine of {kind}", lambda kind=kind: engine(kind, folder()))
        report("states", lambda: states(folder()))
        report("grammars", lambda: grammars(folder()))
        for family in (*OWN_MODULES, "gpt_neox, released"):
            report(f"ranks of {family}", lambda family=family: ranks(family, folder()))
        for family in OWN_MODULES:
            report(f"training of {family}", lambda family=family: training(FAMILIES[family]))
        for model, kind in COUNTED.items():
            report(f"launches of {model}", lambda kind=kind: launches(kind))
            report(f"launches of a prompt of {model}", lambda kind=kind: launches(kind, (500,)))
        for way in graph_sampling.KINDS:
            report(f"sampling {way}", lambda way=way: sampling_launches(way, machine))
        for mistake, change in FAULTS.items():
            report(f"fault {mistake}", lambda change=change: fault(change, folder()))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
