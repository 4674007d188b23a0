"""What `dijiang ray deploy` is told: a TOML file with the settings of each engine, and of the fleet."""

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from server.startup.settings import Settings, read_settings


class FleetOptions(BaseModel):
    """The table `[fleet]`."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    name: str = Field("dijiang", pattern=r"^[A-Za-z0-9_-]{1,63}$")
    """Of the Ray Serve application."""
    min_replicas: int = Field(1, ge=1)
    """Fewest engines."""
    max_replicas: int = Field(4, ge=1)
    """Most engines."""
    target_load: float = Field(0.7, gt=0, le=1)
    """Share of all slots that is to be busy; requests that wait count as busy slots."""
    upscale_delay_s: float = Field(10.0, ge=0)
    """For how long more engines must be wanted before there are more."""
    downscale_delay_s: float = Field(300.0, ge=0)
    """For how long fewer engines must be wanted before there are fewer."""
    cpus: float = Field(1.0, ge=0)
    """CPUs that Ray sets aside for each engine."""
    gpus: float = Field(0.0, ge=0)
    """CUDA devices for each engine; with tensor_parallel as many as that."""
    fronts: int = Field(1, ge=1)
    """Processes that choose an engine for each request and pass its answer on."""
    max_ongoing: int = Field(1024, ge=1)
    """Most requests of one engine at a time; further ones wait at the front."""
    health_check_s: float = Field(2.0, gt=0)
    """How often each engine is looked after."""


class FleetConfig(BaseModel):
    """See the module."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    fleet: FleetOptions = FleetOptions()
    serve: dict[str, Any] = {}

    @model_validator(mode="after")
    def _take_effect(self) -> Self:
        settings = settings_of(self.serve)
        if self.fleet.min_replicas > self.fleet.max_replicas:
            raise ValueError(
                f"min_replicas is {self.fleet.min_replicas}, but max_replicas is {self.fleet.max_replicas}"
            )
        if self.fleet.max_replicas > 1 and settings.states and settings.state_store is None:
            raise ValueError(
                "several engines need a state_store in [serve], so that any of them can resume every conversation; "
                "or states = false"
            )
        for name in ("host", "port", "tls_cert", "tls_key", "replica_name"):
            if name in self.serve:
                raise ValueError(f"{name} has no effect in [serve]: Ray Serve listens, and names its replicas")
        return self


class FleetConfigError(ValueError):
    """What is wrong with a configuration, a sentence a line."""


def settings_of(serve: Mapping[str, Any]) -> Settings:
    """The table `[serve]` as the settings of an engine; raises `SettingsError`."""
    return read_settings(serve)


def read_config(path: Path) -> FleetConfig:
    """Reads the file.

    Raises:
        FleetConfigError: all that is wrong.
    """
    try:
        return FleetConfig(**tomllib.loads(path.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise FleetConfigError(f"{path} cannot be read: {error}") from error
    except ValidationError as error:
        lines = [f"{'.'.join(map(str, item['loc'])) or path.name}: {item['msg']}" for item in error.errors()]
        raise FleetConfigError("\n".join(lines)) from error
