"""The whole network against the naive forward pass, however its tokens are fed."""

from dataclasses import replace
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dijiang_model import reference
from dijiang_model.batch import PackedBatch, decode, prefill
from dijiang_model.config import ModelConfig
from dijiang_model.serving.network import FrozenModel, freeze
from dijiang_model.state import StateBuffer
from tests.dijiang_model.stepping import Stepper, assert_close_in_norm, assert_states_close, logits_of, random_text
from tests.tiny_models import (
    HYBRID,
    PURE,
    RELEASED,
    TABLES,
    gemma3_config,
    gpt_neox_config,
    llama_config,
    olmo2_config,
    opt_config,
    qwen2_config,
    qwen3_config,
    random_tensors,
    tiny_model,
    tiny_network,
)

LENGTHS = (1, 2, 63, 64, 65, 127, 130, 500)
TEXT = random_text(500)

TWO_BASES = replace(PURE, features=replace(PURE.features, bases=("dct2", "dct4")))
PAPER = replace(PURE, features=replace(PURE.features, normalisation="exp"))
FAR_QUERIES = replace(HYBRID, features=replace(HYBRID.features, far_rank=3, bases=("dct2", "dct4")))
UNROTATED = replace(FAR_QUERIES, features=replace(FAR_QUERIES.features, rotated=False))
CONFIGS = {
    "llama: hybrid 5+2, pure with two bases": llama_config(),
    "llama: a window of its own for each layer": llama_config(
        replace(HYBRID, window=28, sinks=4), replace(HYBRID, window=124, sinks=0), replace(HYBRID, window=1, sinks=3)
    ),
    "llama: one key-value head, untied": replace(
        llama_config(HYBRID, TWO_BASES, num_kv_heads=1), tie_word_embeddings=False, attention_bias=True, mlp_bias=True
    ),
    "llama: far queries, hybrid and pure": llama_config(
        FAR_QUERIES, replace(PURE, features=replace(PURE.features, far_rank=5))
    ),
    "llama: features before rotation, hybrid and pure": llama_config(
        UNROTATED, replace(PURE, features=replace(PURE.features, rotated=False))
    ),
    "llama: the paper's exp features": llama_config(PAPER, PAPER, num_kv_heads=4),
    "gpt_neox: released": gpt_neox_config(),
    "gpt_neox: released, sequential": gpt_neox_config(TABLES, TABLES, parallel_residual=False),
    "gpt_neox: released, static decay": replace(gpt_neox_config(RELEASED, PURE), position_table_length=0),
    "gpt_neox: hybrid, sequential": replace(
        gpt_neox_config(HYBRID, TWO_BASES, parallel_residual=False), position_table_length=0
    ),
    "gpt_neox: features before rotation": replace(gpt_neox_config(UNROTATED, HYBRID), position_table_length=0),
    "opt: hybrid, pre-norm": opt_config(),
    "qwen2: biases of queries, keys and values": qwen2_config(),
    "gemma3: local layers, norms behind": gemma3_config(),
    "gemma3: local features before rotation": gemma3_config(replace(UNROTATED, window=7, sinks=0), PURE),
    "qwen3: normed queries and keys, scaled rotation": qwen3_config(HYBRID, UNROTATED),
    "olmo2: norms behind alone, and over all heads": olmo2_config(HYBRID, UNROTATED),
    "opt: post-norm, embedding of its own width": opt_config(HYBRID, RELEASED, pre_norm=False, embedding_size=24),
}
FP64_TOLERANCE = 1e-10
"""Of the logits' norm: 1e-16 per operation, through two or three layers and sums of up to 500 terms."""
FP32_TOLERANCE = 1e-5
"""The same with 6e-8 per operation."""


@cache
def model_of(name: str, dtype: torch.dtype) -> FrozenModel:
    return tiny_network(CONFIGS[name], dtype=dtype)


@cache
def expected_of(name: str) -> tuple[list[Tensor], Tensor]:
    """The naive forward pass over TEXT; causal, so its first rows serve every shorter text."""
    return reference.forward(CONFIGS[name], random_tensors(CONFIGS[name]), TEXT)


