"""Models as people have them: nothing is silently wrong, and a likely slip works or is named with its remedy."""

import errno
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer
from transformers import AutoTokenizer, PreTrainedModel

from dijiang_model.checkpoints.checkpoint import load_model
from dijiang_model.checkpoints.config_json import read_stored_config
from dijiang_model.conversion.convert import convert
from dijiang_model.conversion.evaluation.run import load_subjects
from dijiang_model.conversion.merge import merge
from dijiang_model.conversion.training.adapters import save_adapter
from dijiang_model.errors import ConversionError
from dijiang_model.text.folder import UnsupportedTokenizerError
from dijiang_model.text.template import TemplateSyntaxFailure
from server.text.template import ChatTemplate
from server.text.tokenizer import load_tokenizer
from tests.dijiang_model.conversion.training.test_adapters import made_for
from tests.dijiang_model.stepping import logits_of, random_text
from tests.dijiang_model.teachers import gpt_neox_teacher, llama_teacher, opt_teacher, save_teacher, write_gguf

TEXT = random_text(30)

TIED: Mapping[str, tuple[Callable[[], PreTrainedModel], str, str]] = {
    "llama": (llama_teacher, "lm_head.weight", "model.embed_tokens.weight"),
    "gpt_neox": (lambda: gpt_neox_teacher(tie_word_embeddings=True), "embed_out.weight", "gpt_neox.embed_in.weight"),
    "opt": (opt_teacher, "lm_head.weight", "model.decoder.embed_tokens.weight"),
}


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | changes))


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors", metadata={"format": "pt"})


def test_a_chat_model_ends_where_its_tokenizer_ends_a_turn(source: Path, tmp_path: Path) -> None:
    edit_json(source / "config.json", eos_token_id=256)
    edit_json(source / "generation_config.json", eos_token_id=[259])
    made = convert(source, tmp_path / "out")
    assert load_model(tmp_path / "out").config.eos_token_ids == (259, 256, 258)
    assert made.ends == ("<|unused|> (259)", "<|endoftext|> (256)", "<|im_end|> (258)")
    # Saving it anew changes nothing, and a model that was converted without the tokenizer's learns of it.
    convert(tmp_path / "out", tmp_path / "again")
    assert read_stored_config(tmp_path / "again").config.eos_token_ids == (259, 256, 258)
    document = json.loads((tmp_path / "out" / "config.json").read_text())
    document["dijiang"]["eos_token_ids"] = [256]
    (tmp_path / "out" / "config.json").write_text(json.dumps(document))
    convert(tmp_path / "out", tmp_path / "third")
    assert read_stored_config(tmp_path / "third").config.eos_token_ids == (256, 258)


def test_a_familys_default_ends_nothing_where_another_end_is_named(source: Path, tmp_path: Path) -> None:
    document = json.loads((source / "config.json").read_text())
    del document["eos_token_id"]
    (source / "config.json").write_text(json.dumps(document))
    (source / "generation_config.json").unlink()
    convert(source, tmp_path / "out")
    assert load_model(tmp_path / "out").config.eos_token_ids == (258,)
    edit_json(source / "config.json", eos_token_id=None)
    edit_json(source / "tokenizer_config.json", eos_token=None)
    made = convert(source, tmp_path / "endless")
    assert made.ends == ()
    assert any("names no end of sequence" in warning for warning in made.warnings)


@pytest.mark.parametrize("family", TIED)
def test_a_head_that_differs_from_a_tied_embedding_is_kept(family: str, tmp_path: Path) -> None:
    make, head, embedding = TIED[family]
    source = save_teacher(make(), tmp_path / "hf")
    tied = convert(source, tmp_path / "tied")
    assert not any("untied" in warning for warning in tied.warnings)
    edit_tensors(source, lambda tensors: tensors | {head: tensors[embedding].clone()})
    same = convert(source, tmp_path / "same")
    assert not any("untied" in warning for warning in same.warnings)
    assert load_model(tmp_path / "same").config.tie_word_embeddings
    other = torch.randn(load_file(source / "model.safetensors")[embedding].shape)
    edit_tensors(source, lambda tensors: tensors | {head: other})
    untied = convert(source, tmp_path / "untied")
    assert any("the head is kept, untied" in warning for warning in untied.warnings)
    model = load_model(tmp_path / "untied")
    assert not model.config.tie_word_embeddings
    assert torch.equal(model.head_weight, other)


