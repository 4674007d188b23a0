"""What `dijiang serve` makes of its settings: the model, the store of states, the engine's part, the service's part."""

import hashlib
import json
import re
import secrets
from dataclasses import asdict, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from dijiang_model.checkpoints.default_sampling import NEUTRAL, DefaultSampling, read_default_sampling
from dijiang_model.conversion import default_folder
from dijiang_model.errors import ConfigError
from dijiang_model.formats.model_folder import no_model_problem
from server.engine.types.requests import EngineConfig
from server.grammar_check.checker import GrammarLimits
from server.hardware import Device, HardwareError, default_state_bytes, default_threads
from server.options import ServiceOptions
from server.startup.errors import StartError
from server.startup.keys import key_options
from server.startup.notices import Notices
from server.startup.settings import Settings
from server.states.embedded import open_embedded_store
from server.states.errors import StoreError
from server.states.indexed import StoreOptions
from server.states.store import StateStore
from server.tracing import NO_TRACER, Tracer

CPU_STEP_TOKENS, CUDA_STEP_TOKENS = 512, 2048
DEFAULT_HOME = Path("~/.cache/dijiang")
MAX_AUTO_CACHE_BYTES = 1 << 30
RANDOM_NAME = secrets.token_hex(4)
"""Of this server if it was given none; one for all its life, though options may be read again."""


def open_store(settings: Settings, model_name: str, notices: Notices) -> StateStore | None:
    """Where states are kept; None if they are not.

    Raises:
        StoreError: the folder or the database that the operator named cannot be used.
    """
    if not settings.states:
        return None
    folder = settings.states_folder
    if folder is None:
        home = DEFAULT_HOME if settings.cache_dir is None else settings.cache_dir
        folder = home / "states" / re.sub(r"[^A-Za-z0-9._-]", "_", model_name)
    folder = folder.expanduser().resolve()
    options = StoreOptions(
        max_bytes=int(settings.states_disk),
        eviction=settings.states_eviction,
        max_owner_bytes=_bytes_per_key(settings),
    )
    if settings.state_store is not None:
        return _open_shared_store(settings, settings.state_store.get_secret_value(), folder, options)
    try:
        return open_embedded_store(folder, options)
    except StoreError as error:
        if settings.states_folder is not None:
            raise
        notices.warn(f"no states are kept: {error}")
        return None


def _open_shared_store(settings: Settings, url: str, folder: Path, options: StoreOptions) -> StateStore:
    try:
        from server.states.shared import SharedOptions, open_shared_store
    except ImportError as error:
        message = f"state_store needs psycopg and psycopg_pool: pip install 'dijiang[postgres]' ({error})"
        raise StoreError(message) from error
    shared = SharedOptions(
        url,
        schema=settings.state_store_schema,
        max_copies_bytes=int(settings.state_store_copies),
        max_connections=settings.state_store_connections,
        timeout_s=settings.state_store_timeout_s,
        bytes_url=settings.state_store_bytes,
        replica_name=settings.replica_name or RANDOM_NAME,
    )
    return open_shared_store(folder, shared, options)


def make_tracer(settings: Settings) -> Tracer:
    """Where traces go.

    Raises:
        StartError: they are wanted, and OpenTelemetry is not installed.
    """
    if settings.otlp_traces_endpoint is None:
        return NO_TRACER
    try:
        from server.startup.otel import OtelTracer
    except ImportError as error:
        message = f"otlp_traces_endpoint needs OpenTelemetry: pip install 'dijiang[otel]' ({error})"
        raise StartError(message) from error
    return OtelTracer.exporting(settings.otlp_traces_endpoint, version=version("dijiang"))


def _bytes_per_key(settings: Settings) -> int:
    """What each owner may keep: without keys there is one, everybody."""
    if settings.states_per_key == "auto":
        return int(settings.states_disk) // max(1, len(key_options(settings)["key_hashes"]))
    return int(settings.states_per_key)


