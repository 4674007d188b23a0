"""Tiny models of three families, loaded through transformers."""

from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

import dijiang_model.hf  # noqa: F401  # registers our models
from dijiang_model.config import ModelConfig
from dijiang_model.hf.model import DiJiangLM
from tests.tiny_models import (
    HYBRID,
    anchored,
    gemma3_config,
    gpt_neox_config,
    llama_config,
    opt_config,
    write_tiny_model,
)

CONFIGS: dict[str, ModelConfig] = {
    "llama": llama_config(HYBRID, HYBRID),
    "llama with anchors": llama_config(anchored(2), anchored(2)),
    "gemma3": gemma3_config(),
    "gpt_neox as released": gpt_neox_config(),
    "opt": opt_config(),
}


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder of each, to be read only."""
    place = tmp_path_factory.mktemp("models")
    return {name: write_tiny_model(place / name.replace(" ", "-"), config) for name, config in CONFIGS.items()}


@pytest.fixture
def folder(folders: dict[str, Path]) -> Path:
    return folders["llama"]


def load(folder: Path, **options: object) -> DiJiangLM:
    """The model as users load it."""
    model: DiJiangLM = AutoModelForCausalLM.from_pretrained(folder, **options)
    return model
