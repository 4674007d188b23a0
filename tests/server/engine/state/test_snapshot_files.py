"""Saved states as files: read back as they were, readable by others, and refused for any fault."""

import json
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from server.engine.state.snapshot_files import Snapshot, SnapshotError, parse_snapshot, read_snapshot, write_snapshot
from server.engine.types.state import StateLayout, StateTensorLayout

LAYOUT = StateLayout(
    fingerprint="dj-one",
    vocab_size=50,
    bytes_per_slot=192,
    tensors=(
        StateTensorLayout("layers.0.linear_state", (3, 2), "F32", 0),
        StateTensorLayout("layers.0.near_keys", (5,), "BF16", 64),
        StateTensorLayout("layers.1.linear_state", (2,), "F64", 128),
    ),
)


def snapshot() -> Snapshot:
    row = np.zeros(192, np.uint8)
    row[:24] = np.arange(6, dtype="<f4").view(np.uint8)
    row[64:74] = np.array([0x3F80, 0, 0x7F7F, 0xFF7F, 1], "<u2").view(np.uint8)  # 1, 0, the largest, -largest, tiny
    row[128:144] = np.array([-1.5, 1e300]).view(np.uint8)
    return Snapshot(row=row, position=12, pending=(7,), last_token=7, note='{"turn":"open"}')


@pytest.fixture
def content(tmp_path: Path) -> bytes:
    path = tmp_path / "a.safetensors"
    write_snapshot(path, snapshot(), LAYOUT)
    return path.read_bytes()


def test_a_state_comes_back_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    num_bytes = write_snapshot(path, snapshot(), LAYOUT)
    assert path.stat().st_size == num_bytes
    back = read_snapshot(path, LAYOUT)
    assert np.array_equal(back.row, snapshot().row)
    assert (back.position, back.pending, back.last_token, back.note) == (12, (7,), 7, '{"turn":"open"}')


def test_other_programs_read_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_snapshot(path, snapshot(), LAYOUT)
    with safe_open(path, framework="pt") as file:
        assert file.get_tensor("layers.0.linear_state").tolist() == [[0, 1], [2, 3], [4, 5]]
        assert file.metadata()["position"] == "12"
        assert {*file.keys()} == {tensor.name for tensor in LAYOUT.tensors}


def test_nothing_is_left_beside_a_written_file(tmp_path: Path) -> None:
    write_snapshot(tmp_path / "a.safetensors", snapshot(), LAYOUT)
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


@pytest.mark.parametrize(
    ("begin", "value"), [(4, np.float32("nan")), (20, np.float32("inf")), (136, np.float64("-inf"))]
)
def test_a_state_that_is_not_finite_is_neither_written_nor_left_behind(
    tmp_path: Path, begin: int, value: np.floating
) -> None:
    broken = snapshot()
    broken.row[begin : begin + value.nbytes] = np.frombuffer(value.tobytes(), np.uint8)
    with pytest.raises(SnapshotError, match="not finite"):
        write_snapshot(tmp_path / "a.safetensors", broken, LAYOUT)
    assert [*tmp_path.iterdir()] == []


def test_infinity_in_bf16_is_seen(tmp_path: Path) -> None:
    broken = snapshot()
    broken.row[64:66] = np.array([0x7F80], "<u2").view(np.uint8)
    with pytest.raises(SnapshotError, match="near_keys holds NaN or infinity"):
        write_snapshot(tmp_path / "a.safetensors", broken, LAYOUT)