@pytest.mark.parametrize("num_tokens", LENGTHS)
@pytest.mark.parametrize("name", CONFIGS)
def test_prefill_equals_the_naive_forward_pass(name: str, num_tokens: int) -> None:
    expected = expected_of(name)[1][:num_tokens]
    for dtype, tolerance in ((torch.float64, FP64_TOLERANCE), (torch.float32, FP32_TOLERANCE)):
        logits = logits_of(model_of(name, dtype), TEXT[:num_tokens])
        assert logits.dtype == dtype
        assert_close_in_norm(logits, expected, tolerance=tolerance)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_hidden_state_equals_the_naive_one(name: str) -> None:
    model, num_tokens = tiny_model(CONFIGS[name], dtype=torch.float64), 130
    buffer = StateBuffer(model.state_spec, 2)
    buffer.storage.zero_()
    positions = torch.arange(num_tokens)
    batch = PackedBatch(torch.tensor(TEXT[:num_tokens]), positions, torch.tensor([1]), (num_tokens,), 0, positions[-1:])
    hidden = model.hidden_states(batch, buffer, all_layers=True)
    for actual, expected in zip(hidden, expected_of(name)[0], strict=True):
        assert_close_in_norm(actual, expected[:num_tokens], tolerance=FP64_TOLERANCE)


@pytest.mark.parametrize("name", CONFIGS)
def test_decode_equals_prefill(name: str) -> None:
    """fp64, output and state; 140 tokens pass the trained range, the tables and every window."""
    model, text = model_of(name, torch.float64), TEXT[:140]
    stepper = Stepper(model).open(1, 2)
    prefilled = stepper.step({1: text})[1]
    decoded = torch.cat([stepper.step(decode={2: token})[2] for token in text])
    assert_close_in_norm(decoded, prefilled, tolerance=FP64_TOLERANCE)
    assert_states_close(stepper.state(2), stepper.state(1), tolerance=FP64_TOLERANCE)


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("name", CONFIGS)
def test_decode_equals_prefill_in_fp32(name: str, native: bool) -> None:
    """By the compiled kernels where they run this model, and by torch."""
    model, text = tiny_network(CONFIGS[name], native=native), TEXT[:140]
    stepper = Stepper(model).open(2)
    decoded = torch.cat([stepper.step(decode={2: token})[2] for token in text])
    assert_close_in_norm(decoded, expected_of(name)[1][:140], tolerance=FP32_TOLERANCE)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    name=st.sampled_from(list(CONFIGS)),
    segments=st.lists(st.integers(1, 70), min_size=1, max_size=7),
    decode_ones=st.booleans(),
)
def test_any_split_gives_the_same_logits_and_state(name: str, segments: list[int], decode_ones: bool) -> None:
    """Segments of one token go down the recurrent path or the chunked one."""
    model, text = model_of(name, torch.float64), TEXT[: sum(segments)]
    stepper = Stepper(model).open(1, 2)
    whole = stepper.step({1: text})[1]
    parts, begin = [], 0
    for length in segments:
        piece = text[begin : begin + length]
        is_decode = decode_ones and length == 1
        parts.append((stepper.step(decode={2: piece[0]}) if is_decode else stepper.step({2: piece}))[2])
        begin += length
    assert_close_in_norm(torch.cat(parts), whole, tolerance=FP64_TOLERANCE)
    assert_states_close(stepper.state(2), stepper.state(1), tolerance=FP64_TOLERANCE)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    name=st.sampled_from(list(CONFIGS)),
    lengths=st.lists(st.integers(1, 140), min_size=1, max_size=6),
    before=st.lists(st.integers(0, 70), min_size=6, max_size=6),
    num_decode=st.integers(0, 6),
    num_padding=st.integers(0, 3),
    slots=st.permutations(range(1, 8)),
)
def test_a_sequence_depends_on_no_neighbour_slot_or_padding(
    name: str, lengths: list[int], before: list[int], num_decode: int, num_padding: int, slots: list[int]
) -> None:
    """Ragged packs, some sequences beginning and some going on, beside NaN in free slots and in scratch."""
    model = model_of(name, torch.float64)
    num_decode = min(num_decode, len(lengths))
    lengths = [1] * num_decode + lengths[num_decode:]
    together = Stepper(model).open(*slots[: len(lengths)])
    texts = [random_text(start + n, seed=i) for i, (start, n) in enumerate(zip(before, lengths, strict=False))]
    for slot, text, start in zip(slots, texts, before, strict=False):
        if start > 0:
            together.step({slot: text[:start]})
    untouched = {slot: together.buffer.storage[slot].clone() for slot in slots[len(lengths) :]}
    tails = {slot: text[start:] for slot, text, start in zip(slots, texts, before, strict=False)}
    decoding = slots[:num_decode]
    logits = together.step(
        {slot: tail for slot, tail in tails.items() if slot not in decoding},
        decode={slot: tails[slot][0] for slot in decoding},
        num_padding=num_padding,
    )
    for slot, text, start in zip(slots, texts, before, strict=False):
        alone = Stepper(model, num_slots=2).open(1)
        assert_close_in_norm(logits[slot], alone.step({1: text})[1][start:], tolerance=FP64_TOLERANCE)
        assert_states_close(together.state(slot), alone.state(1), tolerance=FP64_TOLERANCE)
    for slot, bytes_before in untouched.items():
        assert torch.equal(together.buffer.storage[slot], bytes_before)


