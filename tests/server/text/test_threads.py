"""Long texts: encoding lets everybody else go on, and no key takes more threads than its places."""

import asyncio
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from tokenizers import AddedToken, decoders, models, normalizers
from tokenizers import Tokenizer as RawTokenizer

from server.text.threads import PLACES, TextThreads
from server.text.tokenizer import Tokenizer, load_tokenizer
from tests.waiting import PATIENCE_S, until_async

LONG, VERY_LONG = 5_000, 1_000_000
TURNS = 20
"""While the lock is held there are five at most, before and behind."""


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


pytestmark = pytest.mark.anyio


class Work:
    """Something that takes as long as the test wants, unless nobody begins it."""

    def __init__(self, gates: list[threading.Event]) -> None:
        self.has_begun, self._may_end = threading.Event(), threading.Event()
        gates.append(self._may_end)

    def __call__(self) -> str:
        self.has_begun.set()
        assert self._may_end.wait(PATIENCE_S)
        return "done"

    def end(self) -> None:
        self._may_end.set()


@pytest.fixture
def gates() -> Iterator[list[threading.Event]]:
    """Opened at the end, whatever the test came to, so that no thread stays."""
    gates: list[threading.Event] = []
    yield gates
    for gate in gates:
        gate.set()


@pytest.fixture
def spaced_tokenizer(tmp_path: Path) -> Tokenizer:
    """Puts a space before a text, as SentencePiece does."""
    letters = {letter: number for number, letter in enumerate("0123456789▁\n")}
    raw = RawTokenizer(models.BPE(vocab=letters, merges=[]))
    raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    raw.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    raw.add_special_tokens([AddedToken("<s>", special=True, normalized=False)])
    raw.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer is not None
    assert tokenizer.vocabulary.num_leading_spaces
    return tokenizer


@pytest.mark.parametrize("how", ["encode", "encode_plain", "continues"])
async def test_the_event_loop_takes_its_turns_while_a_text_is_encoded(
    byte_tokenizer: Tokenizer, spaced_tokenizer: Tokenizer, how: str
) -> None:
    has_begun, has_ended = threading.Event(), threading.Event()
    text = "7" * 800_000  # half a second of work: hundreds of turns, of which a busy machine leaves some

    def encode() -> int:
        has_begun.set()
        if how == "encode":
            token_ids = byte_tokenizer.encode(text)
        elif how == "encode_plain":
            token_ids = byte_tokenizer.encode_plain(text, continues=False)
        else:
            token_ids = spaced_tokenizer.encode_plain(text, continues=True)
        has_ended.set()
        return len(token_ids)

    encoding = asyncio.create_task(TextThreads().run("ann", len(text), encode))
    await until_async(has_begun.is_set)
    turns = 0
    while not has_ended.is_set():
        await asyncio.sleep(0.001)
        turns += 1
    assert await encoding == len(text)
    assert turns >= TURNS


async def test_a_key_has_its_places_and_other_keys_and_its_shorter_texts_do_not_wait(
    gates: list[threading.Event],
) -> None:
    threads = TextThreads()
    works = [Work(gates) for _ in range(50)]
    ann = [asyncio.create_task(threads.run("ann", VERY_LONG, work)) for work in works]
    await until_async(lambda: sum(work.has_begun.is_set() for work in works) == PLACES)
    assert await threads.run("bob", VERY_LONG, lambda: "bob's") == "bob's"
    assert await threads.run("ann", LONG, lambda: "short") == "short"
    assert sum(work.has_begun.is_set() for work in works) == PLACES
    works[0].end()
    await until_async(works[PLACES].has_begun.is_set)
    for work in works:
        work.end()
    assert await asyncio.gather(*ann) == ["done"] * 50


async def test_who_leaves_does_not_begin_and_what_has_begun_holds_its_place_to_its_end(
    gates: list[threading.Event],
) -> None:
    threads = TextThreads()
    works = [Work(gates) for _ in range(PLACES + 2)]
    tasks = [asyncio.create_task(threads.run("ann", LONG, work)) for work in works]
    await until_async(lambda: all(work.has_begun.is_set() for work in works[:PLACES]))
    for task in tasks[: PLACES + 1]:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
    assert not works[-1].has_begun.is_set(), "the two that were left are still going on"
    works[0].end()
    await until_async(works[-1].has_begun.is_set)
    for work in works:
        work.end()
    assert await tasks[-1] == "done"
    assert not works[PLACES].has_begun.is_set()


async def test_a_failure_is_its_callers_and_the_place_is_free_again() -> None:
    threads = TextThreads()
    for _ in range(PLACES + 1):
        with pytest.raises(ZeroDivisionError):
            await threads.run("ann", LONG, lambda: 1 // 0)
    assert await threads.run("ann", LONG, lambda: "done") == "done"
