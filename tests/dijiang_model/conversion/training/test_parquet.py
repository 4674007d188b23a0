"""Parquet files as text to train on: texts and conversations, row by row."""

import sys
from pathlib import Path

import pytest

from dijiang_model.conversion.training.documents import read_text, text_files
from dijiang_model.errors import ConversionError


def test_rows_are_texts_or_conversations(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    texts, chats = tmp_path / "a.parquet", tmp_path / "b.PARQUET"
    parquet.write_table(pyarrow.table({"text": ["One.", "Zwei, drei."], "label": [1, 2]}), texts)
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
    parquet.write_table(pyarrow.table({"messages": [turns, turns[:1]]}), chats)
    assert text_files([tmp_path]) == [texts, chats]
    assert read_text(texts) == "One.\n\nZwei, drei."
    rendered = read_text(chats, render=lambda messages: "/".join(str(message["content"]) for message in messages))
    assert rendered == "Hi/Hello.\n\nHi"
    parquet.write_table(pyarrow.table({"label": [1]}), texts)
    with pytest.raises(ConversionError, match=r"a\.parquet, row 1: neither a text, nor messages"):
        read_text(texts)


def test_a_damaged_file_is_a_clear_error(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    (tmp_path / "a.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(ConversionError, match="cannot be read as Parquet"):
        read_text(tmp_path / "a.parquet")


def test_without_pyarrow_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(ConversionError, match=r"needs pyarrow: pip install 'dijiang\[parquet\]'"):
        read_text(tmp_path / "a.parquet")
