"""GGUF files: dequantized, their row order undone, their tokenizer rebuilt; other kinds of models refused."""

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from dijiang_model.checkpoints.checkpoint import load_model
from dijiang_model.checkpoints.config_json import read_stored_config
from dijiang_model.checkpoints.hf_config import base_model_config
from dijiang_model.conversion.convert import convert
from dijiang_model.conversion.sources.gguf_source import GgufSource
from dijiang_model.conversion.sources.gguf_tokenizer import byte_level_tokenizer
from dijiang_model.errors import ConversionError, ModelError
from dijiang_model.families import FAMILIES
from dijiang_model.rotary import RopeScaling, rotary_frequencies
from tests.byte_tokenizer import CHAT_TEMPLATE
from tests.dijiang_model.checkpoints.published_configs import PUBLISHED, shrunk, tiny_teacher
from tests.dijiang_model.conversion.test_convert import TEXT, TOLERANCE, difference, teacher_logits
from tests.dijiang_model.stepping import assert_close_in_norm, logits_of
from tests.dijiang_model.teachers import llama_teacher, write_gguf


def test_a_plain_gguf_gives_the_teachers_tensors_bit_for_bit(tmp_path: Path) -> None:
    teacher = llama_teacher()
    source = GgufSource(write_gguf(teacher, tmp_path / "t.gguf"), FAMILIES.values())
    expected = teacher.state_dict()
    del expected["lm_head.weight"]
    assert source.infos().keys() == expected.keys()
    assert all(torch.equal(source.read(name), tensor) for name, tensor in expected.items())
    assert source.quantized_types == ()


@pytest.mark.parametrize("is_tied", [True, False])
def test_a_converted_gguf_is_its_teacher(tmp_path: Path, is_tied: bool) -> None:
    teacher = llama_teacher(tie_word_embeddings=is_tied, rope_theta=5000.0)
    convert(write_gguf(teacher, tmp_path / "t.gguf"), tmp_path / "out")
    model = load_model(tmp_path / "out")
    assert difference(logits_of(model, TEXT), teacher_logits(teacher)) < TOLERANCE
    assert model.config.tie_word_embeddings == is_tied


def test_quantized_tensors_are_dequantized_and_the_card_says_so(tmp_path: Path) -> None:
    teacher = llama_teacher()
    path = write_gguf(teacher, tmp_path / "t.gguf", is_quantized=True)
    convert(path, tmp_path / "out")
    state = load_model(tmp_path / "out").state_dict()
    for name, tensor in teacher.state_dict().items():
        if name == "lm_head.weight":
            continue
        step = tensor.abs().max() / 127 if any(kind in name for kind in ("q_proj", "k_proj", "gate_proj")) else 0.0
        assert (state[name] - tensor).abs().max() <= step, name
    stored = read_stored_config(tmp_path / "out")
    assert stored.origin.dequantised_from == "Q8_0"
    assert (stored.origin.licence, stored.origin.teacher) == ("mit", "Tiny LLaMA (t.gguf)")
    assert "dequantized from Q8_0" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("kind", ["F16", "BF16"])
def test_half_precision_tensors_keep_their_values(tmp_path: Path, kind: str) -> None:
    value = torch.randn(4, 32).to(torch.float16 if kind == "F16" else torch.bfloat16)
    writer = gguf.GGUFWriter(tmp_path / "t.gguf", "llama")
    quantization = gguf.GGMLQuantizationType[kind]
    array = gguf.quantize(value.float().numpy(), quantization)
    writer.add_tensor("token_embd.weight", array, raw_dtype=quantization)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    read = GgufSource(tmp_path / "t.gguf", FAMILIES.values()).read("model.embed_tokens.weight")
    assert read.dtype == value.dtype
    assert torch.equal(read, value)


def test_every_end_of_turn_token_ends_an_answer(tmp_path: Path) -> None:
    convert(write_gguf(llama_teacher(), tmp_path / "t.gguf"), tmp_path / "out")
    assert load_model(tmp_path / "out").config.eos_token_ids == (258, 256)


