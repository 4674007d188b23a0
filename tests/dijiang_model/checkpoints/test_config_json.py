"""Reading configurations: Hugging Face's, in both spellings, and our own; all problems at once."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GPTNeoXConfig, LlamaConfig, OPTConfig

from dijiang_model.checkpoints.config_json import (
    Origin,
    StoredConfig,
    base_document,
    parse_stored_config,
    read_stored_config,
    stored_config_text,
)
from dijiang_model.checkpoints.hf_config import base_model_config
from dijiang_model.config import SINK_RANGE, AttentionConfig, FeatureConfig, ModelConfig
from dijiang_model.errors import ConfigError
from tests.tiny_models import HYBRID, NO_LINEAR, anchored, gpt_neox_config, llama_config, opt_config

PYTHIA = {
    "model_type": "gpt_neox",
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_attention_heads": 8,
    "num_hidden_layers": 6,
    "vocab_size": 50304,
    "rotary_pct": 0.25,
    "rotary_emb_base": 10000,
    "eos_token_id": 0,
}
SMOL = {
    "model_type": "llama",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "num_hidden_layers": 30,
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "rope_theta": 100000,
    "tie_word_embeddings": True,
}
ORIGIN = Origin(recipe="hybrid", teacher="a teacher", licence="apache-2.0", tokens_trained=7)


def test_pythia_config_has_partial_rotary_and_biases() -> None:
    config = base_model_config(PYTHIA)
    assert (config.family, config.num_layers, config.num_kv_heads) == ("gpt_neox", 6, 8)
    assert (config.head_size, config.rotary_dims, config.rope_theta) == (64, 16, 10_000.0)
    assert config.parallel_residual
    assert config.attention_bias
    assert config.eos_token_ids == (0,)


def test_llama_config_has_grouped_heads_and_whole_rotary() -> None:
    config = base_model_config(SMOL)
    assert (config.num_heads, config.num_kv_heads, config.head_size, config.rotary_dims) == (9, 3, 64, 64)
    assert (config.rope_theta, config.norm_eps, config.tie_word_embeddings) == (100_000.0, 1e-6, True)


def test_old_and_new_spelling_of_rotary_embeddings_give_the_same_network() -> None:
    old_neox = PYTHIA | {"rotary_pct": 0.5, "rotary_emb_base": 5000}
    new_neox = {name: value for name, value in PYTHIA.items() if not name.startswith("rotary")}
    new_neox["rope_parameters"] = {"rope_type": "default", "rope_theta": 5000.0, "partial_rotary_factor": 0.5}
    assert base_model_config(old_neox) == base_model_config(new_neox)
    new_llama = {name: value for name, value in SMOL.items() if name != "rope_theta"}
    new_llama["rope_parameters"] = {"rope_type": "default", "rope_theta": 100_000.0}
    assert base_model_config(SMOL) == base_model_config(new_llama)


def test_configs_that_transformers_writes_are_read() -> None:
    neox = GPTNeoXConfig(hidden_size=64, num_attention_heads=4, num_hidden_layers=2, rotary_pct=0.5)
    assert base_model_config(neox.to_dict()).rotary_dims == 8
    llama = LlamaConfig(hidden_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=32, rope_theta=7000.0)
    assert base_model_config(llama.to_dict()).rope_theta == 7000.0


def test_opt_config_has_learned_positions_and_ties_by_default() -> None:
    config = base_model_config(OPTConfig(hidden_size=48, num_attention_heads=3, word_embed_proj_dim=24).to_dict())
    assert (config.family, config.rotary_dims, config.head_size, config.embedding_size) == ("opt", 0, 16, 24)
    assert config.tie_word_embeddings
    with pytest.raises(ConfigError, match="_remove_final_layer_norm"):
        base_model_config(OPTConfig(_remove_final_layer_norm=True).to_dict())


def test_all_unsupported_values_are_listed_at_once() -> None:
    document = SMOL | {
        "rope_scaling": {"type": "dynamic", "factor": 2},
        "hidden_act": "quick_gelu",
        "num_key_value_heads": 4,
        "sliding_window": 4096,
        "quantization_config": {"bits": 4},
        "layer_types": ["full_attention", "sliding_attention"],
        "eos_token_id": [1, 99999],
        "vocab_size": None,
    }
    with pytest.raises(ConfigError) as caught:
        base_model_config(document)
    text = str(caught.value)
    for part in (
        "rope_scaling of type 'dynamic'",
        "hidden_act",
        "num_key_value_heads 4",
        "sliding_window",
        "quantization_config",
        "layer_types",
        "eos_token_id",
        "vocab_size is missing",
    ):
        assert part in text


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"hidden_size": 570}, "hidden_size 570 is not a multiple"),
        ({"hidden_size": "576"}, 'hidden_size is "576"'),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"num_hidden_layers": True}, "num_hidden_layers is true"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1,000,000,000"),
        ({"rms_norm_eps": -1e-5}, "rms_norm_eps"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4}}, "dynamic"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}, "low_freq_factor is missing"),
        (
            {
                "rope_scaling": {"type": "linear", "factor": 2.0},
                "rope_parameters": {"rope_type": "yarn", "factor": 2.0},
            },
            "scale the rotary embedding differently",
        ),
        ({"rope_parameters": {"rope_theta": 1e4}}, "contradicts"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "differs between kinds of layers"),
        ({"rope_parameters": [1]}, "must be an object"),
        ({"partial_rotary_factor": 0.5}, "must be 1 for llama"),
        ({"head_dim": 63}, "rotate"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
        ({"bos_token_id": -5}, "bos_token_id"),
        ({"pretraining_tp": 0}, "pretraining_tp"),
        ({"num_local_experts": 8}, "mixture of experts"),
    ],
)
def test_each_bad_value_is_named(changes: dict[str, object], part: str) -> None:
    with pytest.raises(ConfigError, match=part):
        base_model_config(SMOL | changes)


@pytest.mark.parametrize("model_type", ["bert", ["llama"], 3])
def test_other_model_types_are_refused_by_name(model_type: object) -> None:
    with pytest.raises(ConfigError, match="gpt_neox"):
        base_model_config({"model_type": model_type})


def test_a_negative_padding_id_means_none() -> None:
    assert base_model_config(SMOL | {"pad_token_id": -1}).pad_token_id is None


def test_eos_may_be_a_list() -> None:
    assert base_model_config(SMOL | {"eos_token_id": [2, 0, 2]}).eos_token_ids == (2, 0)


def stored(config: ModelConfig) -> StoredConfig:
    return StoredConfig(config=config, base=base_document(config), origin=ORIGIN)


def test_own_format_reads_back_what_was_written() -> None:
    opt_350m = opt_config(pre_norm=False, embedding_size=24)
    for config in (
        llama_config(),
        gpt_neox_config(),
        opt_config(),
        opt_350m,
        replace(llama_config(), eos_token_ids=(), bos_token_id=None),
    ):
        assert parse_stored_config(json.loads(stored_config_text(stored(config)))) == stored(config)


layers_of_any_kind = st.builds(
    AttentionConfig,
    features=st.builds(
        FeatureConfig,
        bases=st.sampled_from([("dct2",), ("dct4",), ("dct2", "dct4")]),
        normalisation=st.sampled_from(["softmax", "exp"]),
        scale=st.floats(0.01, 10),
        nodes=st.sampled_from(["midpoint", "van_der_corput"]),
    ),
    window=st.integers(1, 500),
    sinks=st.integers(0, 9),
)


@settings(deadline=None)
@given(st.lists(layers_of_any_kind, min_size=1, max_size=6))
def test_any_mix_of_layers_reads_back(layers: list[AttentionConfig]) -> None:
    config = llama_config(*layers)
    assert parse_stored_config(json.loads(stored_config_text(stored(config)))).config == config


def test_anchors_read_back_and_layers_without_are_written_as_before_there_were_any() -> None:
    config = llama_config(anchored(2), HYBRID, anchored(2))
    text = stored_config_text(stored(config))
    assert parse_stored_config(json.loads(text)).config == config
    layers = json.loads(text)["dijiang"]["layers"]
    assert layers["default"]["anchors"]["places"] == [13, 7]
    assert "anchors" not in layers["overrides"]["1"]
    assert "anchors" not in stored_config_text(stored(llama_config()))


def test_widths_read_back_and_are_absent_where_all_features_are_kept() -> None:
    config = llama_config(anchored(2), anchored(2, base=NO_LINEAR))
    text = stored_config_text(stored(config))
    assert parse_stored_config(json.loads(text)).config == config
    assert text.count("width") == 1
    assert [config.num_features(layer) for layer in (0, 1)] == [16, 0]


@pytest.mark.parametrize(
    ("layer", "part"),
    [
        (replace(HYBRID, features=replace(HYBRID.features, width=8)), "0, 1 or a multiple of 16"),
        (replace(HYBRID, features=replace(HYBRID.features, width=-16)), "multiple of 16"),
        (replace(HYBRID, features=replace(HYBRID.features, width=32)), "more than its bases have directions"),
        (replace(NO_LINEAR, window=0, sinks=0), "only a layer with a window"),
        (replace(NO_LINEAR, features=replace(NO_LINEAR.features, far_rank=3)), "update of its queries"),
    ],
)
def test_widths_that_cannot_be_are_refused(layer: AttentionConfig, part: str) -> None:
    with pytest.raises(ConfigError, match=part):
        llama_config(layer)


@pytest.mark.parametrize(
    ("anchors", "part"),
    [
        ({"places": [13]}, "1 places and 2 windows"),
        ({"places": [13, 7, 9], "windows": [4, 5, 5]}, "3 heads, there are 2"),
        ({"places": [13, 6]}, "fewer than 2 sinks and a window of 5"),
        ({"places": "many"}, "list of whole numbers"),
        ({"places": [13, 7.5]}, "list of whole numbers"),
        ({"windows": [2, 5]}, "at least 3"),
        ({"windows": [4, 6], "places": [13, 20]}, "window 5 must be at least"),
        ({"age": -1}, "age"),
        ({"grid": 0.3}, "power of two"),
        ({"grid": 0}, "grid"),
        ({"span": -1}, "span"),
        ({"value_bits": 5}, "4 or 8"),
        ({"rows": 3}, "unknown field"),
    ],
)
def test_contradictions_in_anchors_are_refused(anchors: dict[str, object], part: str) -> None:
    document: dict[str, dict[str, object]] = json.loads(stored_config_text(stored(llama_config(anchored(2)))))
    layers = document["dijiang"]["layers"]
    assert isinstance(layers, dict)
    layers["default"]["anchors"] |= anchors
    with pytest.raises(ConfigError, match=part):
        parse_stored_config(document)


def test_auto_map_is_not_kept() -> None:
    base = base_document(llama_config()) | {"auto_map": {"AutoModelForCausalLM": "evil.Model"}}
    text = stored_config_text(replace(stored(llama_config()), base=base))
    assert "auto_map" not in text


def own_document() -> dict[str, dict[str, object]]:
    document: dict[str, dict[str, object]] = json.loads(stored_config_text(stored(llama_config())))
    return document


def test_every_problem_of_our_section_is_listed() -> None:
    document = own_document()
    document["dijiang"] |= {"surprise": 1, "eos_token_ids": [10**6], "position_table_length": 5}
    layers = document["dijiang"]["layers"]
    assert isinstance(layers, dict)
    layers["default"] |= {"decay": "sometimes", "window": -1}
    layers["overrides"]["7"] = layers["default"]
    with pytest.raises(ConfigError) as caught:
        parse_stored_config(document)
    for part in (
        "dijiang.surprise",
        "eos_token_ids",
        "decay",
        "window is -1",
        "overrides.7",
        "position_table_length is 5",
    ):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"window": 0, "sinks": 2}, "sinks need a window"),
        ({"read_out": "group_norm"}, "denominator"),
        ({"decay": "table"}, "static decay"),
    ],
)
def test_contradictions_in_a_layer_are_refused(changes: dict[str, object], part: str) -> None:
    document = own_document()
    layers = document["dijiang"]["layers"]
    assert isinstance(layers, dict)
    layers["default"] |= changes
    with pytest.raises(ConfigError, match=part):
        parse_stored_config(document)


@pytest.mark.parametrize(
    ("features", "part"),
    [
        ({"bases": ["matrix"]}, "nodes"),
        ({"bases": ["matrix", "dct2"], "nodes": "checkpoint"}, "alone"),
        ({"bases": ["dct2", "dct2"]}, "repeat"),
        ({"bases": []}, "at least one"),
        ({"bases": [["dct2"]]}, "must be a list"),
        ({"nodes": "secret"}, "nodes"),
        ({"scale": 0}, "scale"),
    ],
)
def test_contradictions_in_the_features_are_refused(features: dict[str, object], part: str) -> None:
    document = own_document()
    layers = document["dijiang"]["layers"]
    assert isinstance(layers, dict)
    layers["default"]["features"] |= features
    with pytest.raises(ConfigError, match=part):
        parse_stored_config(document)


def test_a_newer_format_version_is_refused() -> None:
    with pytest.raises(ConfigError, match="format_version is 2, this code reads 1"):
        parse_stored_config(own_document() | {"format_version": 2})


def test_a_base_that_describes_another_network_is_not_written() -> None:
    with pytest.raises(ConfigError, match="another network"):
        stored_config_text(replace(stored(llama_config()), base=SMOL | {"num_hidden_layers": 2}))


@pytest.mark.parametrize("text", ["", "[1]", "null", "{", '{"a": ', "\xff", "[" * 100_000])
def test_files_that_are_no_json_object_are_clear_errors(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError, match=r"config\.json"):
        read_stored_config(tmp_path)


def test_a_missing_config_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"is not the folder of a model: it has no config\.json"):
        read_stored_config(tmp_path)


def test_a_thousand_problems_make_a_bounded_message() -> None:
    document = own_document()
    document["dijiang"] |= {f"unknown_{index}" * 100: 1 for index in range(1000)}
    with pytest.raises(ConfigError, match="and 980 more") as caught:
        parse_stored_config(document)
    assert len(str(caught.value)) < 10_000


@pytest.mark.parametrize(
    ("trained_range", "window", "last"),
    [(128, 5, 127), (8192, 60, SINK_RANGE - 1), (8192, 4000, 4003), (3000, 4000, 2999)],
    ids=["a short range", "a long range", "a window beyond the cap", "a window beyond the range"],
)
def test_sinks_are_seen_from_no_further_than_trained(trained_range: int, window: int, last: int) -> None:
    config = replace(llama_config(replace(HYBRID, window=window, sinks=4)), max_position_embeddings=trained_range)
    assert config.last_sink_position == last
