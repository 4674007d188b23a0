"""Data as people have it: texts and chats in JSON, chats in the form of the model's own template."""

import json
from pathlib import Path

import pytest

from dijiang_model.conversion.training.chat_prompt import load_chat_template, plain_chat
from dijiang_model.conversion.training.documents import read_text, text_files
from dijiang_model.conversion.training.setup import prepare_run
from dijiang_model.conversion.training.text_windows import load_tokenizer
from dijiang_model.conversion.training.train import train
from dijiang_model.errors import ConversionError
from tests.dijiang_model.conversion.training.test_train import STUDENT, options
from tests.tiny_models import HYBRID, llama_config, write_tiny_model

CHAT = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}]
RENDERED = "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\nBecause.<|im_end|>\n"
FORMS: dict[str, object] = {
    "messages": {"messages": CHAT},
    "conversations": {"conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "Because."}]},
    "content in parts": {
        "messages": [{"role": "user", "content": [{"type": "text", "text": "Why?"}]}, CHAT[1]],
        "source": "somewhere",
    },
}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_tiny_model(tmp_path / "model", llama_config(HYBRID, HYBRID))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_chats_are_rendered_by_the_models_template(model: Path, tmp_path: Path, form: str, suffix: str) -> None:
    documents = [FORMS[form], {"text": "A text."}]
    file = tmp_path / f"data{suffix}"
    lines = "\n".join(map(json.dumps, documents))
    file.write_text(f"{lines}\n\n" if suffix == ".jsonl" else json.dumps(documents))
    render = load_chat_template(model)
    assert render is not None
    assert read_text(file, render=render) == f"{RENDERED}\n\nA text."
    assert read_text(file) == f"{plain_chat(CHAT)}\n\nA text."
    ids = load_tokenizer(model).encode(read_text(file, render=render), add_special_tokens=False).ids
    assert ids.count(258) == 2, "the template's marks are special tokens"


def test_folders_give_their_json_lines_too(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.txt", "config.json", "c.bin"):
        (tmp_path / name).write_text("x")
    assert [file.name for file in text_files([tmp_path])] == ["a.jsonl", "b.txt"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"text": "a"}\n{"text": ', r"line 2, is not valid JSON"),
        ('{"text": "a"}\n{"title": "b"}', r"line 2: neither a text, nor messages, nor conversations"),
        ('["a"]', "line 1: neither a text"),
        ('{"messages": []}', "line 1: neither a text"),
        ('{"messages": [{"role": "user"}]}', "line 1: a message has no role, or no content that is text"),
        ('{"conversations": [{"from": "alien", "value": "a"}]}', "line 1: a message has no role"),
        ('{"messages": [{"role": "user", "content": [{"image_url": "x"}]}]}', "no content that is text"),
    ],
)
def test_lines_that_cannot_be_read_are_named_by_number(tmp_path: Path, content: str, words: str) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text(content)
    with pytest.raises(ConversionError, match=words):
        read_text(file)


def test_a_model_trains_on_chats(model: Path, tmp_path: Path) -> None:
    file = tmp_path / "chats.jsonl"
    file.write_text("".join(json.dumps({"messages": CHAT}) + "\n" for _ in range(12)))
    small = options(tokens=128, sequence_length=64)
    trainer = prepare_run(model, [str(file)], tmp_path / "run", small, STUDENT)
    assert train(trainer, tmp_path / "run")
    assert trainer.progress.step == 2
