"""Every model of the paper: HF's own network of its exact structure, tiny and random, against our blocks.

The chain is the user's: an HF folder is read, or converted and loaded.
"""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from dijiang_model.checkpoints.checkpoint import load_model
from dijiang_model.checkpoints.config_json import base_document
from dijiang_model.checkpoints.hf_config import base_model_config
from dijiang_model.config import LocalLayers
from dijiang_model.conversion.convert import convert
from dijiang_model.conversion.evaluation.teacher import load_teacher
from dijiang_model.errors import ConfigError, ConversionError
from dijiang_model.native.library import load_library
from dijiang_model.ops.training.attention import HybridAttention, SoftmaxAttention
from dijiang_model.segments import run_segments
from dijiang_model.serving.network import freeze
from tests.dijiang_model.checkpoints.published_configs import PUBLISHED, save, tiny_teacher
from tests.dijiang_model.stepping import Stepper, assert_close_in_norm, logits_of, random_text

TEXT = random_text(70)
TOLERANCE = 1e-5
"""Of the logits' norm; both sides compute in fp32, in another order."""
EXPECTED = {
    # layers, heads, key-value heads, head size, rotary channels, pre-norm, embedding width, tied
    "pythia-70m": (6, 8, 8, 64, 16, True, 512, False),
    "pythia-160m": (12, 12, 12, 64, 16, True, 768, False),
    "pythia-410m": (24, 16, 16, 64, 16, True, 1024, False),
    "pythia-1b": (16, 8, 8, 256, 64, True, 2048, False),
    "pythia-2.8b": (32, 32, 32, 80, 20, True, 2560, False),
    "opt-125m": (12, 12, 12, 64, 0, True, 768, True),
    "opt-350m": (24, 16, 16, 64, 0, False, 512, True),
    "opt-1.3b": (24, 32, 32, 64, 0, True, 2048, True),
    "tinyllama-1.1b": (22, 32, 4, 64, 64, True, 2048, False),
    "llama-2-7b": (32, 32, 32, 128, 128, True, 4096, False),
    "smollm2-135m": (30, 9, 3, 64, 64, True, 576, True),
    "smollm2-1.7b": (24, 32, 32, 64, 64, True, 2048, True),
    "llama-3.1-8b": (32, 32, 8, 128, 128, True, 4096, False),
    "llama-3.2-1b": (16, 32, 8, 64, 64, True, 2048, True),
    "vicuna-16k": (32, 32, 32, 128, 128, True, 4096, False),
    "yarn-llama-2-7b": (32, 32, 32, 128, 128, True, 4096, False),
    "mistral-7b-v0.1": (32, 32, 8, 128, 128, True, 4096, False),
    "mistral-7b-v0.3": (32, 32, 8, 128, 128, True, 4096, False),
    "qwen2.5-0.5b": (24, 14, 2, 64, 64, True, 896, True),
    "qwen2.5-7b-1m": (28, 28, 4, 128, 128, True, 3584, False),
    "phi-3-mini-4k": (32, 32, 32, 96, 96, True, 3072, False),
    "phi-4": (40, 40, 10, 128, 128, True, 5120, False),
    "phi-4-mini, plain rotation": (32, 24, 8, 128, 96, True, 3072, True),
    "gemma-3-270m": (18, 4, 1, 256, 256, True, 640, True),
    "gemma-3-1b": (26, 4, 1, 256, 256, True, 1152, True),
    "gemma-3-27b, text": (62, 32, 16, 128, 128, True, 5376, True),
    "olmo-2-7b": (32, 32, 32, 128, 128, True, 4096, False),
    "olmo-2-32b": (64, 40, 8, 128, 128, True, 5120, False),
    "qwen3-0.6b": (28, 16, 8, 128, 128, True, 1024, True),
    "qwen3-8b": (36, 32, 8, 128, 128, True, 4096, False),
}


