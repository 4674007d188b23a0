"""The whole CUDA path without a GPU: no device mixing, no hidden wait, arguments that fit kernels, launches counted.

See `tests.fake_cuda`. What kernels compute is tested elsewhere: in Triton's interpreter, and on GPUs.
"""

import json
import shutil
import subprocess
import sys
from typing import Any

import pytest

from dijiang_model.families import FAMILIES as SERVED_FAMILIES

pytestmark = [
    pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler"),
    pytest.mark.timeout(600),  # the first test drives for all of them
]

FAMILIES = (
    "gemma3_text",
    "gpt_neox",
    "gpt_neox, released",
    "llama",
    "mistral",
    "olmo2",
    "opt",
    "opt, norms behind",
    "phi3",
    "qwen2",
    "qwen3",
)
ENGINES = (
    "SmolLM2, hybrid",
    "SmolLM2, pure, fp32",
    "SmolLM2, int8 weights and states",
    "SmolLM2, int4",
    "LLaMA-2-7B, int4 with minimums",
    "Pythia-2.8B, released",
    *(f"family {name}" for name in FAMILIES),
    "unrotated features",
    *("anchors", "anchors of 4 bits"),
    *("a constant feature", "a window alone"),
)
OWN_MODULES = ("gemma3_text", "gpt_neox", "llama", "olmo2", "opt", "opt, norms behind", "qwen3")
"""Families that are not LLaMA under another name, and can be trained."""
KEEP_STATES = ("llama", "gpt_neox, released")
"""Whose first rank keeps states as well."""
LAUNCHES = {
    "SmolLM2, the default model": 276,
    "SmolLM2, hybrid": 276,
    "SmolLM2, hybrid, int8": 276,
    "SmolLM2, hybrid, int4": 276,
    "LLaMA-2-7B, hybrid": 294,
    "LLaMA-2-7B, pure": 262,
    "Pythia-2.8B, released": 357,
}
"""Of a decode step, a captured one too; these only go down."""
PROMPT_LAUNCHES = {
    "SmolLM2, the default model": 579,
    "SmolLM2, hybrid": 518,
    "SmolLM2, hybrid, int8": 518,
    "SmolLM2, hybrid, int4": 518,
    "LLaMA-2-7B, hybrid": 552,
    "LLaMA-2-7B, pure": 360,
    "Pythia-2.8B, released": 455,
}
"""Of a step that reads 500 tokens of one prompt; these only go down."""

SAMPLING_LAUNCHES = {"greedy": 1, "drawn": 1, "filtered": 1}
"""Of choosing a captured step's tokens; these only go down, too."""
FAULTS = {
    "parameter_on_the_host": "WrongLaunchError",
    "norm_on_the_host": "FakeTensorDeviceMismatchError",
    "item_in_a_step": "HiddenSyncError",
    "mask_as_an_index": "DynamicOutputShapeException",
    "memory_that_is_not_pinned": "HiddenSyncError",
    "copy_to_the_host_that_waits": "HiddenSyncError",
    "tokens_read_too_early": "HiddenSyncError",
    "positions_of_another_dtype": "WrongLaunchError",
    "argument_that_was_forgotten": "WrongLaunchError",
    "numbers_of_the_host_in_a_captured_step": "CaptureError",
    "indices_on_the_host": "HiddenSyncError",
    "tensor_of_another_device": "FakeTensorDeviceMismatchError",
}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What every part of the drive has found."""
    command = [sys.executable, "-m", "tests.fake_cuda.drive", str(tmp_path_factory.mktemp("guard"))]
    run = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert run.returncode == 0, run.stderr
    lines = [json.loads(line) for line in run.stdout.splitlines()]
    return {line["part"]: line.get("found", line.get("error")) for line in lines}


@pytest.mark.parametrize("engine", ENGINES)
def test_engines_of_every_kind_serve_without_a_hidden_wait(engine: str, found: dict[str, Any]) -> None:
    parts = found[f"engine of {engine}"]
    assert isinstance(parts, dict), parts
    assert parts["ends"] > 0
    assert parts["replays"] > 0, "no captured step was replayed"


def test_snapshots_state_files_and_every_tier_of_the_cache_keep_the_rules(found: dict[str, Any]) -> None:
    assert isinstance(found["states"], dict), found["states"]
    assert found["states"]["cached tokens"] > 0


def test_rows_with_grammars_keep_the_rules(found: dict[str, Any]) -> None:
    assert isinstance(found["grammars"], dict), found["grammars"]
    assert found["grammars"]["ends"] == 5


@pytest.mark.parametrize("family", [*OWN_MODULES, "gpt_neox, released"])
def test_the_first_of_two_ranks_keeps_the_rules(family: str, found: dict[str, Any]) -> None:
    assert found[f"ranks of {family}"] == (16 if family in KEEP_STATES else 3), found[f"ranks of {family}"]


@pytest.mark.parametrize("family", OWN_MODULES)
def test_both_stages_of_training_keep_to_the_device(family: str, found: dict[str, Any]) -> None:
    assert found[f"training of {family}"] == [1, 1, 2, 2], found[f"training of {family}"]


def test_no_family_is_left_out_and_all_that_is_driven_is_looked_at(found: dict[str, Any]) -> None:
    assert {name.partition(",")[0] for name in FAMILIES} == set(SERVED_FAMILIES)
    driven = {name for name in found if name.startswith(("engine of ", "ranks of ", "training of "))}
    assert driven == {
        *(f"engine of {name}" for name in ENGINES),
        *(f"ranks of {name}" for name in {*OWN_MODULES, *KEEP_STATES}),
        *(f"training of {name}" for name in OWN_MODULES),
    }


@pytest.mark.parametrize(("model", "most"), LAUNCHES.items())
def test_a_decode_step_launches_no_more_than_it_did(model: str, most: int, found: dict[str, Any]) -> None:
    launches = found[f"launches of {model}"]
    assert isinstance(launches, int), launches
    assert launches <= most


@pytest.mark.parametrize(("model", "most"), PROMPT_LAUNCHES.items())
def test_a_prompt_launches_no_more_than_it_did(model: str, most: int, found: dict[str, Any]) -> None:
    launches = found[f"launches of a prompt of {model}"]
    assert isinstance(launches, int), launches
    assert launches <= most


@pytest.mark.parametrize(("kind", "most"), SAMPLING_LAUNCHES.items())
def test_tokens_of_a_captured_step_are_chosen_by_no_more_launches_than_they_were(
    kind: str, most: int, found: dict[str, Any]
) -> None:
    launches = found[f"sampling {kind}"]
    assert isinstance(launches, int), launches
    assert launches <= most


@pytest.mark.parametrize(("fault", "error"), FAULTS.items())
def test_a_mistake_that_a_cpu_forgives_is_found(fault: str, error: str, found: dict[str, Any]) -> None:
    assert found[f"fault {fault}"] == error
