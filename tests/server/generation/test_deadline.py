"""A deadline holds in every phase, from a request's arrival on."""

import asyncio
from pathlib import Path

import pytest

from server.errors import DeadlineError
from server.generation.deadline import Deadline
from server.grammar_check.checker import GrammarChecker
from tests.server.conftest import Loopback
from tests.server.grammar_check.test_structure_checker import SLOW

pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


async def test_what_takes_longer_ends_and_what_is_checked_later_too() -> None:
    deadline = Deadline.starting_now(0.01)
    with pytest.raises(DeadlineError, match=r"not complete after 0\.01 s"):
        async with deadline.kept():
            await asyncio.Event().wait()
    with pytest.raises(DeadlineError):
        deadline.check()


async def test_without_one_nothing_ends_and_a_timeout_of_something_else_is_none() -> None:
    deadline = Deadline.starting_now(None)
    deadline.check()
    with pytest.raises(TimeoutError):
        async with deadline.kept():
            raise TimeoutError


def test_it_holds_while_a_grammar_compiles(server: Loopback, tmp_path: Path) -> None:
    before = server.service.grammars
    server.service.grammars = GrammarChecker(tmp_path, module=SLOW)
    try:
        body = {"prompt": "x", "timeout": 0.2, "structured_outputs": {"regex": str(tmp_path / "never")}}
        answer = server.http.post("/v1/completions", json=body)
        assert (answer.status_code, answer.json()["error"]["code"]) == (504, "timeout")
        assert not server.engine.submitted
        (tmp_path / "never").touch()
    finally:
        server.service.grammars = before
