"""Tokenizers of models that think: byte by byte, with the marks as text or as special tokens."""

from pathlib import Path

from dijiang_model.text.folder import TokenizerFiles
from server.text.tokenizer import Tokenizer
from tests.byte_tokenizer import CHAT_TEMPLATE

OPEN_ID, CLOSE_ID = 256, 259
"""Of the marks, where they are special tokens."""
SPECIAL = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
OPENING_TEMPLATE = CHAT_TEMPLATE.replace(
    "assistant\n{% endif %}",
    "assistant\n<think>\n{% if enable_thinking is defined and not enable_thinking %}</think>\n\n{% endif %}{% endif %}",
)
"""Opens every thought itself, and closes it at once if none is wanted."""


def marked_json(folder: Path) -> str:
    """`tokenizer.json` with the marks in the place of two special tokens."""
    text = (folder / "tokenizer.json").read_text()
    return text.replace("<|endoftext|>", "<think>").replace("<|unused|>", "</think>")


def thinking_tokenizer(folder: Path, *, template: str = CHAT_TEMPLATE, marked: bool = False) -> Tokenizer:
    """From the folder of a byte tokenizer."""
    text = marked_json(folder) if marked else (folder / "tokenizer.json").read_text()
    return Tokenizer(TokenizerFiles(text, SPECIAL, template))
