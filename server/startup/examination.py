"""What `dijiang doctor` looks at: machine, devices, kernels, models, caches, states, address. Nothing is changed."""

import importlib.util
import json
import os
import platform
import shutil
import socket
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil
import torch

from dijiang_model.checkpoints.checkpoint import open_network
from dijiang_model.checkpoints.config_json import CONFIG_FILE, MODEL_TYPE, read_config, read_stored_config
from dijiang_model.conversion.default_folder import MODEL_NAME, is_noted
from dijiang_model.conversion.sources.tokenizer_files import check_served
from dijiang_model.errors import ModelError
from dijiang_model.families import FAMILIES
from dijiang_model.formats.sizes import size_text
from dijiang_model.native import library
from dijiang_model.program import program
from server.hardware import (
    CUDA_DEVICE_FILES,
    HardwareError,
    allowed_cores,
    default_state_bytes,
    default_threads,
    find_device,
    free_cuda_bytes,
    free_host_bytes,
)
from server.startup.settings import SettingsError, read_settings
from server.states.files.local import INDEX_FILE

LITTLE_DISK_BYTES = 2**30
FEW_DESCRIPTORS = 1024
ANSWER_TIMEOUT_S = 3.0
PACKAGES = ("torch", "transformers", "tokenizers", "triton")


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        name: of it.
        found: what there is.
        problem: what is wrong with it; None: nothing.
        remedy: what to type or do.
        is_serious: whether a server would not start, or be several times slower than it could.
    """

    name: str
    found: str
    problem: str | None = None
    remedy: str | None = None
    is_serious: bool = True


@dataclass(frozen=True, slots=True)
class Place:
    """Where to look.

    Attributes:
        home: of models and states, as a server's `--cache-dir`.
        hub: the Hugging Face hub's cache.
        host, port: where a server would listen.
        model: a model's folder that was asked about.
        variables: the environment.
    """

    home: Path
    hub: Path
    host: str
    port: int
    model: Path | None = None
    variables: Mapping[str, str] = field(default_factory=lambda: os.environ)


def examine(place: Place) -> Iterator[Finding]:
    """Yields what is found, one by one."""
    yield from _program(place)
    yield from _machine()
    yield from _devices()
    yield from _kernels()
    if place.model is not None:
        yield _model(place.model, place.model.name or str(place.model))
    yield from _models(place.home / "models")
    yield _hub(place.hub)
    yield from _states(place.home / "states")
    yield _disk(place.home)
    yield _address(place.host, place.port)


def _program(place: Place) -> Iterator[Finding]:
    versions = [f"{name} {_version(name)}" for name in PACKAGES if importlib.util.find_spec(name) is not None]
    python = f"Python {platform.python_version()} ({sys.executable})"
    yield Finding("program", f"dijiang {_version('dijiang')}, {python}, {', '.join(versions)}")
    is_on_path = shutil.which("dijiang", path=place.variables.get("PATH", "")) is not None
    command = Path(sys.executable).with_name("dijiang")
    hint = f"type {command}, or: export PATH={command.parent}:$PATH"
    if not is_on_path:
        yield Finding("command", str(command), "`dijiang` is on no PATH", hint, is_serious=False)
    try:
        read_settings({})
    except SettingsError as error:
        yield Finding("settings", "environment variables", str(error).replace("\n", "; "), "unset or correct them")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "(version unknown)"


def _machine() -> Iterator[Finding]:
    memory, cores = psutil.virtual_memory().total, os.cpu_count() or 1
    usable = min(cores, allowed_cores())
    shown = f"{_cpu_name()}, {usable} of {cores} cores" if usable < cores else f"{_cpu_name()}, {cores} cores"
    free = free_host_bytes()
    yield Finding(
        "machine",
        f"{platform.system()} {platform.machine()}, {shown}, {default_threads()} for the model; "
        f"{size_text(free)} of {size_text(memory)} memory free",
        None if free > LITTLE_DISK_BYTES else f"only {size_text(free)} of memory are free",
        "end other programs, or give the container more",
        is_serious=False,
    )
    try:
        import resource
    except ImportError:  # not made for Windows
        return
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= hard < FEW_DESCRIPTORS:
        yield Finding(
            "open files", f"at most {hard}", "few clients can connect at once", f"ulimit -n {FEW_DESCRIPTORS * 8}",
            is_serious=False,
        )  # fmt: skip


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or "unknown CPU"
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown CPU")


def _devices() -> Iterator[Finding]:
    free = free_cuda_bytes()
    if free:
        yield Finding("devices", "; ".join(f"cuda:{i}, {size_text(own)} free" for i, own in enumerate(free)))
        has_triton = importlib.util.find_spec("triton") is not None
        problem = None if has_triton else "Triton is not installed, so that steps on CUDA run in torch's operations"
        yield Finding("kernels on CUDA", "Triton" if has_triton else "torch", problem, "pip install 'dijiang[triton]'")
    elif any(Path(file).exists() for file in CUDA_DEVICE_FILES):
        yield Finding(
            "devices",
            "cpu; the driver of a CUDA device is there",
            f"torch {_version('torch')} can use no CUDA device",
            "look at nvidia-smi; install torch for CUDA: https://pytorch.org/get-started/locally",
        )
    else:
        yield Finding("devices", "cpu; no CUDA device")


def _kernels() -> Iterator[Finding]:
    words = library.variants_in_words()
    used = next((variant for variant, why in words.items() if why == "used"), None)
    others = "".join(f"; {variant}: {why}" for variant, why in words.items() if why != "used" and "needed" not in why)
    if used is None:
        yield Finding("kernels on the CPU", f"none{others}", library.why_missing(), "make kernels")
        return
    others_before = list(words)[: list(words).index(used)]
    better = [variant for variant in others_before if words[variant] in library.MENDED_BY_BUILDING]
    yield Finding(
        "kernels on the CPU",
        f"{used}, the fastest that was compiled and runs here{others}",
        f"{', '.join(better)} would be faster, but {words[better[0]]}" if better else None,
        "make kernels",
        is_serious=False,
    )


def _models(folder: Path) -> Iterator[Finding]:
    if not any(folder.glob(f"*/{CONFIG_FILE}")):
        found = f"{MODEL_NAME} is made when it is first served"
        yield Finding("models", f"none in {folder}; {found}")
        return
    for config in sorted(folder.glob(f"*/{CONFIG_FILE}")):
        if not config.parent.name.startswith("."):
            yield _model(config.parent, config.parent.name)


def _model(folder: Path, name: str) -> Finding:
    """A model that may be served; headers are read, weights are not."""
    name = f"model {name}"
    try:
        if not (folder / CONFIG_FILE).is_file():
            return Finding(name, str(folder), f"it holds no {CONFIG_FILE}", "name the folder of a model")
        document = read_config(folder)
        if document.get("model_type") != MODEL_TYPE and str(document.get("model_type")) in FAMILIES:
            return Finding(
                name,
                f"{folder}: {document.get('model_type')}",
                "it is not converted",
                f"{program()} convert {folder} OUT",
            )
        _, network = open_network(folder, dtype=torch.float32)
        check_served(folder)
        budget = default_state_bytes(find_device("cpu"), folder)
        recipe = read_stored_config(folder).origin.recipe if document.get("model_type") == MODEL_TYPE else "released"
    except ModelError as error:
        remedy = f"convert it again: {program()} convert SOURCE {folder} --overwrite"
        return Finding(name, str(folder), " ".join(str(error).split()), remedy)
    except HardwareError as error:
        return Finding(
            name, str(folder), str(error), f"serve it on a larger machine, or: {program()} quantize", is_serious=True
        )
    slot, millions = network.state_spec.bytes_per_slot, network.num_parameters / 1e6
    current = ", current" if folder.name == MODEL_NAME and is_noted(folder) else ""
    room = f"{size_text(slot)} a conversation, {budget // slot:,} of them in this machine's memory"
    return Finding(name, f"{folder}: {recipe}{current}, {millions:,.1f} M parameters, {room}")


def _hub(folder: Path) -> Finding:
    """What could be converted."""
    names = []
    for config in sorted(folder.glob(f"models--*/snapshots/*/{CONFIG_FILE}")):
        try:
            kind = json.loads(config.read_text("utf-8")).get("model_type")
        except (OSError, ValueError, AttributeError):
            continue
        if kind in FAMILIES:
            names.append(config.parents[2].name.removeprefix("models--").replace("--", "/"))
    if not names:
        return Finding("hub cache", f"{folder}: nothing that could be converted")
    shown = ", ".join(dict.fromkeys(names))
    return Finding("hub cache", f"{folder}: {shown} (dijiang convert OWNER/NAME OUT)")


def _states(folder: Path) -> Iterator[Finding]:
    for own in sorted(path for path in folder.glob("*") if path.is_dir()):
        files = [path for path in own.rglob("*") if path.is_file()]
        size = size_text(sum(path.stat().st_size for path in files))
        has_states = any(path.suffix != "" and path.name != INDEX_FILE for path in files)
        is_lost = has_states and not (own / INDEX_FILE).is_file()
        problem = f"its index {INDEX_FILE} is missing" if is_lost else None
        yield Finding(f"states of {own.name}", f"{own}: {size}", problem, f"{program()} state repair {own}")


def _disk(home: Path) -> Finding:
    there = next(path for path in (home, *home.parents) if path.exists())
    free = shutil.disk_usage(there).free
    problem = None
    if not os.access(there, os.W_OK):
        problem = f"{there} is not writable"
    elif free < LITTLE_DISK_BYTES:
        problem = f"only {size_text(free)} are free"
    return Finding("disk", f"{home}: {size_text(free)} free", problem, "make room, or name another place: --cache-dir")


def _address(host: str, port: int) -> Finding:
    name, place = "address", f"{host} port {port}"
    try:
        with socket.create_connection((host, port), timeout=ANSWER_TIMEOUT_S):
            pass
    except OSError:
        return Finding(name, f"{place} is free")
    try:
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(f"http://{host}:{port}/v1/models", timeout=ANSWER_TIMEOUT_S) as answer:
            served = [model["id"] for model in json.load(answer)["data"]]
        return Finding(name, f"{place}: a server with {', '.join(served)} answers")
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):
            return Finding(name, f"{place}: a server that wants a key answers")
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return Finding(name, f"{place} is taken by another program", "a server cannot listen there", f"--port {port + 1}")
