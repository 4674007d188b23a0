"""What an operator sees when the server is ready."""

import socket
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit

from dijiang_model.formats.sizes import size_text
from server.engine.types.requests import EngineConfig, EngineInfo
from server.options import ServiceOptions
from server.startup.settings import Settings
from server.text.tokenizer import Tokenizer

_STEPS: Mapping[str, str] = {
    "native": "compiled kernels",
    "triton": "Triton kernels",
    "torch": "torch operations",
}


class Summary:
    """What an operator sees when the server is ready."""

    def __init__(
        self,
        settings: Settings,
        config: EngineConfig,
        options: ServiceOptions,
        recipe: str,
        tokenizer: Tokenizer | None,
        listener: socket.socket,
    ) -> None:
        host, port = listener.getsockname()[:2]
        shown = "127.0.0.1" if host in {"0.0.0.0", "::"} else host  # noqa: S104 (only shown)
        authority = f"[{shown}]" if ":" in shown else shown
        self.base_url = f"{'http' if settings.tls_cert is None else 'https'}://{authority}:{port}/v1"
        self._playground = self.base_url.removesuffix("v1") if settings.playground else "off"
        self.model = options.model_name
        self._address = f"{host} port {port}"
        self._config = config
        self._recipe = recipe
        self._text = "token ids only (the model has no tokenizer)" if tokenizer is None else "yes"
        self._keys = len(options.key_hashes)
        self._states = "not saved"
        if settings.state_store is not None:
            address = urlsplit(settings.state_store.get_secret_value())
            place = f"{address.hostname or 'its default address'}{address.path}, schema {settings.state_store_schema}"
            self._states = f"up to {size_text(settings.states_disk)} in PostgreSQL at {place}"
        elif config.states_folder is not None:
            self._states = f"up to {size_text(settings.states_disk)} in {Path(config.states_folder).parent}"

    def rows(self, info: EngineInfo) -> dict[str, str]:
        total, each = info.num_slots * info.state_bytes_per_slot, size_text(info.state_bytes_per_slot)
        rows = {
            "model": f"{self.model} ({info.num_parameters / 1e6:,.1f} M parameters, loaded in {info.load_s:.1f} s)",
            "recipe": self._recipe,
            "device": f"{info.device} ({info.device_name}){self._ranks_text(info)}",
            "dtype": f"{info.weights_dtype} weights, {info.state_dtype} state",
            "threads": str(self._config.num_threads),
            "steps": _STEPS[info.steps] + (f" ({info.kernels})" if info.kernels else ""),
            "capacity": f"{info.num_slots} conversations of {each}, whatever their length",
            "memory": f"{each}: {info.memory}" if info.memory else "not known",
            "state": f"{size_text(total)} ({total:,} bytes)",
            "speculation": f"up to {info.max_drafts} drafts a step" if info.max_drafts else "off",
            "prefix cache": self._cache_text(),
            "saved states": self._states,
            "text": self._text,
            "keys": f"{self._keys} accepted" if self._keys else "none: everybody has access",
            "address": self._address,
            "base_url": self.base_url,
            "playground": self._playground,
        }
        if info.slow_because is not None:
            rows["warning"] = f"several times slower than it could be: {info.slow_because}"
        return rows

    def _ranks_text(self, info: EngineInfo) -> str:
        if info.num_ranks == 1:
            return ""
        return f", split over {info.num_ranks} processes with {size_text(info.state_bytes_per_rank)} of each state"

    def _cache_text(self) -> str:
        config = self._config
        num_bytes = config.prefix_cache_host_bytes + config.prefix_cache_device_bytes
        return f"up to {size_text(num_bytes)}" if num_bytes else "off"
