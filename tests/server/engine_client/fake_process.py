"""An engine process around the fake runner: `python -m tests.server.engine_client.fake_process FOLDER`.

`model_path` chooses how it behaves: `ok`; `damaged` and `no device` fail to load, for good and perhaps
not; `flaky:FILE` fails to load until FILE is there, and creates it; `exits` ends without a word.
A prompt that begins with `BREAKING_TOKEN` breaks the step that it is in.
"""

import os
import sys
import time
from pathlib import Path

from dijiang_model.errors import CheckpointError
from server.engine.batch import Batch
from server.engine.engine import Engine
from server.engine.process.main import main
from server.engine.types.requests import EngineConfig
from tests.server.engine.fakes import FakeRunner, engine

MODULE = "tests.server.engine_client.fake_process"
BREAKING_TOKEN = 48
EXIT_STATUS = 9
_STEP_S = 0.001
"""As if it computed; an endless request of no cost would only fill the test's memory."""


class ProcessRunner(FakeRunner):
    """A fake runner that takes a little time, and breaks when told to."""

    def launch(self, batch: Batch) -> None:
        if any(chunk.token_ids[:1] == (BREAKING_TOKEN,) for chunk in batch.chunks):
            raise RuntimeError("the device is gone")
        time.sleep(_STEP_S)
        super().launch(batch)


def load(config: EngineConfig) -> Engine:
    behaviour, _, path = config.model_path.partition(":")
    if behaviour == "damaged":
        raise CheckpointError("a tensor is missing")
    if behaviour == "exits":
        os._exit(EXIT_STATUS)
    if behaviour == "no device" or (behaviour == "flaky" and not Path(path).exists()):
        if path:
            Path(path).touch()
        raise RuntimeError("no device today")
    return engine(ProcessRunner(max_step_tokens=config.max_step_tokens), max_waiting=config.max_waiting)


if __name__ == "__main__":
    sys.exit(main(load))
