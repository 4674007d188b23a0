"""What the teacher reads: running text, and chats in which facts are told and asked for later."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice

import torch
from tokenizers import Tokenizer
from torch import Tensor

from dijiang_model.conversion.calibration.facts import Fact, FactKind, draw_facts
from dijiang_model.conversion.training.chat_prompt import Message, RenderChat
from dijiang_model.errors import ConversionError

PASSAGE_CHARACTERS = (450, 1350)
FACTS_PER_TURN = 2
FACTS_PER_KIND = 2
INTRODUCTIONS = (
    "Here is a passage that I am reading:",
    "Now read this:",
    "The next part:",
    "Have a look at this text:",
)
REPLIES = ("I have read it.", "Thank you, I have read the passage.", "Noted.", "All right, I will keep that in mind.")


@dataclass(frozen=True, slots=True)
class Recalled:
    """The value of a fact where it is told and where it is answered, as ranges of tokens [start, stop)."""

    told: tuple[int, int]
    answered: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Context:
    """Tokens that are read from an empty state.

    Attributes:
        token_ids: [T] int64.
        recalled: facts in it; none in running text.
    """

    token_ids: Tensor
    recalled: tuple[Recalled, ...] = ()


def text_and_chats(
    tokenizer: Tokenizer,
    text: str,
    *,
    render: RenderChat,
    kinds: Sequence[FactKind],
    num: int,
    length: int,
    seed: int,
) -> list[Context]:
    """Contexts of at most `length` tokens, running text and chats in turn, each from a part of the text of its own.

    Where a chat with facts does not fit into `length`, there is running text instead.

    Raises:
        ConversionError: the text is too short.
    """
    rng = random.Random(seed)  # noqa: S311  reproducible, nothing secret
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    if len(ids) < num * length:
        raise ConversionError(
            f"the text has {len(ids):,} tokens, but {num} contexts of {length:,} take {num * length:,}: give more text"
        )
    contexts = []
    for index in range(num):
        part = ids[index * len(ids) // num : (index + 1) * len(ids) // num]
        context = Context(torch.tensor(part[:length]))
        if index % 2 == 1:
            passages = cut_passages(tokenizer.decode(part), rng)
            chat = fact_chat(tokenizer, passages, render=render, kinds=kinds, length=length, rng=rng)
            context = context if chat is None else chat
        contexts.append(context)
    return contexts


def random_contexts(*, vocab_size: int, num: int, length: int, seed: int) -> list[Context]:
    """Random token ids, for models without a tokenizer."""
    generator = torch.Generator().manual_seed(seed)
    return [Context(torch.randint(vocab_size, (length,), generator=generator)) for _ in range(num)]


def fact_chat(
    tokenizer: Tokenizer,
    passages: Iterator[str],
    *,
    render: RenderChat,
    kinds: Sequence[FactKind],
    length: int,
    rng: random.Random,
    facts_per_kind: int = FACTS_PER_KIND,
    facts_per_turn: int = FACTS_PER_TURN,
    told_in: int | None = None,
) -> Context | None:
    """A chat of at most `length` tokens: passages to read, facts told before them, and all asked for at the end.

    Args:
        told_in: the first turns, in which alone facts are told; None: in all, as long as there are any.

    Returns:
        None if no fact fits.
    """
    facts = draw_facts(kinds, facts_per_kind * len(kinds), rng)
    left = iter(facts if told_in is None else facts[: told_in * facts_per_turn])
    turns: list[Message] = []
    questions: list[list[Message]] = []
    told: list[Fact] = []
    text = ""
    for passage in passages:
        now = list(islice(left, facts_per_turn))
        turns += _told(now, passage, rng)
        for fact in now:
            questions.insert(rng.randint(0, len(questions)), _asked(fact))
        longer = render([*turns, *chain.from_iterable(questions)])
        if len(tokenizer.encode(longer, add_special_tokens=False).ids) > length:
            break
        text, told = longer, told + now
    return _located(tokenizer, text, told) if told else None


def cut_passages(text: str, rng: random.Random) -> Iterator[str]:
    """Pieces of a text that end with a sentence where there is one, over and over; empty ones of an empty text."""
    start = 0
    while True:
        if start >= len(text) - PASSAGE_CHARACTERS[1]:
            start = 0
        end = text.find(". ", start + rng.randint(*PASSAGE_CHARACTERS)) + 1
        end = end if start < end <= start + 2 * PASSAGE_CHARACTERS[1] else start + PASSAGE_CHARACTERS[1]
        yield text[start:end].strip()
        start = end


def _told(facts: Sequence[Fact], passage: str, rng: random.Random) -> list[Message]:
    said = " ".join(fact.statement for fact in facts)
    return [
        {"role": "user", "content": f"{said} {rng.choice(INTRODUCTIONS)}\n\n{passage}".strip()},
        {"role": "assistant", "content": rng.choice(REPLIES)},
    ]


def _asked(fact: Fact) -> list[Message]:
    return [
        {"role": "user", "content": fact.question},
        {"role": "assistant", "content": f"{fact.answer}{fact.value}."},
    ]


def _located(tokenizer: Tokenizer, text: str, facts: Sequence[Fact]) -> Context:
    """A chat with the places where its facts are told and answered; without those that a template writes otherwise."""
    encoding = tokenizer.encode(text, add_special_tokens=False)
    recalled = []
    for fact in facts:
        statement, answer = text.find(fact.statement), text.rfind(fact.answer + fact.value)
        if statement < 0 or answer < 0:
            continue
        told = _tokens(encoding.offsets, statement + fact.statement.index(fact.value), len(fact.value))
        answered = _tokens(encoding.offsets, answer + len(fact.answer), len(fact.value))
        recalled.append(Recalled(told, answered))
    return Context(torch.tensor(encoding.ids), tuple(recalled))


def _tokens(offsets: Sequence[tuple[int, int]], start: int, num: int) -> tuple[int, int]:
    """Range of the tokens that hold any of `num` characters."""
    inside = [index for index, (low, high) in enumerate(offsets) if low < start + num and high > start]
    return inside[0], inside[-1] + 1
