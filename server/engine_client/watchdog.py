"""Notices an engine process that is there and does nothing: stopped, deadlocked, or waiting for a rank that is.

The engine says something between two steps, whether asked or not. Time counts as silence only while this process ran
itself: after a machine's sleep nobody is to blame.
"""

import asyncio
import logging
from collections.abc import Callable

from server.engine_client.link import EngineEndedError, EngineLink

STEPS = 5
"""So many times its longest step an engine may be silent, whatever the limit."""
_LOOKS = 4
_LONGEST_INTERVAL_S = 1.0
_log = logging.getLogger(__name__)


class Watchdog:
    """Of one engine process."""

    def __init__(self, limit_s: float, *, ask: Callable[[], None], longest_step_s: Callable[[], float]) -> None:
        """
        Args:
            limit_s: of silence, > 0.
            ask: asks the engine for a sign of life; raises `EngineEndedError` when there is no process any more.
            longest_step_s: the longest step that was seen.
        """
        self._limit_s = limit_s
        self._ask = ask
        self._longest_step_s = longest_step_s
        self._has_spoken = False

    def heard(self) -> None:
        """Notes a sign of life."""
        self._has_spoken = True

    async def silence(self) -> float:
        """Returns once the engine has been silent for too long: for how many seconds."""
        interval_s = min(_LONGEST_INTERVAL_S, self._limit_s / _LOOKS)
        silent_s, is_asked = 0.0, False
        while silent_s < max(self._limit_s, STEPS * self._longest_step_s()):
            self._has_spoken = False
            if not is_asked:
                try:
                    self._ask()
                except EngineEndedError:
                    await asyncio.Event().wait()  # somebody else sees to that, and ends this
                is_asked = True
            await asyncio.sleep(interval_s)
            if self._has_spoken:
                silent_s, is_asked = 0.0, False
            else:
                silent_s += interval_s
        return silent_s


async def end_when_silent(link: EngineLink, watchdog: Watchdog) -> None:
    """Kills the process of a link once it has been silent for too long."""
    silent_s = await watchdog.silence()
    _log.error("engine process %s has not answered for %.0f s and is ended", link.pid, silent_s)
    link.kill()
