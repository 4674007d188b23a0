"""The GPU benchmarks run from end to end on a tiny model, so that the first session with a GPU only has to run them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.costs import weight_bytes
from benchmarks.gpu import decode as gpu_decode
from benchmarks.gpu import prefill as gpu_prefill
from benchmarks.gpu import sampling as gpu_sampling
from benchmarks.gpu.command import attempt
from benchmarks.gpu.models import WEIGHTS, config_of, random_model, softmax_twin
from benchmarks.transformers_twin import decode_step
from dijiang_model.ops.training.attention import SoftmaxAttention
from dijiang_model.quantization.modules import quantized_weights
from dijiang_model.segments import run_segments
from tests.waiting import PATIENCE_S


@pytest.mark.slow
def test_decode_tells_every_contender_and_its_floor(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gpu_decode.main(["--tiny", "--attention", "pure", "--out", str(tmp_path)])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    names = {line["name"] for line in result["lines"]}
    assert names == {"ours pure, recorded", "ours pure, fresh", "HF dynamic", "HF static"}
    ours = [line for line in result["lines"] if line["name"].startswith("ours")]
    assert all(line["floor_ms"] > 0 and line["of_floor"] == line["floor_ms"] / line["ms"] for line in ours)
    assert [(one["shape"], one["context"], one["times_hf"] > 0) for one in result["best"]] == [("tiny", 8, True)]
    assert json.loads((tmp_path / "gpu-decode-cpu-tiny.json").read_text()) == result


@pytest.mark.slow
def test_states_in_fewer_bits_are_contenders_and_move_fewer_bytes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gpu_decode.main(["--tiny", "--attention", "hybrid", "--states", "float32,int8", "--no-hf", "--out", str(tmp_path)])
    lines = json.loads(capsys.readouterr().out.splitlines()[-1])["lines"]
    sizes = {line["name"]: line["conversation_mib"] for line in lines if line["num_rows"] == 2}
    assert set(sizes) == {f"ours {kind}, {way}" for kind in ("hybrid", "hybrid/int8") for way in ("recorded", "fresh")}
    assert 2.2 * sizes["ours hybrid/int8, fresh"] < sizes["ours hybrid, fresh"]


@pytest.mark.slow
def test_rounded_weights_are_contenders_with_a_floor_of_their_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kinds = ["plain", "int8", "int4", "int4-minimums"]
    arguments = ["--tiny", "--attention", "pure", "--no-hf", "--out", str(tmp_path), "--weights", ",".join(kinds)]
    gpu_decode.main(arguments)
    lines = json.loads(capsys.readouterr().out.splitlines()[-1])["lines"]
    assert [line["failure"] for line in lines] == [None] * len(lines)
    names = [gpu_decode.our_name("pure", kind, "float32") for kind in kinds]
    assert {line["name"] for line in lines} == {f"{name}, {way}" for name in names for way in ("recorded", "fresh")}


@pytest.mark.parametrize("kind", [kind for kind in WEIGHTS if kind != "plain"])
def test_drawn_codes_are_a_model_and_spread_like_other_weights(kind: str) -> None:
    torch.manual_seed(0)
    models = [
        random_model(config_of("tiny", "pure"), device="cpu", dtype=torch.float32, quantization=WEIGHTS[one])
        for one in ("plain", kind)
    ]
    assert 2 * weight_bytes(models[1]) < weight_bytes(models[0])
    for _, weight in quantized_weights(models[1]):
        assert weight.problems() == []
        assert 0.018 < weight.dequantized().std() < 0.022
        assert weight.dequantized().mean().abs() < 0.005, "codes from -8 to 7 have half a step below 0"


def test_hf_has_no_rounded_weights_to_measure(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu_decode.main(["--tiny", "--weights", "int8"])
    assert "which must be plain" in capsys.readouterr().err


@pytest.mark.slow
def test_prefill_tells_every_contender(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gpu_prefill.main(["--tiny", "--attention", "pure", "--out", str(tmp_path)])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    names = [line["name"] for line in result["lines"] if not line["name"].startswith("kernels")]
    assert names == ["ours pure", "ours pure, ragged", "HF sdpa"]
    assert all(line["ms"] > 0 for line in result["lines"])


def test_sampling_tells_every_kind_of_filter(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # torch alone
    gpu_sampling.main(["--tiny", "--out", str(tmp_path)])
    lines = json.loads(capsys.readouterr().out.splitlines()[-1])["lines"]
    assert [line["failure"] for line in lines] == [None] * len(lines)
    assert {line["filters"] for line in lines} == set(gpu_sampling.FILTERS)
    assert {line["name"] for line in lines} == {"torch"}
    assert (tmp_path / "gpu-sampling-cpu-sampling.json").is_file()


@pytest.mark.parametrize("num_tokens", [1, 5, 9, 2048])
def test_ragged_prompts_have_as_many_tokens_as_one(num_tokens: int) -> None:
    lengths = gpu_prefill.ragged(num_tokens)
    assert (sum(lengths), min(lengths) >= 1) == (num_tokens, True)


@pytest.mark.parametrize("shape", ["tiny", "tiny-neox"])
def test_the_rival_is_the_softmax_model_of_the_same_weights(shape: str) -> None:
    model = random_model(config_of(shape, "pure"), device="cpu", dtype=torch.float32)
    twin = softmax_twin(model)
    token_ids = torch.randint(0, 300, (1, 20), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        ours = model.logits(run_segments(model, token_ids, SoftmaxAttention()))
        torch.testing.assert_close(ours, twin(token_ids).logits[0], rtol=1e-4, atol=1e-5)
        for kind in ("dynamic", "static"):
            assert decode_step(twin, num_rows=2, num_tokens=8, kind=kind, num_steps=4)().shape == (2,)


def refuse(model: object) -> None:
    raise ImportError("cannot import name 'GPTNeoXForCausalLM'")


def test_ours_are_measured_although_the_rival_cannot_be_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_decode, "softmax_twin", refuse)
    gpu_decode.main(["--tiny", "--attention", "pure,hybrid", "--no-plots", "--out", str(tmp_path)])
    lines = json.loads(capsys.readouterr().out.splitlines()[-1])["lines"]
    failures = {line["name"]: line["failure"] for line in lines}
    assert failures.pop("HF") == "ImportError: cannot import name 'GPTNeoXForCausalLM'"
    ours = {f"ours {kind}, {way}" for kind in ("pure", "hybrid") for way in ("recorded", "fresh")}
    assert failures == dict.fromkeys(ours)
    monkeypatch.setattr(gpu_prefill, "softmax_twin", refuse)
    monkeypatch.setattr(gpu_prefill, "alone", lambda *_: None)
    gpu_prefill.main(["--tiny", "--attention", "pure", "--no-plots", "--out", str(tmp_path)])
    lines = json.loads(capsys.readouterr().out.splitlines()[-1])["lines"]
    assert [(line["name"], line["failure"] is None) for line in lines] == [
        ("ours pure", True),
        ("ours pure, ragged", True),
        ("HF sdpa", False),
    ]


def test_ours_need_no_transformers() -> None:
    code = "import sys; sys.modules['transformers'] = None; import benchmarks.gpu.decode, benchmarks.gpu.prefill, "
    code += "benchmarks.gpu.sampling"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=PATIENCE_S)


def test_the_first_failure_is_told_where_the_device_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cleaning up fails too after a fault that a kernel left behind."""

    def fail() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def work() -> None:
        raise ValueError("what went wrong first")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", fail)
    monkeypatch.setattr(torch.cuda, "empty_cache", fail)
    assert attempt(work) == (None, "ValueError: what went wrong first")
    assert attempt(lambda: 1) == (None, "RuntimeError: CUDA error: an illegal memory access was encountered")