@pytest.mark.parametrize("name", CONFIGS)
def test_which_slot_a_sequence_has_changes_no_bit(name: str) -> None:
    model = model_of(name, torch.float32)
    first, second = Stepper(model).open(1, 2, 3), Stepper(model).open(7, 4, 5)
    for a, b, text in ((1, 7, TEXT[:70]), (2, 4, TEXT[70:72]), (3, 5, TEXT[72:140])):
        first.step({a: text})
        second.step({b: text})
    ones = first.step({1: TEXT[:9]}, decode={2: 5, 3: 6})
    others = second.step({7: TEXT[:9]}, decode={4: 5, 5: 6})
    for a, b in ((1, 7), (2, 4), (3, 5)):
        assert torch.equal(ones[a], others[b])
        assert torch.equal(first.buffer.storage[a], second.buffer.storage[b])


@pytest.mark.parametrize("name", CONFIGS)
def test_compiled_decode_rows_have_the_same_bits_alone_and_together(name: str) -> None:
    """Nine conversations of different lengths in one step, in another order, and each by itself."""
    model = model_of(name, torch.float32)
    if model.decode_path == "torch":
        pytest.skip("the compiled kernels do not run this model here")
    steppers = [Stepper(model, num_slots=10).open(*range(1, 10)) for _ in range(3)]
    for stepper in steppers:
        for slot in range(1, 10):
            stepper.step({slot: TEXT[: 13 * slot]})
    together = steppers[0].step(decode={slot: slot for slot in range(1, 10)}, num_padding=2)
    reverse = steppers[1].step(decode={slot: slot for slot in range(9, 0, -1)})
    for slot in range(1, 10):
        alone = steppers[2].step(decode={slot: slot})[slot]
        assert torch.equal(together[slot], alone)
        assert torch.equal(reverse[slot], alone)
        assert torch.equal(steppers[0].buffer.storage[slot], steppers[2].buffer.storage[slot])


