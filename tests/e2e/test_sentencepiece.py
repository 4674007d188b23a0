"""A real SentencePiece vocabulary from the source folder to the client: conversion, serving, streaming by bytes."""

import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import sentencepiece

from dijiang_model.conversion.convert import convert
from tests.dijiang_model.teachers import llama_teacher
from tests.e2e.serving import Server, serving

VOCABULARY = Path(__file__).parents[1] / "fixtures" / "sentencepiece" / "tokenizer.model"
FIRST_BYTE, LAST_BYTE = 3, 258
"""Ids of the pieces <0x00> ... <0xFF>."""
TEXTS = (
    "Grüße 🙂 aus 北京!",
    "family 👩‍👩‍👧 and flag 🏴󠁧󠁢󠁳󠁣󠁴󠁿",
    "combining ñ̃ and e\u0301\u0323, ఠ_ఠ, नमस्ते",
    "    leading, two  and      six spaces,\n\ta tab, and 𝔉𝔯𝔞𝔨𝔱𝔲𝔯 ᚠᚢᚦ",
)
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message.role == 'assistant' %}{{ message.content + eos_token }}"
    "{% else %}[INST] {{ message.content }} [/INST]{% endif %}{% endfor %}"
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("sentencepiece")
    teacher = llama_teacher(vocab_size=32_000, bos_token_id=1, eos_token_id=2, hidden_size=32, num_hidden_layers=1)
    teacher.save_pretrained(folder / "hf")
    (folder / "hf" / "tokenizer.model").write_bytes(VOCABULARY.read_bytes())
    settings = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "hf" / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": CHAT_TEMPLATE}))
    assert convert(folder / "hf", folder / "out").has_tokenizer
    with serving(folder / "out") as running:
        yield running


@pytest.fixture(scope="module")
def pieces() -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(VOCABULARY))


def complete(server: Server, *, stream: bool, **options: object) -> tuple[str, list[str], list[int]]:
    """Text, its pieces as they came, and token ids of one completion."""
    answer = server.client.completions.create(
        model=server.model, stream=stream, extra_body={"return_token_ids": True, **options}, prompt="Say:"
    )
    chunks = list(answer) if stream else [answer]
    choices = [chunk.choices[0] for chunk in chunks if chunk.choices]
    ids = [token for choice in choices for token in (choice.model_extra or {}).get("token_ids") or ()]
    texts = [choice.text for choice in choices]
    return "".join(texts), texts, ids


@pytest.mark.parametrize("text", TEXTS)
def test_prompts_become_the_ids_of_sentencepiece_and_come_back(
    server: Server, pieces: sentencepiece.SentencePieceProcessor, text: str
) -> None:
    answer = httpx.post(f"{server.base_url}/tokenize", json={"model": server.model, "prompt": text}).json()
    assert answer["tokens"] == [1, *pieces.encode(text)]
    body = {"model": server.model, "tokens": pieces.encode(text)}
    assert httpx.post(f"{server.base_url}/detokenize", json=body).json()["prompt"] == text


@pytest.mark.parametrize("text", TEXTS)
def test_characters_that_span_tokens_are_streamed_whole(server: Server, text: str) -> None:
    options = {"structured_outputs": {"choice": [text]}, "max_tokens": 200, "temperature": 0}
    whole, _, ids = complete(server, stream=False, **options)
    streamed, parts, streamed_ids = complete(server, stream=True, **options)
    assert whole == streamed == text
    assert ids == streamed_ids
    assert any(FIRST_BYTE <= token <= LAST_BYTE for token in ids), "no character was spelled in bytes"
    assert all("\ufffd" not in part for part in parts)


@pytest.mark.parametrize("seed", range(4))
def test_bytes_that_are_no_text_stream_as_they_are_answered(server: Server, seed: int) -> None:
    """Random bytes between words: broken characters are replaced alike, however the answer is delivered."""
    options = {
        "allowed_token_ids": [*range(FIRST_BYTE, LAST_BYTE + 1), 28705, 15043, 3186],
        "max_tokens": 80,
        "temperature": 1.0,
        "seed": seed,
    }
    whole, _, ids = complete(server, stream=False, **options)
    streamed, parts, streamed_ids = complete(server, stream=True, **options)
    assert whole == streamed
    assert ids == streamed_ids
    assert "\ufffd" in whole
    assert len(parts) > 10


def test_chat_answers_stream_as_they_are_answered(server: Server) -> None:
    options = {
        "model": server.model,
        "messages": [{"role": "user", "content": "北京 🙂?"}],
        "max_tokens": 60,
        "seed": 5,
        "extra_body": {"allowed_token_ids": [*range(FIRST_BYTE + 0x80, LAST_BYTE + 1), *range(1000, 1100)]},
    }
    whole = server.client.chat.completions.create(**options).choices[0].message.content
    chunks = server.client.chat.completions.create(**options, stream=True)
    assert whole
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == whole
