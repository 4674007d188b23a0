"""What transformers saves, the server loads; and saving touches nobody else's files."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from dijiang_model.checkpoints.checkpoint import load_model
from dijiang_model.errors import CheckpointError
from tests.dijiang_model.hf.conftest import CONFIGS, load
from tests.dijiang_model.stepping import logits_of, random_text

TEXT = random_text(30)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_saved_folder_is_the_same_model_for_transformers_and_for_the_engine(
    name: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    model = load(folders[name])
    model.save_pretrained(tmp_path / "out")
    AutoTokenizer.from_pretrained(folders[name]).save_pretrained(tmp_path / "out")
    before = logits_of(load_model(folders[name]), TEXT)
    assert torch.equal(logits_of(load_model(tmp_path / "out"), TEXT), before)
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "out")(torch.tensor([TEXT])).logits, model(torch.tensor([TEXT])).logits)
    assert not [path for path in (tmp_path / "out").iterdir() if path.name.startswith(".")]


def test_a_state_dict_has_the_checkpoints_names(folder: Path) -> None:
    assert load(folder).state_dict().keys() == load_file(folder / "model.safetensors").keys()


def test_changed_weights_are_saved_and_the_folder_they_came_from_stays(folder: Path, tmp_path: Path) -> None:
    before = (folder / "model.safetensors").read_bytes()
    model = load(folder)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(2)
    model.save_pretrained(tmp_path / "out")
    assert (folder / "model.safetensors").read_bytes() == before
    saved = load_file(tmp_path / "out" / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(saved, model.get_input_embeddings().weight)


def test_saving_into_the_folder_it_was_loaded_from_replaces_whole_files(folder: Path, tmp_path: Path) -> None:
    load(folder).save_pretrained(tmp_path)
    untouched = load_model(tmp_path)  # maps the file
    expected = logits_of(untouched, TEXT)
    model = load(tmp_path)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(2)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert torch.equal(logits_of(untouched, TEXT), expected)
    assert not (tmp_path / "model.safetensors").exists(), "the weights of before are gone"
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    model.save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.glob("model*")] == ["model.safetensors"]
    assert torch.equal(load(tmp_path).get_input_embeddings().weight, model.get_input_embeddings().weight)


def test_other_files_in_the_folder_stay(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "checkpoint-5").mkdir()
    (tmp_path / "checkpoint-5" / "notes").write_text("mine")
    load(folder).save_pretrained(tmp_path)
    assert (tmp_path / "checkpoint-5" / "notes").read_text() == "mine"


@pytest.mark.parametrize("kind", ["another model", "no json", "weights alone"])
def test_another_model_is_never_replaced(kind: str, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"precious")
    if kind != "weights alone":
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}) if kind == "another model" else "{")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(CheckpointError, match="name another folder"):
        load(folder).save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


TAKEN = {
    "somebody's sampling": ("generation_config.json", "1GB"),
    "a shard of another model": ("model-00001-of-*.safetensors", "20KB"),
    "an index of another model": ("model.safetensors.index.json", "20KB"),
}


@pytest.mark.parametrize("kind", TAKEN)
def test_a_file_that_the_saved_model_does_not_name_is_kept(kind: str, folder: Path, tmp_path: Path) -> None:
    name, size = TAKEN[kind]
    if kind != "somebody's sampling":
        load(folder).save_pretrained(tmp_path)
        load(folder).save_pretrained(tmp_path / "sharded", max_shard_size=size)
        (name,) = (path.name for path in (tmp_path / "sharded").glob(name))  # it would be written
    (tmp_path / name).write_text("precious")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    with pytest.raises(CheckpointError, match=f"{name}.* name another folder"):
        load(folder).save_pretrained(tmp_path, max_shard_size=size)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "model.safetensors"])
def test_what_a_link_leads_to_is_not_replaced(name: str, folder: Path, tmp_path: Path) -> None:
    """As in a snapshot of the hub's cache."""
    load(folder).save_pretrained(tmp_path / "snapshot")
    (tmp_path / "snapshot" / name).rename(tmp_path / "blob")
    (tmp_path / "snapshot" / name).symlink_to(tmp_path / "blob")
    before = (tmp_path / "blob").read_bytes()
    with pytest.raises(CheckpointError, match=f"{name} is a link"):
        load(folder).save_pretrained(tmp_path / "snapshot")
    assert (tmp_path / "blob").read_bytes() == before


def test_tensors_that_do_not_fit_are_not_saved(folder: Path, tmp_path: Path) -> None:
    model = load(folder)
    state = {name: tensor for name, tensor in model.state_dict().items() if "norm" not in name}
    with pytest.raises(CheckpointError, match=r"(?s)merge_and_unload.*layernorm"):
        model.save_pretrained(tmp_path / "out", state_dict=state)
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="must be a number of bytes or a text such as '5GB'"):
        model.save_pretrained(tmp_path / "out", max_shard_size="much")
    with pytest.raises(ValueError, match="push_to_hub"):
        model.save_pretrained(tmp_path / "out", push_to_hub=True)


def test_ends_of_answers_and_sampling_are_saved_for_the_server(folder: Path, tmp_path: Path) -> None:
    from dijiang_model.checkpoints.default_sampling import read_default_sampling

    model = load(folder)
    model.generation_config.eos_token_id = [256]
    model.generation_config.update(do_sample=True, temperature=0.5, top_p=0.9)
    model.save_pretrained(tmp_path)
    assert load_model(tmp_path).config.eos_token_ids == (258, 256)
    sampling = read_default_sampling(tmp_path)
    assert (sampling.temperature, sampling.top_p) == (0.5, 0.9)
    again = load(tmp_path)
    assert again.generation_config.do_sample
    assert again.generation_config.eos_token_id == [258, 256]