def test_a_tied_embedding_may_be_stored_as_the_head(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "usual")
    edit_tensors(source, lambda tensors: {n.replace("model.embed_tokens", "lm_head"): t for n, t in tensors.items()})
    convert(source, tmp_path / "out")
    assert torch.equal(logits_of(load_model(tmp_path / "out"), TEXT), logits_of(load_model(tmp_path / "usual"), TEXT))


ADDED: Mapping[str, tuple[dict[str, object], dict[str, object]]] = {
    "added_tokens_decoder": (
        {"added_tokens_decoder": {
            "259": {"content": "<|unused|>", "special": True, "normalized": False, "lstrip": False, "rstrip": False,
                    "single_word": False},
            "260": {"content": "<think>", "special": False, "normalized": False, "lstrip": False, "rstrip": True,
                    "single_word": False},
            "261": {"content": "<|eot|>", "special": True, "normalized": False, "lstrip": False, "rstrip": False,
                    "single_word": False},
        }, "eos_token": "<|eot|>"},
        {},
    ),
    "added_tokens.json": ({"eos_token": "<|eot|>"}, {"<think>": 260, "<|eot|>": 261}),
    "named only": ({"eos_token": "<|eot|>", "additional_special_tokens": ["<think>"]}, {}),
    "of the vocabulary": ({"unk_token": "!"}, {}),
}  # fmt: skip


@pytest.mark.parametrize("kind", ADDED)
def test_tokens_that_only_the_settings_name_are_encoded_as_transformers_does(kind: str, tmp_path: Path) -> None:
    source = save_teacher(llama_teacher(vocab_size=264), tmp_path / "hf")
    settings, added = ADDED[kind]
    edit_json(source / "tokenizer_config.json", **settings)
    if added:
        edit_json(source / "added_tokens.json", **added)
    convert(source, tmp_path / "out")
    expected = AutoTokenizer.from_pretrained(source, local_files_only=True)
    found = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    for text in ("a<think> b <|eot|>c!d", "<|im_start|><|unused|><think>\n<|eot|>", "plain"):
        assert found.encode(text).ids == expected(text)["input_ids"]
    flags = {i: repr(token) for i, token in found.get_added_tokens_decoder().items()}
    assert flags == {i: repr(token) for i, token in expected.added_tokens_decoder.items()}
    if "eos_token" in settings:
        assert load_model(tmp_path / "out").config.eos_token_ids == (258, expected.convert_tokens_to_ids("<|eot|>"))


def test_a_token_with_two_ids_is_refused(source: Path, tmp_path: Path) -> None:
    for content, index in (("<|im_end|>", "257"), ("<new>", "999")):
        edit_json(source / "tokenizer_config.json", added_tokens_decoder={index: {"content": content, "special": True}})
        with pytest.raises(ConversionError, match="contradicts itself"):
            convert(source, tmp_path / "out")


