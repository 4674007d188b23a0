"""How processes of the engine end when something fails: exit status, a line on standard error, word to the service."""

import json
import logging
import os
import sys
import traceback
from datetime import UTC, datetime

from dijiang_model.errors import ModelError

EXIT_STEP_FAILED = 70
EXIT_LOAD_FAILED = 71


def log_failure(event: str, error: BaseException) -> None:
    """One line of JSON on standard error: what failed and where; no value of any variable."""
    _write("error", event, **_told(error))


class LineHandler(logging.Handler):
    """What libraries log, as lines of the same form; with the error that a record carries."""

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        fields = {} if error is None else _told(error)
        _write(record.levelname.lower(), record.getMessage(), logger=record.name, **fields)


def _told(error: BaseException) -> dict[str, object]:
    """What failed and where."""
    frames = [
        f"{os.path.basename(frame.filename)}:{frame.lineno} {frame.name}"
        for frame in traceback.extract_tb(error.__traceback__)
    ]
    return {"error": type(error).__name__, "message": str(error), "frames": frames}


def _write(level: str, event: str, **fields: object) -> None:
    line = {"level": level, "event": event, "timestamp": datetime.now(UTC).isoformat(), **fields}
    sys.stderr.write(json.dumps(line) + "\n")
    sys.stderr.flush()


def reason_of(error: Exception) -> str:
    """What the service is told: of wrong files and settings their own sentences, of others their kind as well."""
    words = str(error)
    return words if words and is_permanent(error) else f"{type(error).__name__}: {words}"


def is_permanent(error: Exception) -> bool:
    """Whether loading again would fail again: wrong files and settings, not lost devices or memory."""
    return isinstance(error, ModelError | ValueError | FileNotFoundError)