def test_the_tokenizer_gives_text_back_and_knows_its_special_tokens(tmp_path: Path) -> None:
    made = convert(write_gguf(llama_teacher(), tmp_path / "t.gguf"), tmp_path / "out")
    assert made.has_tokenizer
    tokenizer = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    ids = tokenizer.encode("<|im_start|>to the\n").ids
    assert ids[0] == 257
    assert 259 in ids  # the merge " t"
    assert tokenizer.decode(ids, skip_special_tokens=True) == "to the\n"
    for text in ("naïve  café 北京 🙂\n\t", "x = 12345"):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_transformers_reads_the_tokenizer_with_its_chat_template(tmp_path: Path) -> None:
    convert(write_gguf(llama_teacher(), tmp_path / "t.gguf"), tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert tokenizer.chat_template == CHAT_TEMPLATE


def test_a_gguf_without_a_tokenizer_is_converted_with_a_warning(tmp_path: Path) -> None:
    made = convert(write_gguf(llama_teacher(), tmp_path / "t.gguf", pre_tokenizer=None), tmp_path / "out")
    assert not made.has_tokenizer
    assert any("token ids only" in warning for warning in made.warnings)


def metadata(pre_tokenizer: str | None, **more: object) -> dict[str, object]:
    tokens = [*"abcdef0123456789Ġ'.", "12", "Ġa", "ab", "<s>"]
    return {
        "tokenizer.ggml.pre": pre_tokenizer,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.merges": ["1 2", "Ġ a", "a b"],
        "tokenizer.ggml.token_type": [1] * (len(tokens) - 1) + [3],
        "tokenizer.ggml.bos_token_id": len(tokens) - 1,
    } | {f"tokenizer.ggml.{name}": value for name, value in more.items()}


@pytest.mark.parametrize(
    ("pre_tokenizer", "expected"),
    [
        ("gpt-2", ["12", "3", "Ġa", "b"]),
        ("smollm", ["1", "2", "3", "Ġa", "b"]),
        ("llama-bpe", ["<s>", "12", "3", "Ġa", "b"]),
        ("qwen2", ["1", "2", "3", "Ġa", "b"]),
    ],
)
def test_text_is_split_as_the_file_says_before_merging(pre_tokenizer: str, expected: list[str]) -> None:
    assert byte_level_tokenizer(metadata(pre_tokenizer)).encode("123 ab").tokens == expected


def test_the_bos_token_is_added_where_the_file_says_so() -> None:
    assert byte_level_tokenizer(metadata("gpt-2", add_bos_token=True)).encode("a").tokens == ["<s>", "a"]
    assert byte_level_tokenizer(metadata("llama-bpe", add_bos_token=False)).encode("a").tokens == ["a"]


@pytest.mark.parametrize("name", ["default", None, "from-the-future"])
def test_an_unknown_pre_tokenizer_is_refused_rather_than_guessed(name: str | None) -> None:
    with pytest.raises(ConversionError, match="splits text by"):
        byte_level_tokenizer(metadata(name))


def test_merges_that_do_not_fit_the_tokens_are_refused() -> None:
    with pytest.raises(ConversionError, match="merges"):
        byte_level_tokenizer(metadata("gpt-2", merges=["x y"]))
    with pytest.raises(ConversionError, match="no merges"):
        byte_level_tokenizer(metadata("gpt-2", merges=None))


@pytest.mark.parametrize(
    ("extra", "part"),
    [
        ({"llama.attention.sliding_window": 4096}, "sliding window"),
        ({"llama.expert_count": 8}, "mixture of experts"),
        ({"llama.rope.scaling.type": "longrope"}, "longrope"),
        ({"llama.rope.dimension_count": 8}, "rope.dimension_count is 8"),
        ({"llama.attention.value_length": 8}, "value_length is 8"),
    ],
)
def test_what_shares_only_the_architectures_name_is_refused(
    tmp_path: Path, extra: dict[str, str | int | float], part: str
) -> None:
    path = write_gguf(llama_teacher(), tmp_path / "t.gguf", metadata=extra)
    with pytest.raises(ConversionError, match=part):
        convert(path, tmp_path / "out")


def test_missing_metadata_is_listed(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "t.gguf", "llama")
    writer.add_block_count(2)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ConversionError) as caught:
        convert(tmp_path / "t.gguf", tmp_path / "out")
    for part in (
        "llama.embedding_length is missing",
        "llama.context_length is missing",
        "token_embd.weight is missing",
    ):
        assert part in str(caught.value)


@pytest.mark.parametrize("keep_bytes", [0, 3, 50, 2000, 100_000])
def test_damaged_files_are_clear_errors(tmp_path: Path, keep_bytes: int) -> None:
    path = write_gguf(llama_teacher(), tmp_path / "t.gguf")
    path.write_bytes(path.read_bytes()[:keep_bytes])
    with pytest.raises(ModelError, match=r"does not begin with GGUF|is cut short or damaged|is empty"):
        convert(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_other_architectures_are_refused_by_name(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "t.gguf", "gptneox")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ConversionError, match="'gptneox'"):
        convert(tmp_path / "t.gguf", tmp_path / "out")