@settings(deadline=None)
@given(st.data())
def test_any_changed_byte_is_refused(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    path = tmp_path_factory.mktemp("changed") / "a.safetensors"
    write_snapshot(path, snapshot(), LAYOUT)
    content = bytearray(path.read_bytes())
    where = data.draw(st.integers(0, len(content) - 1))
    content[where] ^= data.draw(st.integers(1, 255))
    header_length = struct.unpack_from("<Q", content)[0]
    try:
        back = parse_snapshot(bytes(content), LAYOUT)
    except SnapshotError:
        return
    # Only blanks of the header's padding may change into other blanks.
    assert where < 8 + header_length
    assert np.array_equal(back.row, snapshot().row)
    assert (back.position, back.pending, back.note) == (12, (7,), '{"turn":"open"}')


@pytest.mark.parametrize("length", [0, 7, 8, 100, -1])
def test_a_file_that_was_cut_off_is_refused(content: bytes, length: int) -> None:
    with pytest.raises(SnapshotError):
        parse_snapshot(content[:length], LAYOUT)


def test_more_bytes_than_the_state_are_refused(content: bytes) -> None:
    with pytest.raises(SnapshotError, match="bytes of tensors"):
        parse_snapshot(content + b"\0", LAYOUT)


def test_a_state_of_another_model_is_refused_by_name(content: bytes) -> None:
    with pytest.raises(SnapshotError, match="another model") as caught:
        parse_snapshot(content, replace(LAYOUT, fingerprint="dj-other"))
    assert caught.value.code == "state_of_another_model"


def test_other_tensors_under_the_right_fingerprint_are_refused(content: bytes) -> None:
    renamed = replace(LAYOUT, tensors=(replace(LAYOUT.tensors[0], name="other"), *LAYOUT.tensors[1:]))
    with pytest.raises(SnapshotError, match=r"layers\.0\.linear_state, other"):
        parse_snapshot(content, renamed)
    reshaped = replace(LAYOUT, tensors=(replace(LAYOUT.tensors[0], shape=(2, 3)), *LAYOUT.tensors[1:]))
    with pytest.raises(SnapshotError, match=r"layers\.0\.linear_state: the state holds"):
        parse_snapshot(content, reshaped)


def test_a_token_outside_of_the_vocabulary_is_refused(content: bytes) -> None:
    with pytest.raises(SnapshotError, match="outside of the vocabulary of 5 tokens"):
        parse_snapshot(content, replace(LAYOUT, vocab_size=5))


@pytest.mark.parametrize(
    "header",
    [b"[]", b"{}", b"null", b"[" * 100_000, b'{"__metadata__": 3}', b'{"__metadata__":{"format":"pt"}}', b"\xff"],
)
def test_headers_that_are_no_states_are_refused(header: bytes) -> None:
    with pytest.raises(SnapshotError):
        parse_snapshot(struct.pack("<Q", len(header)) + header, LAYOUT)


def test_a_header_that_claims_to_be_huge_is_refused() -> None:
    with pytest.raises(SnapshotError, match="header does not fit"):
        parse_snapshot(struct.pack("<Q", 2**63) + b"{}", LAYOUT)


@pytest.mark.parametrize(
    ("name", "value"),
    [("position", "0"), ("position", "-1"), ("position", "9" * 19), ("pending", "1," * 20 + "1"), ("version", "2"),
     ("last_token", "x"), ("note", "n" * 1025), ("extra", "1"), ("position", 3)],
)  # fmt: skip
def test_metadata_out_of_range_is_refused_even_with_a_right_checksum(
    content: bytes, name: str, value: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    length = struct.unpack_from("<Q", content)[0]
    header = json.loads(content[8 : 8 + length])
    header["__metadata__"] |= {name: value, "checksum": "fits"}
    monkeypatch.setattr("server.engine.state.snapshot_files._checksum", lambda *_: "fits")
    text = json.dumps(header).encode()
    with pytest.raises(SnapshotError):
        parse_snapshot(struct.pack("<Q", len(text)) + text + content[8 + length :], LAYOUT)


def test_a_missing_file_says_so(tmp_path: Path) -> None:
    with pytest.raises(SnapshotError, match="not there any more") as caught:
        read_snapshot(tmp_path / "a.safetensors", LAYOUT)
    assert caught.value.code == "state_not_found"
