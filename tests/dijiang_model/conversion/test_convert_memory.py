"""Converting takes memory for a tensor, not for a model: `benchmarks/experiments/convert_7b.py` in small."""

import sys
from pathlib import Path

import pytest

from benchmarks.experiments.convert_7b import LLAMA_2_7B, write_source
from dijiang_model.checkpoints.checkpoint import load_config
from dijiang_model.conversion import convert as convert_module
from dijiang_model.conversion.convert import convert

DOCUMENT = LLAMA_2_7B | {
    "hidden_size": 512,
    "intermediate_size": 1376,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "num_hidden_layers": 12,
    "vocab_size": 4000,
}


def own_bytes() -> int:
    """This process's anonymous memory; pages of mapped files do not count."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * int(lines["RssAnon"].split()[0])


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_a_sharded_model_is_never_in_memory_as_a_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    size = write_source(tmp_path / "source", DOCUMENT, form, shard_bytes=30_000_000)
    assert len(list((tmp_path / "source").glob(f"*.{form}"))) == 3
    convert(tmp_path / "source", tmp_path / "warm-up", dtype="bfloat16")
    seen: list[int] = []
    real = convert_module.has_valid

    def watch(*arguments: object) -> bool:
        seen.append(own_bytes())
        return real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(convert_module, "has_valid", watch)
    before = own_bytes()
    convert(tmp_path / "source", tmp_path / "out", dtype="bfloat16")
    assert len(seen) > 100
    assert size > 80_000_000
    assert max(seen) - before < size / 5
    assert load_config(tmp_path / "out").num_layers == 12
