"""What is settled before the engine starts: what its process waits for, and nothing that imports much."""

from dataclasses import dataclass
from pathlib import Path

from server.engine.types.requests import EngineConfig
from server.engine_client.client import EngineClient
from server.hardware import HardwareError, find_device
from server.startup.assemble import engine_config, find_model, open_store
from server.startup.errors import StartError
from server.startup.notices import Notices
from server.startup.settings import Settings
from server.states.errors import StoreError
from server.states.store import StateStore


@dataclass(frozen=True, slots=True)
class Prepared:
    """What is settled before the engine starts."""

    settings: Settings
    model: Path
    default_name: str
    config: EngineConfig
    engine: EngineClient
    store: StateStore | None


def prepare(settings: Settings, notices: Notices) -> Prepared:
    """Finds the model and the device, and opens the store.

    Raises:
        StartError: one of them cannot be used.
    """
    model, default_name = find_model(settings, notices)
    try:
        device = find_device(settings.device, num_ranks=settings.tensor_parallel)
        store = open_store(settings, default_name, notices)
        config = engine_config(settings, model, device, store)
    except (HardwareError, StoreError) as error:
        raise StartError(str(error)) from error
    return Prepared(settings, model, default_name, config, EngineClient(config), store)
