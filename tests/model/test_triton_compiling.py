"""The kernels compile for an H100 and fit it, which the interpreter cannot show; nothing here needs a GPU."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="needs the extra `triton`; run by `make test` where it is installed")

SHARED_MEMORY_BYTES = 227 * 1024
"""What one program may use on compute capability 9.0."""
SHAPES = ("SmolLM2-135M, hybrid", "LLaMA-2-7B, pure", "Pythia-2.8B, released")


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
def test_every_launch_of_a_step_compiles_and_fits(shape: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.model.triton_compiling", shape]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=110, check=False)
    assert run.returncode == 0, run.stderr
    launches = [json.loads(line) for line in run.stdout.splitlines()]
    assert {"decode_kernel", "queries_kernel", "entering_kernel", "states_kernel", "outputs_kernel"} <= {
        launch["kernel"] for launch in launches
    }
    for launch in launches:
        assert launch["shared_bytes"] <= SHARED_MEMORY_BYTES, launch
    spilled = [launch["stack_bytes"] for launch in launches if launch["kernel"] == "decode_kernel"]
    assert len(spilled) == 2, "states in fp32 and in bf16"
    assert max(spilled) <= 16
