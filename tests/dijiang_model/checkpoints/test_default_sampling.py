"""How a model is sampled by default: read strictly, carried along by conversion."""

import json
from pathlib import Path

import pytest

from dijiang_model.checkpoints.default_sampling import (
    NEUTRAL,
    SAMPLING_FILE,
    DefaultSampling,
    read_default_sampling,
    write_default_sampling,
)
from dijiang_model.errors import ConfigError


def test_without_a_file_sampling_is_neutral_and_neutral_sampling_writes_none(tmp_path: Path) -> None:
    write_default_sampling(NEUTRAL, tmp_path)
    assert not [*tmp_path.iterdir()]
    assert read_default_sampling(tmp_path) == NEUTRAL


def test_what_is_written_reads_back(tmp_path: Path) -> None:
    sampling = DefaultSampling(temperature=0.0, top_p=0.9, top_k=20, min_p=0.1, repetition_penalty=1.05)
    write_default_sampling(sampling, tmp_path)
    assert read_default_sampling(tmp_path) == sampling


def test_other_members_and_nulls_are_left_out(tmp_path: Path) -> None:
    document = {
        "do_sample": True,
        "eos_token_id": [1, 2],
        "temperature": 0.6,
        "top_p": None,
        "transformers_version": "5",
    }
    (tmp_path / SAMPLING_FILE).write_text(json.dumps(document))
    assert read_default_sampling(tmp_path) == DefaultSampling(temperature=0.6)


@pytest.mark.parametrize(
    ("name", "value"),
    [("temperature", -0.1), ("temperature", "hot"), ("top_p", 1.5), ("top_k", 1.5), ("top_k", True), ("min_p", 2)],
)
def test_a_value_out_of_range_is_an_error_that_names_it(tmp_path: Path, name: str, value: object) -> None:
    (tmp_path / SAMPLING_FILE).write_text(json.dumps({name: value}))
    with pytest.raises(ConfigError, match=f"{SAMPLING_FILE} has {name} {value!r}, must be a number from"):
        read_default_sampling(tmp_path)