LLAMA3_SCALING = RopeScaling("llama3", 8.0, 8192, 1.0, 4.0)
ARCHITECTURES: dict[str, tuple[str, dict[str, str | int | float], RopeScaling | None]] = {
    "llama-3.1-8b": ("llama", {}, LLAMA3_SCALING),
    "mistral-7b-v0.3": ("llama", {}, None),
    "vicuna-16k": ("llama", {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}, None),
    "qwen2.5-0.5b": ("qwen2", {}, None),
    "qwen2.5-7b-1m": (
        "qwen2",
        {
            "qwen2.rope.scaling.type": "yarn",
            "qwen2.rope.scaling.factor": 4.0,
            "qwen2.rope.scaling.original_context_length": 64,
        },
        None,
    ),
    "qwen3-0.6b": ("qwen3", {}, None),
    "olmo-2-32b": ("olmo2", {}, None),
    "phi-3-mini-4k": ("phi3", {}, None),
    "phi-4": ("phi3", {}, None),
    "phi-4-mini, plain rotation": ("phi3", {}, None),
    "gemma-3-1b": ("gemma3", {"gemma3.attention.sliding_window_pattern": 2}, None),
    "gemma-3-27b, text": (
        "gemma3",
        {
            "gemma3.attention.sliding_window_pattern": 2,
            "gemma3.rope.scaling.type": "linear",
            "gemma3.rope.scaling.factor": 8.0,
        },
        None,
    ),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_gguf_of_every_architecture_is_its_teacher(name: str, tmp_path: Path) -> None:
    architecture, metadata, scaling = ARCHITECTURES[name]
    teacher, factors = tiny_teacher(name), None
    if scaling is not None:  # the divisors of Llama 3 are those of its own range, not of the tiny model's
        theta = teacher.config.rope_parameters["rope_theta"]
        plain = rotary_frequencies(teacher.config.head_dim, theta=theta)
        factors = np.array(plain) / np.array(scaling.scaled(plain, theta=theta))
        document = {**shrunk(PUBLISHED[name]), "rope_scaling": PUBLISHED[name]["rope_scaling"]}
        del document["model_type"]
        weights = teacher.state_dict()
        teacher = LlamaForCausalLM(LlamaConfig(**document)).eval()
        teacher.load_state_dict(weights)
    if "27b" in name:  # llama.cpp knows the scale of its queries by its 62 layers, which the tiny one has not
        for layer in teacher.model.layers:
            layer.self_attn.scaling = teacher.config.head_dim**-0.5
    path = write_gguf(teacher, tmp_path / "t.gguf", architecture=architecture, metadata=metadata, rope_factors=factors)
    seen = base_model_config(teacher.config.to_dict()).teacher_window
    convert(path, tmp_path / "out", window=seen or 60, sinks=0 if seen else 4)
    model = load_model(tmp_path / "out")
    assert scaling is None or model.config.rope_scaling == scaling
    assert_close_in_norm(logits_of(model, TEXT), teacher_logits(teacher), tolerance=1e-5)


def test_rotary_factors_that_nobody_knows_are_refused(tmp_path: Path) -> None:
    path = write_gguf(llama_teacher(), tmp_path / "t.gguf", rope_factors=np.linspace(1, 3, 8))
    with pytest.raises(ConversionError, match="has factors of its own"):
        convert(path, tmp_path / "out")


def test_the_largest_gemma_scales_queries_by_its_hidden_size() -> None:
    values = {"attention.head_count": 32, "attention.key_length": 128, "embedding_length": 5376, "block_count": 62}
    gguf_of = FAMILIES["gemma3_text"].gguf
    assert gguf_of is not None
    assert gguf_of.config(values.get)["query_pre_attn_scalar"] == 168
    assert gguf_of.config({**values, "block_count": 48}.get)["query_pre_attn_scalar"] == 128


def test_a_rotary_embedding_that_depends_on_the_length_is_refused(tmp_path: Path) -> None:
    def add(writer: gguf.GGUFWriter) -> None:
        writer.add_tensor("rope_factors_long.weight", np.ones(8, dtype=np.float32))

    path = write_gguf(tiny_teacher("phi-4"), tmp_path / "t.gguf", architecture="phi3", add_vocabulary=add)
    with pytest.raises(ConversionError, match="longrope"):
        convert(path, tmp_path / "out")
