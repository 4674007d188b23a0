"""Contexts that the teacher reads: running text, and chats that state facts and ask for them later."""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer
from torch import Tensor

from dijiang_model.conversion.calibration.facts import Fact, FactKind, draw_facts
from dijiang_model.errors import ConversionError

Message = Mapping[str, str]
"""`role` and `content`."""
RenderChat = Callable[[Sequence[Message]], str]
"""A conversation as the model's template writes it."""
CHARACTERS_PER_TURN = 900
FACTS_PER_TURN = 2
INTRODUCTIONS = ("Here is a passage that I am reading:", "Now read this:", "The next part:", "Have a look at this text:")
REPLIES = ("I have read it.", "Thank you, I have read the passage.", "Noted.", "All right, I will keep that in mind.")


@dataclass(frozen=True, slots=True)
class Recalled:
    """A fact's value where it is told and where it is answered, as ranges of tokens [start, stop)."""

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


def calibration_contexts(
    tokenizer: Tokenizer,
    text: str,
    *,
    render: RenderChat,
    kinds: Sequence[FactKind],
    num: int,
    length: int,
    seed: int,
) -> list[Context]:
    """`num` contexts of `length` tokens: running text and chats in turn, from parts of the text that do not overlap.

    Raises:
        ConversionError: the text is too short.
    """
    rng = random.Random(seed)
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    if len(ids) < num * length:
        raise ConversionError(
            f"the calibration text has {len(ids):,} tokens, {num} contexts of {length:,} take {num * length:,}"
        )
    stride = len(ids) // num
    contexts = []
    for index in range(num):
        part = ids[index * stride : (index + 1) * stride]
        if index % 2 == 0:
            contexts.append(Context(torch.tensor(part[:length])))
        else:
            passages = _passages(tokenizer.decode(part), rng)
            contexts.append(fact_chat(tokenizer, passages, render=render, kinds=kinds, length=length, rng=rng))
    return contexts


def fact_chat(
    tokenizer: Tokenizer,
    passages: Iterator[str],
    *,
    render: RenderChat,
    kinds: Sequence[FactKind],
    length: int,
    rng: random.Random,
) -> Context:
    """A chat of at most `length` tokens: passages to read with facts before them, and questions at the end."""
    facts = draw_facts(kinds, 2 * len(kinds), rng)
    turns, told = [], 0
    num_tokens = _count(tokenizer, render([message for fact in facts for message in _asked(fact)]))
    while True:
        now = facts[told : told + FACTS_PER_TURN]
        turn = _told(now, next(passages), rng)
        num_tokens += _count(tokenizer, render(turn))
        if num_tokens > length:
            break
        turns += turn
        told += len(now)
    asked = rng.sample(facts[:told], told)
    messages = [*turns, *(message for fact in asked for message in _asked(fact))]
    return _located(tokenizer, render(messages), asked) if messages else Context(torch.empty(0, dtype=torch.int64))


def _count(tokenizer: Tokenizer, text: str) -> int:
    return len(tokenizer.encode(text, add_special_tokens=False).ids)


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


def _passages(text: str, rng: random.Random) -> Iterator[str]:
    """Pieces of about `CHARACTERS_PER_TURN` characters, cut at sentences, over and over."""
    while True:
        start = 0
        while start < len(text) - CHARACTERS_PER_TURN:
            size = rng.randint(CHARACTERS_PER_TURN // 2, CHARACTERS_PER_TURN * 3 // 2)
            end = text.find(". ", start + size)
            end = len(text) if end < 0 else end + 1
            yield text[start:end].strip()
            start = end


def _located(tokenizer: Tokenizer, text: str, facts: Sequence[Fact]) -> Context:
    """A chat with the places where its facts are told and answered."""
    encoding = tokenizer.encode(text, add_special_tokens=False)
    recalled = []
    for fact in facts:
        statement, answer = text.index(fact.statement), text.rindex(fact.answer + fact.value)
        told = _tokens(encoding.offsets, statement + fact.statement.index(fact.value), len(fact.value))
        answered = _tokens(encoding.offsets, answer + len(fact.answer), len(fact.value))
        recalled.append(Recalled(told, answered))
    return Context(torch.tensor(encoding.ids), tuple(recalled))


def _tokens(offsets: Sequence[tuple[int, int]], start: int, num: int) -> tuple[int, int]:
    """Range of the tokens that hold any of `num` characters."""
    inside = [index for index, (low, high) in enumerate(offsets) if low < start + num and high > start]
    return inside[0], inside[-1] + 1