def logits(teacher: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        found: Tensor = teacher(torch.tensor([TEXT])).logits[0]
    return found


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_config_is_read_as_it_is_meant(name: str) -> None:
    config = base_model_config(PUBLISHED[name])
    assert (
        config.num_layers,
        config.num_heads,
        config.num_kv_heads,
        config.head_size,
        config.rotary_dims,
        config.pre_norm,
        config.embedding_width,
        config.tie_word_embeddings,
    ) == EXPECTED[name]


@pytest.mark.parametrize("name", PUBLISHED)
def test_full_softmax_through_our_blocks_gives_the_logits_of_hf(name: str, tmp_path: Path) -> None:
    teacher = tiny_teacher(name)
    ours = load_teacher(save(teacher, tmp_path / "hf"))
    with torch.no_grad():
        found = ours.logits(run_segments(ours, torch.tensor([TEXT]), SoftmaxAttention()))
    assert_close_in_norm(found, logits(teacher), tolerance=TOLERANCE)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_conversion_with_a_window_over_the_whole_text_gives_them_too(name: str, tmp_path: Path) -> None:
    teacher = tiny_teacher(name)
    # A teacher with a sliding window is met by a window that is just as long.
    seen = base_model_config(teacher.config.to_dict()).teacher_window
    window, sinks = (seen, 0) if seen else (len(TEXT) - 4, 4)
    convert(save(teacher, tmp_path / "hf"), tmp_path / "out", window=window, sinks=sinks)
    model, expected = load_model(tmp_path / "out"), logits(teacher)
    assert_close_in_norm(logits_of(model, TEXT), expected, tolerance=TOLERANCE)
    with torch.no_grad():
        trained = model.logits(run_segments(model, torch.tensor([TEXT]), HybridAttention()))
    assert_close_in_norm(trained, expected, tolerance=TOLERANCE)
    stepper = Stepper(model).open(1)
    decoded = [stepper.step({1: TEXT[:33]})[1], *(stepper.step(decode={1: token})[1] for token in TEXT[33:])]
    assert_close_in_norm(torch.cat(decoded), expected, tolerance=TOLERANCE)


GREEDY = (
    "mistral-7b-v0.1",
    "qwen2.5-0.5b",
    "qwen3-0.6b",
    "llama-3.2-1b",
    "yarn-llama-2-7b",
    "phi-3-mini-4k",
    "gemma-3-1b",
    "olmo-2-32b",
)


@pytest.mark.parametrize("name", GREEDY)
def test_200_greedy_tokens_are_those_of_hf_in_the_compiled_kernels(name: str, tmp_path: Path) -> None:
    teacher, prompt, num_new = tiny_teacher(name), TEXT[:20], 200
    seen = base_model_config(teacher.config.to_dict()).teacher_window
    convert(save(teacher, tmp_path / "hf"), tmp_path / "out", window=seen or len(prompt) + num_new, sinks=0)
    model = freeze(load_model(tmp_path / "out"))
    assert load_library() is None or model.decode_path == "native"
    stepper = Stepper(model).open(1)
    last, found = stepper.step({1: prompt})[1][-1], []
    for _ in range(num_new):
        found.append(int(last.argmax()))
        last = stepper.step(decode={1: found[-1]})[1][-1]
    expected = teacher.generate(
        torch.tensor([prompt]), max_new_tokens=num_new, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert found == expected[0, len(prompt) :].tolist()


def test_a_window_wider_than_the_teachers_is_refused(tmp_path: Path) -> None:
    teacher = tiny_teacher("mistral-7b-v0.1")
    with pytest.raises(ConversionError, match="sees the last 32 tokens alone: --window is 32 at most"):
        convert(save(teacher, tmp_path / "hf"), tmp_path / "out", window=33)


def test_a_window_that_is_switched_on_is_refused_and_one_that_is_absent_is_hfs_default() -> None:
    with pytest.raises(ConfigError, match="a sliding window is not supported"):
        base_model_config({**PUBLISHED["qwen2.5-0.5b"], "use_sliding_window": True})
    silent = {name: value for name, value in PUBLISHED["qwen2.5-0.5b"].items() if name != "use_sliding_window"}
    assert base_model_config(silent).teacher_window == 0
    mistral = {name: value for name, value in PUBLISHED["mistral-7b-v0.1"].items() if name != "sliding_window"}
    assert base_model_config(mistral).teacher_window == 4096
    assert base_model_config(PUBLISHED["mistral-7b-v0.3"]).teacher_window == 0


def test_a_multimodal_model_is_told_what_to_save() -> None:
    with pytest.raises(ConfigError, match=r"'gemma3' is not supported.*save the language model by itself"):
        base_model_config({"model_type": "gemma3", "text_config": PUBLISHED["gemma-3-1b"]})


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_config_that_is_written_is_read_as_it_was(name: str) -> None:
    config = base_model_config(PUBLISHED[name])
    assert base_model_config(base_document(config)) == config


def _sharded_safetensors(teacher: PreTrainedModel, folder: Path) -> None:
    save(teacher, folder, max_shard_size="300KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 3


def _sharded_bin(teacher: PreTrainedModel, folder: Path, *, is_zip: bool = True) -> None:
    save(teacher, folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    # The first releases carried the rotary frequencies of each layer as well.
    tensors |= {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": torch.ones(64) for layer in range(2)}
    weight_map = {name: f"pytorch_model-{1 + i % 3:05d}-of-00003.bin" for i, name in enumerate(tensors)}
    for shard in set(weight_map.values()):
        part = {name: tensors[name] for name, owner in weight_map.items() if owner == shard}
        torch.save(part, folder / shard, _use_new_zipfile_serialization=is_zip)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


FORMS: dict[str, Callable[[PreTrainedModel, Path], None]] = {
    "sharded safetensors": _sharded_safetensors,
    "sharded bin": _sharded_bin,
    "sharded bin from before torch 1.6": lambda teacher, folder: _sharded_bin(teacher, folder, is_zip=False),
}


@pytest.mark.parametrize("form", FORMS)
def test_llama_2_in_half_precision_shards_of_either_format(form: str, tmp_path: Path) -> None:
    teacher = tiny_teacher("llama-2-7b").half()
    FORMS[form](teacher, tmp_path / "hf")
    # A fresh network: `half` has rounded the old one's rotary frequencies as well, which no checkpoint holds.
    rounded = tiny_teacher("llama-2-7b")
    rounded.load_state_dict(teacher.state_dict())
    convert(tmp_path / "hf", tmp_path / "out", window=len(TEXT), max_shard_bytes=200_000)
    model = load_model(tmp_path / "out")
    assert_close_in_norm(logits_of(model, TEXT), logits(rounded), tolerance=TOLERANCE)


def test_opt_goes_on_past_its_learned_positions(tmp_path: Path) -> None:
    """HF's network cannot: past the table the last position is used, so that a conversation has no end."""
    convert(save(tiny_teacher("opt-350m"), tmp_path / "hf"), tmp_path / "out", window=16)
    text = random_text(150)
    assert bool(logits_of(load_model(tmp_path / "out"), text).isfinite().all())


def test_only_the_layers_that_see_everything_are_converted(tmp_path: Path) -> None:
    """With a window over the text there, the others keep theirs to the token: text of any length is the teacher's."""
    teacher = tiny_teacher("gemma-3-1b")
    convert(save(teacher, tmp_path / "hf"), tmp_path / "out", window=100, sinks=0)
    config = load_model(tmp_path / "out").config
    assert [(layer.window, layer.sinks) for layer in config.layers] == [(32, 0), (100, 0)]
    assert config.local_layers == LocalLayers((0,), 32, 10_000.0)
    for changes, words in (
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping is set"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ({"layer_types": ["full_attention", "chunked_attention"] * 13}, "layer_types must name"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "a yarn scaling is not supported"),
    ):
        with pytest.raises(ConfigError, match=words):
            base_model_config({**PUBLISHED["gemma-3-1b"], **changes})
