"""The compiled steps against the torch path: outputs and states, alone and in a batch, fp32 weights."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from dijiang_model.config import ModelConfig
from dijiang_model.native.library import VARIANTS, load_library, load_variant
from dijiang_model.serving import weights
from dijiang_model.serving.decoder import NativeDecoder
from dijiang_model.serving.network import FrozenModel, NativeModel, freeze
from dijiang_model.serving.weights import why_unsupported
from tests.dijiang_model.stepping import Stepper, assert_close_in_norm, assert_states_close, logits_of, random_text
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
    tiny_model,
    tiny_network,
)

pytestmark = pytest.mark.skipif(load_library() is None, reason="the kernels were not built: no compiler at install")

EXPONENTIAL = replace(PURE, features=replace(PURE.features, normalisation="exp"))
WIDE_WINDOW = replace(HYBRID, window=37, sinks=3)
NO_SINKS = replace(HYBRID, window=7, sinks=0)
FAR_QUERIES = replace(HYBRID, features=replace(HYBRID.features, far_rank=5))
UNROTATED = replace(HYBRID, features=replace(HYBRID.features, rotated=False))
TWO_BASES = replace(HYBRID, features=replace(HYBRID.features, bases=("dct2", "dct4")))
FEWER = replace(TWO_BASES, features=replace(TWO_BASES.features, width=16, rotated=False))
MANY_SINKS = replace(HYBRID, sinks=9)
"""More than a block of keys."""

CONFIGS: dict[str, ModelConfig] = {
    "hybrid and pure with two bases": llama_config(),
    "paper's exponential": llama_config(EXPONENTIAL),
    "windows that differ": llama_config(WIDE_WINDOW, NO_SINKS, TWO_BASES),
    "one key-value head for five": llama_config(HYBRID, PURE, num_heads=5, num_kv_heads=1),
    "own key-value heads": llama_config(HYBRID, num_heads=3, num_kv_heads=3),
    "untied, with biases": replace(llama_config(), tie_word_embeddings=False, attention_bias=True, mlp_bias=True),
    "position tables": gpt_neox_config(TABLES, TABLES),
    "released read-out, static decay": gpt_neox_config(RELEASED, RELEASED),
    "sequential residual": gpt_neox_config(HYBRID, PURE, parallel_residual=False),
    "widths that fill no vector": replace(llama_config(), intermediate_size=75, vocab_size=261),
    "opt": opt_config(HYBRID, PURE),
    "queries of their own for the far part": llama_config(FAR_QUERIES, PURE),
    "features before rotation": llama_config(
        UNROTATED, replace(PURE, features=replace(PURE.features, rotated=False)), replace(FAR_QUERIES, window=37)
    ),
    "far queries before rotation, rotation of some channels": gpt_neox_config(
        replace(FAR_QUERIES, features=replace(FAR_QUERIES.features, rotated=False)), UNROTATED
    ),
    "nothing to rotate": opt_config(UNROTATED, PURE),
    "far queries beside interleaved heads": gpt_neox_config(
        FAR_QUERIES, replace(PURE, features=replace(PURE.features, far_rank=16))
    ),
    "anchors": llama_config(anchored(2), HYBRID, anchored(2, base=FAR_QUERIES)),
    "anchors beside many sinks, heads of 48 channels": replace(
        llama_config(anchored(1, base=MANY_SINKS, places=(40,)), num_heads=5, num_kv_heads=1),
        head_size=48,
        rotary_dims=48,
    ),
    "anchors, features before rotation": gpt_neox_config(anchored(3, base=UNROTATED), anchored(3)),
    "anchors, values of 4 bits": llama_config(anchored(2, value_bits=4), anchored(2, base=UNROTATED, value_bits=4)),
    "anchors, fewer features or none": llama_config(
        anchored(2, base=FEWER),
        anchored(2, base=NO_LINEAR),
        anchored(2, base=CONSTANT, value_bits=4),
        CONSTANT,
        NO_LINEAR,
    ),
    "anchors, nothing to rotate": opt_config(anchored(3, base=UNROTATED), PURE),
    "biases of queries, keys and values": qwen2_config(),
    "local layers, norms behind": gemma3_config(),
    "local features before rotation": gemma3_config(replace(UNROTATED, window=7, sinks=0), UNROTATED),
    "normed queries and keys": qwen3_config(HYBRID, UNROTATED),
    "norms behind alone, and over all heads": olmo2_config(HYBRID, UNROTATED),
    "anchors, norms behind alone": olmo2_config(anchored(2), anchored(2, base=UNROTATED)),
    "long rows": replace(llama_config(), intermediate_size=700, mlp_bias=True),
}
# The order of fp32 sums, through a few layers. GroupNorm over three channels each divides by a spread that may be
# small: the torch path in fp32 is as far from fp64 there.
TOLERANCE, GROUP_NORM_TOLERANCE = 3e-6, 1e-4
# A number that lies between two int8 codes may go to the other one where fp32 sums differ in their last bit; with
# anchors nearly everything is read from int8.
PLACES_TOLERANCE = 1e-3


def tolerance_of(config: ModelConfig) -> float:
    has_group_norm = any(layer.read_out == "group_norm" for layer in config.layers)
    bits = {layer.anchors.value_bits for layer in config.layers if layer.anchors is not None}
    if bits:
        return PLACES_TOLERANCE * 2 ** (8 - min(bits))  # between the codes of fewer bits it is farther
    return GROUP_NORM_TOLERANCE if has_group_norm else TOLERANCE


@pytest.fixture(params=list(CONFIGS))
def config(request: pytest.FixtureRequest) -> ModelConfig:
    return CONFIGS[request.param]


@pytest.fixture
def threads_as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def torch_twin(config: ModelConfig, *, dtype: torch.dtype = torch.float32) -> FrozenModel:
    return tiny_network(config, dtype=dtype, native=False)


def run(model: FrozenModel, *, prompts: dict[int, list[int]], num_steps: int) -> tuple[Stepper, Tensor]:
    """Prefills each slot, then decodes all of them; logits [steps, slots, vocab]."""
    stepper = Stepper(model).open(*prompts)
    if any(prompts.values()):
        stepper.step({slot: prompt for slot, prompt in prompts.items() if prompt})
    text = random_text(num_steps, seed=3)
    logits = []
    for i, token in enumerate(text):
        rows = stepper.step(decode={slot: (token + slot * i) % 256 for slot in prompts}, num_padding=i % 2)
        logits.append(torch.cat(list(rows.values())))
    return stepper, torch.stack(logits)


def test_native_steps_equal_torch_in_logits_and_state(config: ModelConfig) -> None:
    prompts = {1: random_text(50), 2: [], 3: random_text(3, seed=1)}
    native, native_logits = run(tiny_network(config), prompts=prompts, num_steps=60)
    exact, exact_logits = run(torch_twin(config, dtype=torch.float64), prompts=prompts, num_steps=60)
    assert native.model.decode_path == "native"
    assert exact.model.decode_path == "torch"
    tolerance = tolerance_of(config)
    assert_close_in_norm(native_logits, exact_logits, tolerance=tolerance)
    for slot in prompts:
        assert_states_close(native.state(slot), exact.state(slot), tolerance=tolerance)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_kind_of_processor_computes_the_same(variant: str, config: ModelConfig) -> None:
    library = load_variant(variant)
    if library is None:
        pytest.skip(f"no {variant} kernels for this processor")
    model = NativeModel(tiny_model(config), library=library)
    _, logits = run(model, prompts={1: random_text(9)}, num_steps=12)
    _, expected = run(torch_twin(config), prompts={1: random_text(9)}, num_steps=12)
    assert_close_in_norm(logits, expected, tolerance=2 * tolerance_of(config))


@pytest.mark.parametrize("num_others", [1, 2, 3, 4, 6, 11, 18])
def test_a_row_is_the_same_bit_for_bit_in_any_company(num_others: int, config: ModelConfig) -> None:
    model, text = tiny_network(config), random_text(12)
    alone = Stepper(model, num_slots=32).open(5)
    crowd = Stepper(model, num_slots=32).open(5, *range(6, 6 + num_others - 1), 1)
    for i, token in enumerate(text):
        expected = alone.step(decode={5: token})[5]
        others = {slot: (token * slot + i) % 256 for slot in crowd.positions if slot != 5}
        before = dict(list(others.items())[: i % (num_others + 1)])
        actual = crowd.step(decode={**before, 5: token, **others})[5]
        assert torch.equal(actual, expected)
    for name, tensor in crowd.state(5).items():
        assert torch.equal(tensor, alone.state(5)[name]), name


@pytest.mark.usefixtures("threads_as_before")
def test_the_number_of_threads_changes_no_bit(config: ModelConfig) -> None:
    results = []
    for num_threads in (1, 3):
        torch.set_num_threads(num_threads)
        results.append(run(tiny_network(config), prompts={slot: [] for slot in range(1, 8)}, num_steps=12))
    (one, one_logits), (many, many_logits) = results
    assert torch.equal(one_logits, many_logits)
    assert torch.equal(one.buffer.storage[1:], many.buffer.storage[1:])  # slot 0 is scratch


def test_decode_rows_and_prefill_segments_share_a_step(config: ModelConfig) -> None:
    prompt = random_text(70)
    steppers = [
        Stepper(model).open(1, 2, 3) for model in (tiny_network(config), torch_twin(config, dtype=torch.float64))
    ]
    for stepper in steppers:
        stepper.step({1: prompt[:20]})
    mixed = [stepper.step({2: prompt, 3: prompt[:3]}, decode={1: 7}, num_padding=1) for stepper in steppers]
    after = [stepper.step({3: prompt[3:]}, decode={2: 9, 1: 11}) for stepper in steppers]
    for actual, expected in (mixed, after):
        for slot in actual:
            assert_close_in_norm(actual[slot], expected[slot], tolerance=tolerance_of(config))


@pytest.mark.parametrize("cuts", [[1], [299], [17, 18, 255, 256, 257], list(range(1, 300))])
def test_a_prompt_cut_into_any_segments_gives_the_same_bits(cuts: list[int], config: ModelConfig) -> None:
    model, text = tiny_network(config), random_text(300)
    whole, parts = (Stepper(model).open(1, 2) for _ in range(2))
    expected = whole.step({1: text})[1]
    actual = []
    for i, (first, last) in enumerate(zip([0, *cuts], [*cuts, 300], strict=True)):
        company = {2: i % 256} if i % 2 == 0 else {}
        actual.append(parts.step({1: text[first:last]}, decode=company)[1])
    assert torch.equal(torch.cat(actual), expected)
    for name, tensor in parts.state(1).items():
        assert torch.equal(tensor, whole.state(1)[name]), name


@pytest.mark.parametrize("position", [127, 128, 5_000, 1_000_000])
def test_far_positions_are_as_exact_as_near_ones(position: int) -> None:
    config = CONFIGS["windows that differ"]
    models = (tiny_network(config), torch_twin(config, dtype=torch.float64))
    steppers = [Stepper(model).open(1) for model in models]
    for stepper in steppers:
        stepper.positions[1] = position
    for token in random_text(50):
        actual, expected = (stepper.step(decode={1: token})[1] for stepper in steppers)
        assert_close_in_norm(actual, expected, tolerance=TOLERANCE)


def test_disabled_heads_still_write_the_state() -> None:
    config = llama_config(HYBRID, HYBRID)
    model = tiny_model(config)
    for attention in model.attentions:
        attention.linear.mix_bias[:2] = -torch.inf  # the whole first key-value head
        attention.linear.mix_bias[2] = -torch.inf  # half of the second
    models = [freeze(model, native=native) for native in (True, False)]
    (native, logits), (torch_path, expected) = (run(model, prompts={1: [5]}, num_steps=30) for model in models)
    assert_close_in_norm(logits, expected, tolerance=TOLERANCE)
    assert_states_close(native.state(1), torch_path.state(1), tolerance=TOLERANCE)
    assert native.state(1)["layers.0.linear_state"].abs().amin(dim=(1, 2)).gt(0).all()


def test_a_broken_state_stays_in_its_row() -> None:
    stepper = Stepper(tiny_network()).open(1, 2)
    alone = Stepper(tiny_network()).open(1)
    for token in random_text(9):
        stepper.step(decode={1: token, 2: token})
        alone.step(decode={1: token})
    stepper.buffer.tensors["layers.1.linear_state"][2] = torch.nan
    rows = stepper.step(decode={1: 3, 2: 3})
    assert rows[2].isnan().all()
    assert torch.equal(rows[1], alone.step(decode={1: 3})[1])


def test_slots_out_of_range_are_refused_before_anything_is_written() -> None:
    stepper = Stepper(tiny_network(), num_slots=3).open(1)
    before = stepper.buffer.storage.clone()
    for slot in (-1, 3):
        stepper.positions[slot] = 0
        with pytest.raises(IndexError, match="not all in 0 to 2"):
            stepper.step(decode={1: 5, slot: 5})
    assert torch.equal(stepper.buffer.storage, before)


def test_only_wanted_rows_get_logits() -> None:
    model = tiny_model()
    decoder = NativeDecoder(model)
    token_ids, positions, slots = torch.tensor([4, 5, 6]), torch.zeros(3, dtype=torch.int64), torch.tensor([1, 2, 3])
    logits = []
    for wanted in ([0, 1, 2], [2, 0], []):
        state = Stepper(model).open(1, 2, 3).buffer
        rows = torch.tensor(wanted, dtype=torch.int64)
        hidden = model.embed(token_ids, positions)
        logits.append(
            decoder.step(hidden, positions=positions, slots=slots, lengths=(1, 1, 1), wanted=rows, state=state)
        )
    assert torch.equal(logits[1], logits[0][[2, 0]])
    assert logits[2].shape == (0, model.config.vocab_size)


def test_the_torch_path_serves_where_the_kernels_cannot() -> None:
    exact = tiny_network(dtype=torch.float64)
    assert exact.decode_path == "torch"
    assert "float64" in str(exact.slow_because)
    assert not exact.can_defer
    native = tiny_network()
    assert (native.decode_path, native.slow_because, native.can_defer) == ("native", None, True)
    assert tiny_network(native=False).decode_path == "torch"


def test_attention_of_ones_own_is_computed() -> None:
    model = tiny_model()
    model.attention_op = lambda q, k, v, **others: torch.zeros_like(q)
    assert freeze(model).decode_path == "torch"
    assert "function" in str(why_unsupported(model))


def test_a_module_of_ones_own_is_computed() -> None:
    model = tiny_model()
    model.blocks[0].mlp.up_proj = nn.Sequential(model.blocks[0].mlp.up_proj, nn.ReLU())
    assert "mlp.up_proj is a Sequential" in str(freeze(model).slow_because)


def test_a_model_that_is_trained_is_not_frozen() -> None:
    model = tiny_model()
    model.head_weight.requires_grad_(True)
    with pytest.raises(AssertionError):
        freeze(model)
    logits_of(model, [1, 2, 3]).sum().backward()
    assert model.head_weight.grad is not None


def test_weights_stay_alive_with_the_frozen_model() -> None:
    text, model = random_text(20), tiny_model()
    expected, frozen = logits_of(tiny_network(), text), freeze(model)
    for parameter in model.blocks.parameters():
        parameter.data = torch.full_like(parameter, torch.nan)
    assert torch.equal(logits_of(frozen, text), expected)


def test_settings_and_parameters_that_the_kernels_do_not_know_are_left_to_torch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(weights, "KNOWN_SETTINGS", weights.KNOWN_SETTINGS - {"window"})
    assert why_unsupported(tiny_model(llama_config(PURE))) is None  # has the default, 0
    assert "window" in str(why_unsupported(tiny_model(llama_config(HYBRID))))
    monkeypatch.setattr(weights, "KERNEL_PARAMETERS", weights.KERNEL_PARAMETERS - {"log_decay"})
    assert "log_decay" in str(why_unsupported(tiny_model(llama_config(PURE))))
