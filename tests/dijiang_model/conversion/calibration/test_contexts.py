"""What is read for calibration: facts stand where they are said to stand, and nothing is longer than the range."""

import random
from itertools import chain
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from dijiang_model.conversion.calibration.contexts import (
    Context,
    cut_passages,
    fact_chat,
    random_contexts,
    text_and_chats,
)
from dijiang_model.conversion.calibration.facts import KINDS, draw_facts
from dijiang_model.conversion.calibration.reading import TEXT, calibration_contexts
from dijiang_model.conversion.training.chat_prompt import RenderChat, load_chat_template, plain_chat
from dijiang_model.errors import ConversionError
from tests.byte_tokenizer import write_byte_tokenizer
from tests.tiny_models import llama_config

PASSAGES = "It rained all day. Nobody went out. The cat slept on the stove. " * 60


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_byte_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def chat(tokenizer: Tokenizer, render: RenderChat, *, length: int = 4000, seed: int = 0) -> Context | None:
    rng = random.Random(seed)
    return fact_chat(tokenizer, cut_passages(PASSAGES, rng), render=render, kinds=KINDS, length=length, rng=rng)


def test_facts_come_from_the_seed_and_no_value_twice() -> None:
    facts = [draw_facts(KINDS, 12, random.Random(seed)) for seed in (0, 0, 1)]
    assert facts[0] == facts[1] != facts[2]
    assert all(fact.value in fact.statement and fact.value not in fact.question for fact in chain(*facts))
    assert len({fact.value for fact in facts[0]}) == 12


@pytest.mark.parametrize("form", ["template", "plain"])
def test_a_chat_tells_facts_and_repeats_them_where_it_says(form: str, folder: Path, tokenizer: Tokenizer) -> None:
    render = plain_chat if form == "plain" else load_chat_template(folder)
    assert render is not None
    found = chat(tokenizer, render)
    assert found is not None
    assert len(found.recalled) >= 2
    assert 0 < len(found.token_ids) <= 4000
    for fact in found.recalled:
        told, answered = (
            tokenizer.decode(found.token_ids[slice(*span)].tolist()) for span in (fact.told, fact.answered)
        )
        assert told == answered != ""
        assert fact.told[1] < fact.answered[0]


def test_a_chat_that_does_not_fit_is_none(tokenizer: Tokenizer) -> None:
    assert chat(tokenizer, plain_chat, length=100) is None


def test_what_a_template_writes_otherwise_is_no_fact(tokenizer: Tokenizer) -> None:
    found = chat(tokenizer, lambda messages: plain_chat(messages).upper())
    assert found is not None
    assert found.recalled == ()


def test_text_and_chats_take_turns_and_short_ranges_have_text_alone(tokenizer: Tokenizer) -> None:
    long, short = (
        text_and_chats(tokenizer, PASSAGES * 5, render=plain_chat, kinds=KINDS, num=4, length=length, seed=0)
        for length in (3000, 128)
    )
    assert [bool(context.recalled) for context in long] == [False, True, False, True]
    assert [len(context.token_ids) for context in short] == [128] * 4
    assert not any(context.recalled for context in short)


def test_too_little_text_is_refused_with_numbers(tokenizer: Tokenizer) -> None:
    with pytest.raises(ConversionError, match="the text has 4 tokens, but 2 contexts of 100 take 200"):
        text_and_chats(tokenizer, "abcd", render=plain_chat, kinds=KINDS, num=2, length=100, seed=0)


def test_the_text_that_ships_is_enough_and_small(folder: Path) -> None:
    config = llama_config()
    contexts = calibration_contexts(config, folder, [])
    assert len(contexts) == 16
    assert all(len(context.token_ids) <= config.max_position_embeddings for context in contexts)
    assert TEXT.stat().st_size < 300_000


def test_a_model_without_a_tokenizer_reads_random_tokens() -> None:
    contexts = calibration_contexts(llama_config(), None, [])
    assert torch.equal(contexts[0].token_ids, random_contexts(vocab_size=260, num=1, length=128, seed=0)[0].token_ids)
    assert not any(context.recalled for context in contexts)