@pytest.mark.parametrize("silent", [[0], [1, 3], [0, 1, 2, 3]])
def test_disabled_heads_are_their_window_and_leave_the_others_alone(silent: list[int]) -> None:
    """mix_bias -inf in some or all of the heads; the state goes on underneath."""
    config = llama_config(HYBRID, HYBRID)
    tensors = random_tensors(config)
    for layer in range(2):
        tensors[f"model.layers.{layer}.self_attn.linear.mix_bias"][silent] = -torch.inf
    expected = reference.forward(config, tensors, TEXT[:60])[1]
    for dtype, tolerance in ((torch.float64, FP64_TOLERANCE), (torch.float32, FP32_TOLERANCE)):
        model = tiny_model(config, dtype=dtype)
        model.load_state_dict(tensors)
        stepper = Stepper(freeze(model.prepare())).open(1, 2)
        assert_close_in_norm(stepper.step({1: TEXT[:60]})[1], expected, tolerance=tolerance)
        decoded = torch.cat([stepper.step(decode={2: token})[2] for token in TEXT[:60]])
        assert_close_in_norm(decoded, expected, tolerance=tolerance)
        assert_states_close(stepper.state(2), stepper.state(1), tolerance=tolerance)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_reused_slot_remembers_nothing(name: str) -> None:
    model = model_of(name, torch.float32)
    stepper = Stepper(model).open(3)
    first = stepper.step({3: TEXT[:100]})[3]
    stepper.buffer.storage[3].fill_(0xFF)
    again = stepper.open(3).step({3: TEXT[:100]})[3]
    assert torch.equal(first, again)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_copied_slot_goes_on_as_the_original(name: str) -> None:
    stepper = Stepper(model_of(name, torch.float32)).open(1, 2)
    stepper.step({1: TEXT[:77]})
    stepper.buffer.storage[2] = stepper.buffer.storage[1]
    stepper.positions[2] = 77
    logits = stepper.step(decode={1: 9, 2: 9})
    torch.testing.assert_close(logits[1], logits[2], rtol=1e-5, atol=1e-6)
    assert_states_close(stepper.state(2), stepper.state(1), tolerance=1e-6)


def test_nan_in_one_sequence_stays_there() -> None:
    """A poisoned conversation in the same step, decoding or prefilling, leaves its neighbours as they are."""
    for name in CONFIGS:
        stepper = Stepper(model_of(name, torch.float32)).open(1, 2)
        stepper.positions |= {3: 40, 4: 90}  # never cleared: NaN
        logits = stepper.step({2: TEXT[:70], 4: TEXT[:70]}, decode={1: 7, 3: 7})
        assert logits[3].isnan().all()
        assert logits[4].isnan().all()
        assert_close_in_norm(logits[1], logits_of(model_of(name, torch.float64), [7]), tolerance=FP32_TOLERANCE)
        assert_close_in_norm(logits[2], expected_of(name)[1][:70], tolerance=FP32_TOLERANCE)