def engine_config(settings: Settings, model: Path, device: Device, store: StateStore | None = None) -> EngineConfig:
    """The frozen part of the settings that the engine gets, with every `auto` decided.

    Raises:
        HardwareError: too little memory, or weights in a form that the device does not have.
    """
    num_ranks = settings.tensor_parallel
    state_bytes = (
        default_state_bytes(device, model, num_ranks=num_ranks)
        if settings.state_memory == "auto"
        else int(settings.state_memory)
    )
    auto_cache = min(state_bytes // 4, MAX_AUTO_CACHE_BYTES)
    auto_step = max(CUDA_STEP_TOKENS if device.is_cuda else CPU_STEP_TOKENS, settings.max_conversations)
    step_tokens, cache_memory = settings.max_step_tokens, settings.prefix_cache_memory
    decided = {
        "model_path": str(model),
        "device": device.name,
        "weights_dtype": _weights_dtype(settings.dtype, model, device),
        "num_threads": default_threads() if settings.threads == "auto" else settings.threads,
        "state_memory_bytes": state_bytes,
        "max_num_slots": settings.max_conversations,
        "preemption_bytes": (
            state_bytes // 4 if settings.preemption_memory == "auto" else int(settings.preemption_memory)
        ),
        "max_step_tokens": auto_step if step_tokens == "auto" else step_tokens,
        "max_waiting": settings.max_queue,
        "reserved_waiting": _reserved_places(settings),
        "max_drafts": None if settings.speculate == "auto" else settings.speculate,
        "states_folder": None if store is None else str(store.files_folder),
        "prefix_cache_host_bytes": auto_cache if cache_memory == "auto" else int(cache_memory),
        "prefix_cache_device_bytes": int(settings.prefix_cache_device_memory) if device.is_cuda else 0,
        "prefix_cache_disk_bytes": int(settings.prefix_cache_disk),
        "prefix_cache_folder": (
            None if store is None or not settings.prefix_cache_disk else str(store.files_folder.parent / "prefixes")
        ),
    }
    return EngineConfig(**_taken_over(settings, EngineConfig) | decided)


def _reserved_places(settings: Settings) -> int:
    """Places in the queue for keys of which nothing waits."""
    if settings.reserved_queue != "auto":
        return settings.reserved_queue
    return settings.max_queue // 8 if len(key_options(settings)["key_hashes"]) > 1 else 0


def _taken_over(settings: Settings, kind: type[EngineConfig] | type[ServiceOptions]) -> dict[str, Any]:
    """The settings that go by the same name, and mean the same, in another part of the server."""
    return {field.name: getattr(settings, field.name) for field in fields(kind) if field.name in Settings.model_fields}


def _weights_dtype(wanted: str, model: Path, device: Device) -> str:
    """What the engine is told: weights that are stored rounded stay as they are.

    Raises:
        HardwareError: they are asked for in other numbers.
    """
    stored = _stored_quantized(model)
    if stored is None:
        auto = "bfloat16" if device.is_cuda else "float32"
        return auto if wanted == "auto" else wanted
    if wanted not in ("auto", stored):
        raise HardwareError(f"the weights in {model} are {stored}: dtype is auto or {stored} for them")
    return stored


def _stored_quantized(model: Path) -> str | None:
    """`int8` or `int4` where the model's config says so; what is wrong with a config, the engine tells."""
    try:
        section = json.loads((model / "config.json").read_bytes())["dijiang"]["quantization"]
        return str(section["weights"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


LOCAL_HOSTS = ("localhost", ".localhost", "127.", "::1")
"""Names of this machine; one with a dot at its end or beginning stands for all that begin or end so."""


def service_options(settings: Settings, model: Path, default_name: str) -> ServiceOptions:
    """The frozen part of the settings that the HTTP side gets.

    Raises:
        ConfigError: the default sampling cannot be used.
    """
    name, *other_names = settings.served_model_name or (default_name,)
    number = version("dijiang")
    digest = hashlib.sha256(f"{number}\n{name}\n".encode() + (model / "config.json").read_bytes()).hexdigest()
    return ServiceOptions(
        model_name=name,
        other_names=tuple(other_names),
        host_names=_host_names(settings),
        version=number,
        fingerprint=f"fp_{digest[:12]}",
        replica=settings.replica_name or RANDOM_NAME,
        sampling=_sampling(settings, model),
        **key_options(settings),
        **_taken_over(settings, ServiceOptions),
    )


def _sampling(settings: Settings, model: Path) -> DefaultSampling:
    """Raises `ConfigError`: what the setting or the model's file says cannot be used."""
    wanted = settings.default_sampling
    if wanted == "neutral":
        return NEUTRAL
    of_model = read_default_sampling(model)
    if wanted == "model":
        return of_model
    return DefaultSampling.of(asdict(of_model) | _assignments(wanted), source="--default-sampling")


def _assignments(text: str) -> dict[str, object]:
    """`temperature=0.7,top_p=0.9` as numbers."""
    known = [field.name for field in fields(DefaultSampling)]
    values: dict[str, object] = {}
    for part in text.split(","):
        name, _, value = (item.strip() for item in part.partition("="))
        if name not in known:
            choices = f"`model`, `neutral` or NAME=VALUE with a name of {', '.join(known)}"
            raise ConfigError(f"--default-sampling has {part.strip()!r}, must be {choices}")
        try:
            values[name] = int(value) if name == "top_k" else float(value)
        except ValueError as error:
            raise ConfigError(f"--default-sampling has {name} {value!r}, which is no number") from error
    return values


def _host_names(settings: Settings) -> tuple[str, ...]:
    """Those that requests may name; empty: any."""
    has_keys = bool(settings.api_keys) or bool(settings.api_keys_file or settings.keys_file)
    is_local = settings.host in ("localhost", "::1") or settings.host.startswith("127.")
    if not settings.allowed_hosts and (has_keys or not is_local):
        return ()
    return (*settings.allowed_hosts, *LOCAL_HOSTS)


def grammar_limits(settings: Settings) -> GrammarLimits:
    """What the grammar of a request may cost."""
    return GrammarLimits(max_bytes=int(settings.max_grammar_bytes), timeout_s=settings.grammar_timeout_s)


def recipe_of(model: Path) -> str:
    """How the model was made, as its `config.json` says; the authors' own format is `released`."""
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    try:
        return str(config["dijiang"]["origin"]["recipe"])
    except (KeyError, TypeError):
        return "released"


def find_model(settings: Settings, notices: Notices) -> tuple[Path, str]:
    """The model's folder and its name."""
    if settings.model is None:
        return _default_model(settings.cache_dir, notices.console, is_quantized=settings.dtype in ("auto", "int8"))
    folder = settings.model.expanduser().resolve()
    problem = no_model_problem(settings.model.expanduser())
    if problem is not None:
        raise StartError(problem)
    try:
        json.loads((folder / "config.json").read_bytes())
    except ValueError as error:
        raise StartError(f"{settings.model}: config.json is not valid JSON: {error}") from error
    return folder, folder.name


def _default_model(home: Path | None, console: Console, *, is_quantized: bool) -> tuple[Path, str]:
    folder = default_folder.default_folder(home, is_quantized=is_quantized)
    if default_folder.is_noted(folder):
        return folder, default_folder.MODEL_NAME
    # Imported here: it brings torch, which this process does not need otherwise.
    from dijiang_model.conversion.default_model import ensure_default_model
    from dijiang_model.errors import ModelError

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    try:
        with Progress(*columns, console=console, transient=True) as progress:
            task = progress.add_task("Converting the default model, once", total=None, visible=False)
            path = ensure_default_model(
                home,
                is_quantized=is_quantized,
                on_progress=lambda done, total: progress.update(task, completed=done, total=total, visible=True),
            )
    except ModelError as error:
        raise StartError(str(error)) from error
    default_folder.note(path)
    return path, default_folder.MODEL_NAME
