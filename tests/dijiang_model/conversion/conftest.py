"""A teacher to convert."""

from pathlib import Path

import pytest

from tests.dijiang_model.teachers import llama_teacher, save_teacher


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return save_teacher(llama_teacher(), tmp_path / "hf")
