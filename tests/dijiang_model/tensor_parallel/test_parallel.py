"""A split network computes what the whole one does: logits and states, for each family and every kind of layer."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from dijiang_model.batch import PackedBatch
from dijiang_model.checkpoints.checkpoint import load_model
from dijiang_model.config import ModelConfig
from dijiang_model.conversion.quantize import quantize_folder
from dijiang_model.errors import CheckpointError, ConfigError
from dijiang_model.quantization.config import INT8, Quantization, WeightKind
from dijiang_model.quantization.modules import quantized_weights
from dijiang_model.state import StateBuffer
from dijiang_model.tensor_parallel.loading import load_shard
from dijiang_model.tensor_parallel.network import ShardedModel
from dijiang_model.tensor_parallel.shards import local_config, working_degrees
from dijiang_model.tensor_parallel.states import StateParts, rank_specs
from tests.dijiang_model.checkpoints.golden_checkpoints import FOLDER
from tests.dijiang_model.conversion.training.thread_ranks import ThreadGroup, on_ranks, shard_of
from tests.tiny_models import (
    CONSTANT,
    HYBRID,
    NO_LINEAR,
    PURE,
    RELEASED,
    TABLES,
    anchored,
    gemma3_config,
    gpt_neox_config,
    llama_config,
    olmo2_config,
    opt_config,
    qwen2_config,
    qwen3_config,
    random_tensors,
    tiny_model,
    write_tiny_model,
)


def with_heads(config: ModelConfig, num_heads: int) -> ModelConfig:
    return replace(config, num_heads=num_heads, num_kv_heads=num_heads, hidden_size=num_heads * config.head_size)


FAR = replace(HYBRID, features=replace(HYBRID.features, far_rank=3))
UNROTATED = replace(HYBRID, features=replace(HYBRID.features, far_rank=3, rotated=False))
SPLITS: dict[str, tuple[ModelConfig, int]] = {
    "llama, grouped queries": (llama_config(), 2),
    "llama, one query head each, uneven vocabulary": (llama_config(num_heads=3, num_kv_heads=3), 3),
    "llama, three queries a head": (llama_config(num_heads=9, num_kv_heads=3), 3),
    "llama, far queries": (llama_config(FAR, UNROTATED), 2),
    "llama, head not tied": (replace(llama_config(), tie_word_embeddings=False), 2),
    "llama, anchors": (llama_config(anchored(2), FAR, anchored(2, base=UNROTATED)), 2),
    "opt, anchors": (
        opt_config(anchored(3, value_bits=4), PURE, anchored(3, base=NO_LINEAR), anchored(3, base=CONSTANT)),
        3,
    ),
    "gpt_neox, tables, norm groups within ranks": (with_heads(gpt_neox_config(), 4), 2),
    "gpt_neox, tables, norm groups across ranks": (with_heads(gpt_neox_config(), 6), 3),
    "gpt_neox, sequential, hybrid": (gpt_neox_config(HYBRID, PURE, parallel_residual=False), 3),
    "gpt_neox, whole projection, static decay": (with_heads(gpt_neox_config(RELEASED, TABLES), 4), 2),
    "qwen2, biases of queries, keys and values": (qwen2_config(), 2),
    "gemma3, local layers": (gemma3_config(), 2),
    "qwen3, normed queries and keys": (qwen3_config(), 2),
    "olmo2, norms over all heads": (olmo2_config(), 2),
    "opt, pre-norm": (with_heads(opt_config(), 4), 4),
    "opt, post-norm, projected embedding": (with_heads(opt_config(pre_norm=False, embedding_size=20), 4), 2),
}
PROMPTS = (70, 3)
NUM_DECODED = 9


def steps(seed: int) -> list[PackedBatch]:
    """A prefill of two prompts, one of them in two pieces, then decoding of both; all rows wanted."""
    generator = torch.Generator().manual_seed(seed)

    def batch(slots: list[int], starts: list[int], lengths: list[int], num_decode: int) -> PackedBatch:
        positions = [start + i for start, length in zip(starts, lengths, strict=True) for i in range(length)]
        token_ids = torch.randint(0, 260, (len(positions),), generator=generator)
        rows = torch.arange(len(positions))
        return PackedBatch(token_ids, torch.tensor(positions), torch.tensor(slots), tuple(lengths), num_decode, rows)

    first, second = PROMPTS
    found = [batch([1, 2], [0, 0], [first - 1, second], 0), batch([2, 1], [second, first - 1], [1, 1], 1)]
    return found + [batch([1, 2], [first + i, second + 1 + i], [1, 1], 2) for i in range(NUM_DECODED)]


def run(model: object, state: StateBuffer) -> list[Tensor | None]:
    state.storage.zero_()
    return [model(batch, state) for batch in steps(1)]  # type: ignore[operator]


@pytest.mark.parametrize("name", SPLITS)
def test_a_split_network_gives_the_logits_and_states_of_the_whole_one(name: str) -> None:
    config, size = SPLITS[name]
    whole = tiny_model(config, dtype=torch.float64)
    tensors = whole.state_dict()
    whole_state = StateBuffer(whole.state_spec, 3)
    with torch.inference_mode():
        expected = run(whole, whole_state)

    def work(group: ThreadGroup) -> tuple[list[Tensor | None], StateBuffer]:
        model = shard_of(tensors, config, group)
        state = StateBuffer(model.state_spec, 3)
        return run(model, state), state

    ranks = on_ranks(size, work)
    for logits, wanted in zip(ranks[0][0], expected, strict=True):
        torch.testing.assert_close(logits, wanted, rtol=0, atol=1e-11)  # fp64 sums in another order
    assert all(logits is None for rank in ranks[1:] for logits in rank[0])
    parts = StateParts(whole_state.spec, [state.spec for _, state in ranks])
    (part_bytes,) = {part.bytes_per_slot for part in parts.parts}
    if not any(layer.anchors for layer in config.layers):
        assert part_bytes < (1.05 / size) * parts.whole.bytes_per_slot + 64 * len(parts.whole.tensors)
    joined = StateBuffer(whole_state.spec, 3)
    for slot in range(3):
        joined.storage[slot] = parts.join([state.storage[slot] for _, state in ranks])
    for tensor, values in joined.tensors.items():
        torch.testing.assert_close(values[1:], whole_state.tensors[tensor][1:], rtol=0, atol=1e-11)


def test_a_layer_costs_two_sums_and_a_far_rank_one_more() -> None:
    def num_sums(config: ModelConfig) -> int:
        tensors = random_tensors(config)

        def work(group: ThreadGroup) -> int:
            model = shard_of(tensors, config, group)
            run(model, StateBuffer(model.local.state_spec, 3))
            return group.num_sums

        return on_ranks(2, work)[0]

    num_steps = len(steps(1))
    assert num_sums(llama_config()) == num_steps * (1 + 2 + 2)
    assert num_sums(llama_config(FAR, PURE)) == num_steps * (1 + 3 + 2)
    neox = with_heads(gpt_neox_config(HYBRID, HYBRID), 4)
    assert num_sums(neox) == num_steps * (1 + 1 + 1), "attention and MLP of a parallel residual share one"
    assert num_sums(replace(neox, parallel_residual=False)) == num_steps * (1 + 2 + 2)


@pytest.mark.parametrize("config", [llama_config(), llama_config(anchored(2), PURE)], ids=["window", "anchors"])
def test_a_row_of_states_comes_back_from_its_parts(config: ModelConfig) -> None:
    spec, part = tiny_model(config).state_spec, tiny_model(local_config(config, 2)).state_spec
    parts = StateParts(spec, rank_specs(part, config, size=2))
    buffer = StateBuffer(spec, 1)
    buffer.storage.zero_()
    for number, tensor in enumerate(buffer.tensors.values()):
        tensor.copy_(torch.arange(tensor.numel()).view(tensor.shape) + 1_000 * number)
    row = buffer.storage[0]
    split = parts.split(row)
    assert [len(piece) for piece in split] == [parts.parts[0].bytes_per_slot] * 2
    assert torch.equal(parts.join(split), row)
    ranks = [StateBuffer(of_rank, 1) for of_rank in parts.parts]
    for rank, piece in zip(ranks, split, strict=True):
        rank.storage[0] = piece
    for name, tensor in buffer.tensors.items():
        assert torch.equal(torch.cat([rank.tensors[name][0] for rank in ranks]), tensor[0])


@pytest.mark.parametrize("config", [llama_config(), with_heads(opt_config(), 4)], ids=["llama", "opt"])
def test_the_parts_of_a_checkpoint_compute_what_the_whole_does(config: ModelConfig, tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "model", config, with_tokenizer=False)
    whole = load_model(folder)
    with torch.inference_mode():
        expected = run(whole, StateBuffer(whole.state_spec, 3))

    def work(group: ThreadGroup) -> tuple[ShardedModel, list[Tensor | None]]:
        model = load_shard(folder, group)
        return model, run(model, StateBuffer(model.local.state_spec, 3))

    ranks = on_ranks(2, work)
    for logits, wanted in zip(ranks[0][1], expected, strict=True):
        torch.testing.assert_close(logits, wanted, rtol=0, atol=2e-5)  # fp32 sums in another order
    own = [dict(model.local.named_parameters()) for model, _ in ranks]
    for name, parameter in whole.named_parameters():
        on_both = re.search(r"norm|embed_positions|(out_proj|fc2)\.bias", name)
        assert sum(parts[name].numel() for parts in own) == parameter.numel() * (2 if on_both else 1), name


def test_a_released_checkpoint_can_be_split() -> None:
    folder = FOLDER / "aligned"
    whole = load_model(folder, dtype=torch.float64)
    size = max(working_degrees(whole.config))
    assert size > 1
    with torch.inference_mode():
        expected = run_within(whole, whole.config.vocab_size, StateBuffer(whole.state_spec, 3))

    def work(group: ThreadGroup) -> list[Tensor | None]:
        model = load_shard(folder, group, dtype=torch.float64)
        return run_within(model, whole.config.vocab_size, StateBuffer(model.local.state_spec, 3))

    for logits, wanted in zip(on_ranks(size, work)[0], expected, strict=True):
        torch.testing.assert_close(logits, wanted, rtol=0, atol=1e-10)


def run_within(model: object, vocab_size: int, state: StateBuffer) -> list[Tensor | None]:
    state.storage.zero_()
    batches = [replace(batch, token_ids=batch.token_ids % vocab_size) for batch in steps(2)]
    return [model(batch, state) for batch in batches]  # type: ignore[operator]


def test_degrees_that_work_divide_heads_and_inner_width() -> None:
    smollm2 = replace(llama_config(num_heads=9, num_kv_heads=3), intermediate_size=1536)
    assert working_degrees(smollm2) == (1, 3)
    with pytest.raises(ConfigError, match=re.escape("9 heads, 3 key-value heads")) as refusal:
        local_config(smollm2, 2)
    assert str(refusal.value).endswith("cannot be split over 2 ranks; it can over 1 or 3")
    assert working_degrees(llama_config(num_heads=32, num_kv_heads=8)) == (1, 2, 4, 8)
    assert working_degrees(replace(llama_config(num_heads=8, num_kv_heads=8), intermediate_size=98)) == (1, 2)


def test_a_group_norm_leaves_two_heads_to_each_rank_at_least() -> None:
    assert working_degrees(with_heads(gpt_neox_config(), 8)) == (1, 2, 4)
    assert working_degrees(gpt_neox_config()) == (1,)
    with pytest.raises(ConfigError, match=r"it can over 1$"):
        local_config(gpt_neox_config(), 3)


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("is_stored", [True, False], ids=["stored", "rounded while loading"])
def test_quantized_weights_are_split_code_for_code(kind: WeightKind, is_stored: bool, tmp_path: Path) -> None:
    config = replace(llama_config(HYBRID), intermediate_size=128, tie_word_embeddings=is_stored)
    folder = write_tiny_model(tmp_path / "model", config, with_tokenizer=False)
    whole = load_model(folder, weights=kind)
    if is_stored:
        quantize_folder(folder, tmp_path / "stored", kind=kind)
        folder = tmp_path / "stored"
    with torch.inference_mode():
        expected = run(whole, StateBuffer(whole.state_spec, 3))

    def work(group: ThreadGroup) -> tuple[ShardedModel, list[Tensor | None]]:
        model = load_shard(folder, group, weights=None if is_stored else kind)
        return model, run(model, StateBuffer(model.local.state_spec, 3))

    ranks = on_ranks(2, work)
    values = [dict(quantized_weights(model.local)) for model, _ in ranks]
    assert values[0].keys() == dict(quantized_weights(whole)).keys()
    for name, weight in quantized_weights(whole):
        axis = 1 if name.endswith(("o_proj.weight", "down_proj.weight")) else 0
        joined = torch.cat([parts[name].dequantized() for parts in values], dim=axis)
        assert torch.equal(joined, weight.dequantized()), name
    for logits, wanted in zip(ranks[0][1], expected, strict=True):
        torch.testing.assert_close(logits, wanted, rtol=0, atol=2e-3)  # the kernels round each rank's activations


def test_groups_of_columns_are_not_cut() -> None:
    config = replace(llama_config(num_heads=8, num_kv_heads=8), intermediate_size=256)
    assert working_degrees(config, INT8) == (1, 2, 4, 8)
    assert working_degrees(config, Quantization("int4", group_size=32)) == (1, 2, 4)
    with pytest.raises(ConfigError, match=r"256 in int4 groups of 64 cannot be split over 4 ranks; it can over 1 or 2"):
        local_config(config, 4, Quantization("int4", group_size=64))


def test_a_damaged_part_is_found_by_the_rank_that_reads_it(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "model", with_tokenizer=False)
    tensors = random_tensors(llama_config())
    tensors["model.layers.1.self_attn.v_proj.weight"][-1, 0] = torch.nan
    save_file(tensors, folder / "model.safetensors")

    def work(group: ThreadGroup) -> str:
        try:
            load_shard(folder, group)
        except CheckpointError as error:
            return str(error)
        return ""

    first, second = on_ranks(2, work)
    assert first == ""
    assert "model.layers.1.self_attn.v_proj.weight has values that are not finite" in second


def test_a_tensor_of_the_wrong_shape_is_refused_before_it_is_cut(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "model", with_tokenizer=False)
    tensors = random_tensors(llama_config())
    tensors["model.layers.0.self_attn.o_proj.weight"] = torch.zeros(64, 32)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"o_proj.weight has the shape \[64, 32\]"):
        on_ranks(2, lambda group: load_shard(folder, group))
