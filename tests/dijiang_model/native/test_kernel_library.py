"""Compiled kernels that do not fit their sources are not used, and that is said with what mends it."""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from dijiang_model.native import library
from dijiang_model.native.digest import source_digest
from dijiang_model.serving.weights import why_unsupported
from tests.tiny_models import tiny_model

pytestmark = pytest.mark.skipif(library.load_library() is None, reason="the kernels were not built")


@pytest.fixture
def searched_again() -> Iterator[None]:
    """What is found in the test is forgotten after it."""
    library.load_library.cache_clear()
    yield
    library.load_library.cache_clear()


def test_kernels_that_are_used_have_no_fault() -> None:
    assert library.why_missing() is None
    assert why_unsupported(tiny_model()) is None


@pytest.mark.usefixtures("searched_again")
def test_kernels_of_other_sources_are_told_with_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    sources = shutil.copytree(library.SOURCES, tmp_path / "src")
    (sources / "step.cpp").write_text("// changed")
    monkeypatch.setattr(library, "SOURCES", sources)
    assert library.load_library() is None
    why = why_unsupported(tiny_model())
    assert why is not None
    assert "other sources" in why
    assert "make kernels" in why
    assert "make kernels" in caplog.text


@pytest.mark.usefixtures("searched_again")
def test_kernels_that_were_not_built_are_told_with_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "_path", lambda variant: tmp_path / variant)
    why = library.why_missing()
    assert why is not None
    assert "not compiled" in why
    assert "make kernels" in why


@pytest.mark.parametrize("variant", library.VARIANTS)
def test_libraries_of_one_process_share_no_objects(variant: str) -> None:
    """Static objects of inline functions have one address for all libraries that name them alike."""
    path = library._path(variant)
    if not path.exists():
        pytest.skip(f"no {variant} kernels on this kind of CPU")
    names = set(re.findall(rb"_ZZN(\d+dijiang\w*?)4Pool8instance", path.read_bytes()))
    own = f"dijiang_{variant}_{source_digest(library.SOURCES)[:12]}"
    assert names == {f"{len(own)}{own}".encode()}
