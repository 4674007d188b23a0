"""The kernels compile for GPUs and fit them, which the interpreter cannot show; nothing here needs a GPU."""

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from tests.waiting import PATIENCE_S

pytest.importorskip("triton", reason="needs the extra `triton`; run by `make test-triton`")

SHARED_MEMORY_BYTES = {80: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""What one program may use; of the devices that run code for 8.0 the smallest (8.6, 8.9) have 99 KiB."""
STACK_BYTES = {"anchored_decode_kernel": 96, "losers_kernel": 96, "anchored_outputs_kernel": 192}
"""Of the angles in fp64, and of what for 10.0 goes over the registers; of kernels of places, others have none."""
REGISTERS = {"evictions_kernel": 192, "sources_kernel": 64, "candidates_kernel": 64, "places_kernel": 64}
BARE = "SmolLM2-135M, values of 4 bits, no linear part"
SHAPES = ("SmolLM2-135M, hybrid", "LLaMA-2-7B, pure", "Pythia-2.8B, released")


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_launch_of_a_step_compiles_and_fits(shape: str) -> None:
    lines = compiled(shape)
    assert [line for line in lines if "variants" in line] == [], "a kernel is compiled anew while the model is served"
    for capability, most in SHARED_MEMORY_BYTES.items():
        launches = [line for line in lines if line["capability"] == capability]
        expected = {
            "decode_kernel",
            "queries_kernel",
            "entering_kernel",
            "states_kernel",
            "outputs_kernel",
            "draw_kernel",
        }
        assert expected <= {launch["kernel"] for launch in launches}
        for launch in launches:
            assert launch["shared_bytes"] <= most, launch
            if "hybrid" not in shape or launch["kernel"] != "outputs_kernel":
                assert launch["stack_bytes"] <= 96, launch
            if launch["kernel"] == "draw_kernel":
                assert launch["registers"] * 32 * launch["warps"] <= 2**16, launch
                assert launch["stack_bytes"] <= 32, launch
                assert launch["shared_bytes"] <= 1024, launch
        assert sum(launch["kernel"] == "decode_kernel" for launch in launches) == 3 + ("hybrid" in shape)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("shape", ["SmolLM2-135M, anchors", "SmolLM2-135M, the default model", BARE])
def test_the_kernels_of_places_compile_and_fit(shape: str) -> None:
    lines = compiled(shape)
    assert [line for line in lines if "variants" in line] == [], "a kernel is compiled anew while the model is served"
    wanted = {"candidates_kernel", "evictions_kernel", "sources_kernel", "anchored_outputs_kernel", "places_kernel"}
    if shape != BARE:
        wanted |= {"anchored_decode_kernel", "losers_kernel", "entering_features_kernel", "states_kernel"}
    for capability in SHARED_MEMORY_BYTES:
        assert {line["kernel"] for line in lines if line["capability"] == capability} >= wanted
    for line in lines:
        kernel = line["kernel"]
        assert line["shared_bytes"] <= SHARED_MEMORY_BYTES[line["capability"]], line
        assert line["stack_bytes"] <= STACK_BYTES.get(kernel, 0), line
        assert line["registers"] <= REGISTERS.get(kernel, 255), line
        if kernel in ("anchored_decode_kernel", "evictions_kernel"):
            assert line["fp64_sums"] >= 2, f"priorities are rounded as nowhere else: {line}"


def compiled(shape: str) -> list[dict[str, Any]]:
    """What `triton_compiling` prints of a shape."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.dijiang_model.ops.triton.triton_compiling", shape]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=10 * PATIENCE_S, check=False)
    assert run.returncode == 0, run.stderr
    return [json.loads(line) for line in run.stdout.splitlines()]
