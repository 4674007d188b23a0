"""Lines that a process of the engine writes on standard error."""

import json
import logging

import pytest

from server.engine.failures import LineHandler, log_failure, reason_of


def fail() -> None:
    raise RuntimeError("the device is gone")


def test_an_error_that_a_library_logs_is_told_like_one_of_our_own(capsys: pytest.CaptureFixture[str]) -> None:
    logger = logging.Logger("library")
    logger.addHandler(LineHandler())
    try:
        fail()
    except RuntimeError as error:
        log_failure("engine_step_failed", error)
        logger.exception("a task failed")
    logger.warning("old kernels")
    own, logged, plain = (json.loads(line) for line in capsys.readouterr().err.splitlines())
    told = {"error": "RuntimeError", "message": "the device is gone"}
    for line in (own, logged):
        assert told.items() <= line.items()
        assert line["frames"][-1].endswith(" fail")
    assert (logged["level"], logged["event"], logged["logger"]) == ("error", "a task failed", "library")
    assert (plain["level"], plain["event"]) == ("warning", "old kernels")
    assert "error" not in plain


def test_a_reason_is_a_sentence_of_its_own_where_there_is_one_and_never_nothing() -> None:
    assert reason_of(ValueError("an unknown dtype")) == "an unknown dtype"
    assert reason_of(RuntimeError("no device")) == "RuntimeError: no device"
    assert reason_of(ValueError()) == "ValueError: "