def test_a_generation_fed_back_as_a_prompt_has_the_same_log_probabilities() -> None:
    for name in CONFIGS:
        stepper = Stepper(model_of(name, torch.float64)).open(1)
        rows = [stepper.step({1: TEXT[:20]})[1][-1]]
        generated = [int(rows[-1].argmax())]
        for _ in range(40):
            rows.append(stepper.step(decode={1: generated[-1]})[1][0])
            generated.append(int(rows[-1].argmax()))
        again = logits_of(model_of(name, torch.float64), TEXT[:20] + generated[:-1])[19:]
        actual, expected = torch.stack(rows).log_softmax(-1), again.log_softmax(-1)
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", CONFIGS)
def test_logit_rows_pick_the_wanted_rows_in_their_order(name: str) -> None:
    model = model_of(name, torch.float32)
    buffer = StateBuffer(model.state_spec, 2)
    buffer.storage.zero_()
    batch = PackedBatch(torch.tensor(TEXT[:30]), torch.arange(30), torch.tensor([1]), (30,), 0, torch.tensor([29, 3]))
    logits = model(batch, buffer)
    torch.testing.assert_close(logits, logits_of(model, TEXT[:30])[[29, 3]], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_prefill_and_decode_wrappers_are_the_packed_step(name: str) -> None:
    model = model_of(name, torch.float64)
    buffer = StateBuffer(model.state_spec, 4)
    buffer.storage.zero_()
    slots, starts = torch.tensor([3, 1]), torch.tensor([0, 0])
    packed = torch.tensor(TEXT[:40] + TEXT[:9])
    logits = prefill(model, packed, lengths=(40, 9), slots=slots, starts=starts, state=buffer)
    next_tokens = torch.tensor([TEXT[40], TEXT[9]])
    after = decode(model, next_tokens, slots=slots, positions=torch.tensor([40, 9]), state=buffer)
    expected = expected_of(name)[1]
    assert_close_in_norm(logits[:40], expected[:40], tolerance=FP64_TOLERANCE)
    assert_close_in_norm(after, expected[[40, 9]], tolerance=FP64_TOLERANCE)
    more = prefill(
        model, torch.tensor(TEXT[41:44]), lengths=(3,), slots=slots[:1], starts=torch.tensor([41]), state=buffer
    )
    assert_close_in_norm(more, expected[41:44], tolerance=FP64_TOLERANCE)


def test_state_spec_counts_what_the_formulas_say() -> None:
    """G K V + G K, and two near tensors of G (s + w) d, in fp32; independent of any length."""
    spec = model_of("llama: hybrid 5+2, pure with two bases", torch.float32).state_spec
    shapes = {tensor.name: tensor.shape for tensor in spec.tensors}
    assert shapes == {
        "layers.0.linear_state": (2, 16, 16),
        "layers.0.normaliser": (2, 16),
        "layers.0.near_keys": (2, 7, 16),
        "layers.0.near_values": (2, 7, 16),
        "layers.1.linear_state": (2, 32, 16),
        "layers.1.normaliser": (2, 32),
    }
    num_values = 2 * (16 * 16 + 16) + 2 * (2 * 7 * 16) + 2 * (32 * 16 + 32)
    assert num_values * 4 <= spec.bytes_per_slot < num_values * 4 + 64 * 6


@pytest.mark.parametrize("name", ["llama: hybrid 5+2, pure with two bases", "gpt_neox: released"])
def test_bf16_weights_keep_an_fp32_state_and_decode_as_they_prefill(name: str) -> None:
    """Same roundings on both paths up to the order of sums; bf16 has 8 bits, and 2e-2 is five of its roundings."""
    model = tiny_model(CONFIGS[name], dtype=torch.bfloat16)
    assert all(t.dtype == torch.float32 for t in model.state_spec.tensors if ".near_" not in t.name)
    elsewhere = tiny_model(CONFIGS[name], dtype=torch.bfloat16).to("meta").state_spec
    assert all(t.dtype == torch.bfloat16 for t in elsewhere.tensors if ".near_" in t.name)
    stepper = Stepper(model).open(1, 2)
    prefilled = stepper.step({1: TEXT[:80]})[1]
    assert prefilled.dtype == torch.float32
    decoded = torch.cat([stepper.step(decode={2: token})[2] for token in TEXT[:80]])
    assert_close_in_norm(decoded, prefilled, tolerance=2e-2)


@pytest.mark.parametrize(
    "name", ["llama: one key-value head, untied", "llama: far queries, hybrid and pure", "gpt_neox: released"]
)
def test_every_tensor_of_a_checkpoint_counts(name: str) -> None:
    """None is loaded and left unused; 80 tokens pass the window and the tables, where the decay matters too."""
    config, text = CONFIGS[name], TEXT[:80]
    tensors = random_tensors(config)
    for tensor_name, tensor in tensors.items():
        noise = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(1))
        model = tiny_model(config)
        model.load_state_dict({tensor_name: tensor + 0.1 * noise}, strict=False)
        changed = logits_of(freeze(model.prepare()), text)
        assert (changed - expected_of(name)[1][:80]).norm() > 1e-3, tensor_name


def test_far_positions_stay_exact() -> None:
    """At position 2,000,000 the rotation is that of fp64 angles: the same text there, from a fresh state, in fp32
    and fp64 agrees; with fp32 angles it would be off by 0.1 rad."""
    config: ModelConfig = llama_config(HYBRID, HYBRID)
    results = []
    for dtype in (torch.float64, torch.float32):
        stepper = Stepper(tiny_model(config, dtype=dtype)).open(1)
        stepper.positions[1] = 2_000_000
        results.append(torch.cat([stepper.step({1: TEXT[:30]})[1], stepper.step(decode={1: 3})[1]]))
    assert_close_in_norm(results[1], results[0], tolerance=FP32_TOLERANCE)