def test_a_padding_token_without_a_row_is_left_out(source: Path, tmp_path: Path) -> None:
    edit_json(source / "tokenizer_config.json", pad_token="[PAD]")
    convert(source, tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_parameters": {"rope_type": "linear", "factor": 1.0, "rope_theta": 10_000.0}},
        {"rope_scaling": {"type": "linear", "factor": 1.0}},
        {"quantization_config": {}},
        {"sliding_window": 64, "use_sliding_window": False},
        {"num_local_experts": 0},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_settings_that_change_nothing_are_taken(source: Path, tmp_path: Path, changes: dict[str, object]) -> None:
    convert(source, tmp_path / "usual")
    edit_json(source / "config.json", **changes)
    convert(source, tmp_path / "out")
    assert torch.equal(logits_of(load_model(tmp_path / "out"), TEXT), logits_of(load_model(tmp_path / "usual"), TEXT))


def test_every_damaged_tensor_is_listed(source: Path, tmp_path: Path) -> None:
    names = ("model.layers.0.mlp.up_proj.weight", "model.norm.weight")

    def damage(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        for name in names:
            tensors[name].view(-1)[3] = torch.nan
        return tensors

    edit_tensors(source, damage)
    with pytest.raises(ConversionError) as caught:
        convert(source, tmp_path / "out")
    assert all(f"{name} has values that are not finite" in str(caught.value) for name in names)


def test_added_tokens_keep_their_flags(tmp_path: Path) -> None:
    """A token that `tokenizer.json` knows with other flags gets those of the settings, as in transformers."""
    source = save_teacher(llama_teacher(), tmp_path / "hf")
    token = AddedToken("<|unused|>", special=True, normalized=False, lstrip=True)
    edit_json(source / "tokenizer_config.json", added_tokens_decoder={
        "259": {"content": token.content, "special": True, "normalized": False, "lstrip": True}
    })  # fmt: skip
    convert(source, tmp_path / "out")
    found = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    assert found.encode("a <|unused|>").ids == AutoTokenizer.from_pretrained(source)("a <|unused|>")["input_ids"]


def test_only_what_a_model_was_made_from_is_its_teacher(source: Path, tmp_path: Path) -> None:
    model, untrained = tmp_path / "model", tmp_path / "untrained"
    convert(source, model, dtype="bfloat16")
    convert(source, untrained)
    for teacher in (source, untrained, model):
        load_subjects(model, teacher)
    convert(model, tmp_path / "saved anew")
    load_subjects(tmp_path / "saved anew", source)
    # A fine-tune of the same network, and what was made of it.
    fine_tuned = tmp_path / "fine-tuned"
    shutil.copytree(source, fine_tuned)
    edit_tensors(fine_tuned, lambda tensors: {name: tensor + 0.01 for name, tensor in tensors.items()})
    convert(fine_tuned, tmp_path / "other")
    for teacher in (fine_tuned, tmp_path / "other", write_gguf(llama_teacher(), tmp_path / "t.gguf")):
        with pytest.raises(
            ConversionError, match=r"has other weights than hf, of which the model was made|is another network"
        ):
            load_subjects(model, teacher)
    smaller = save_teacher(llama_teacher(num_hidden_layers=1), tmp_path / "smaller")
    with pytest.raises(ConversionError, match=r"is another network than hf.*1 layers, not 2"):
        load_subjects(model, smaller)
    save_adapter(made_for(model), tmp_path / "adapter.safetensors")
    merge(model, tmp_path / "adapter.safetensors", tmp_path / "trained")
    load_subjects(tmp_path / "trained", source)
    with pytest.raises(ConversionError, match="was trained for 1,000 tokens after its conversion"):
        load_subjects(tmp_path / "trained", tmp_path / "trained")


def test_a_gguf_is_recognised_as_a_teacher_by_its_bytes(tmp_path: Path) -> None:
    path = write_gguf(llama_teacher(), tmp_path / "t.gguf")
    convert(path, tmp_path / "model")
    load_subjects(tmp_path / "model", path)
    other = write_gguf(llama_teacher(), tmp_path / "o.gguf", metadata={"general.author": "somebody"})
    with pytest.raises(ConversionError, match="has other weights"):
        load_subjects(tmp_path / "model", other)


def test_a_full_disk_of_temporary_files_is_a_sentence(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(ConversionError, match=r"No space left on device; .* TMPDIR"):
        convert(source, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"hf"}


UNSERVABLE: Mapping[str, Callable[[Path], object]] = {
    "settings that are no JSON": lambda folder: (folder / "tokenizer_config.json").write_text("{"),
    "settings that are no object": lambda folder: (folder / "tokenizer_config.json").write_text("[]"),
    "empty settings": lambda folder: (folder / "tokenizer_config.json").write_text(""),
    "a template that is no Jinja": lambda folder: (folder / "chat_template.jinja").write_text("{% for m in %}"),
    "a template in the settings": lambda folder: edit_json(folder / "tokenizer_config.json", chat_template="{{ a b }}"),
    "a template in Latin-1": lambda folder: (folder / "chat_template.jinja").write_bytes(b"caf\xe9"),
    "an unknown decoder": lambda folder: edit_json(
        folder / "tokenizer.json", decoder={"type": "BPEDecoder", "suffix": "</w>"}
    ),
}


@pytest.mark.parametrize("spoil", UNSERVABLE)
def test_what_a_server_would_refuse_is_refused_at_conversion(source: Path, tmp_path: Path, spoil: str) -> None:
    UNSERVABLE[spoil](source)
    with pytest.raises((UnsupportedTokenizerError, TemplateSyntaxFailure)):
        ChatTemplate(load_tokenizer(source))  # type: ignore[arg-type]  # there is a tokenizer
    with pytest.raises(ConversionError, match=r"source's tokenizer cannot be (served|used)|is empty"):
        convert(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
