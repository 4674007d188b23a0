"""A second engine process, loaded beside the one that serves, to take its place: a model that cannot be loaded costs
nothing but the attempt.
"""

from collections.abc import AsyncIterator
from dataclasses import dataclass

import psutil

from server.engine.process.messages import EngineReady, LoadFailed, Report
from server.engine.types.requests import EngineConfig, EngineInfo
from server.engine_client.link import EngineLink
from server.hardware import free_host_bytes


class EngineLoadError(Exception):
    """The model cannot be loaded; the text is for the operator."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A loaded engine.

    Attributes:
        link: its process.
        reports: what it says from now on.
        info: what it said about itself.
    """

    link: EngineLink
    reports: AsyncIterator[Report]
    info: EngineInfo

    @classmethod
    async def load(cls, config: EngineConfig, *, module: str, beside: int | None) -> "Candidate":
        """Starts a process and waits until it is ready.

        Args:
            config: what it gets.
            module: see `EngineLink.open`.
            beside: the process that serves meanwhile; None: there is none.

        Raises:
            EngineLoadError: it cannot load, or there is no memory for two.
        """
        if beside is not None:
            _require_memory(beside)
        try:
            link = await EngineLink.open(config, module=module)
        except Exception as error:
            raise EngineLoadError(f"the engine process cannot be started: {error}") from error
        try:
            reports = link.reports()
            return cls(link, reports, await _ready(link, reports))
        except BaseException:
            await link.close()
            raise


async def _ready(link: EngineLink, reports: AsyncIterator[Report]) -> EngineInfo:
    async for report in reports:
        if isinstance(report, EngineReady):
            return report.info
        if isinstance(report, LoadFailed):
            raise EngineLoadError(report.reason)
    raise EngineLoadError(f"exit status {link.returncode}")


def _require_memory(pid: int) -> None:
    """Raises `EngineLoadError` unless there is as much free memory as that process has for itself alone."""
    try:
        needed = psutil.Process(pid).memory_full_info().uss
    except psutil.Error:
        return  # it has just ended, and with it the need
    if (free := free_host_bytes()) < needed:
        raise EngineLoadError(
            f"two models do not fit into memory: the one that serves takes {needed / 2**20:,.0f} MiB, "
            f"and {free / 2**20:,.0f} MiB are free; with `beside: false` it is ended before the other one is loaded"
        )
