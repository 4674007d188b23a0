"""Our models in transformers answer as the engine does, whatever the batch, the padding and the way of the tokens."""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, DynamicCache, pipeline

from dijiang_model.checkpoints.checkpoint import load_model
from dijiang_model.conversion.quantize import quantize_folder
from dijiang_model.errors import ModelError
from dijiang_model.hf.cache import RecurrentCache
from dijiang_model.hf.config import DiJiangConfig
from dijiang_model.hf.model import DiJiangLM
from dijiang_model.quantization.config import Quantization
from dijiang_model.serving.network import freeze
from tests.dijiang_model.hf.conftest import CONFIGS, load
from tests.dijiang_model.stepping import Stepper, assert_close_in_norm, random_text

TOLERANCE = 1e-5
"""Of the logits' norm: the compiled kernels add up in another order."""


def tokens(count: int, *, seed: int = 1) -> Tensor:
    return torch.randint(0, 250, (1, count), generator=torch.Generator().manual_seed(seed))


def greedy(model: DiJiangLM, prompt: Tensor, count: int, **options: object) -> Tensor:
    found: Tensor = model.generate(prompt, max_new_tokens=count, do_sample=False, eos_token_id=-1, **options)
    return found


def engine_greedy(folder: Path, prompt: list[int], count: int) -> tuple[Tensor, list[int]]:
    """The prompt's logits and the tokens behind it as an engine computes them, in the compiled kernels if it can."""
    stepper = Stepper(freeze(load_model(folder))).open(1)
    scored = logits = stepper.step({1: prompt})[1]
    output: list[int] = []
    for _ in range(count):
        output.append(int(logits[-1].argmax()))
        logits = stepper.step(decode={1: output[-1]})[1]
    return scored, output


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_and_200_greedy_tokens_are_the_engines(name: str, folders: dict[str, Path]) -> None:
    model, text = load(folders[name]), random_text(60)
    scored, ids = engine_greedy(folders[name], text, 200)
    with torch.no_grad():
        assert torch.equal(model(torch.tensor([text])).logits[0], scored)
    assert greedy(model, torch.tensor([text]), 200)[0, len(text) :].tolist() == ids


@pytest.mark.parametrize("name", ["llama", "gemma3", "opt"])
def test_what_is_trained_is_what_is_generated_with(name: str, folders: dict[str, Path]) -> None:
    model, text = load(folders[name]), torch.tensor([random_text(40)])
    trained = model(text).logits
    assert trained.requires_grad
    with torch.no_grad():
        assert_close_in_norm(model(text).logits, trained.detach(), tolerance=TOLERANCE)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_text_in_one_piece_and_through_the_cache_has_the_same_logits(name: str, folders: dict[str, Path]) -> None:
    model, text = load(folders[name]), tokens(50)
    with torch.no_grad():
        whole = model(text).logits
        first = model(text[:, :31], use_cache=True)
        rest = [model(text[:, i : i + 1], past_key_values=first.past_key_values).logits for i in range(31, 50)]
    assert_close_in_norm(torch.cat([first.logits, *rest], dim=1), whole, tolerance=TOLERANCE)
    assert first.past_key_values.get_seq_length() == 50


def test_rows_padded_on_the_left_are_those_without_padding(folder: Path) -> None:
    model = load(folder)
    texts = [tokens(count, seed=count)[0] for count in (23, 7, 1)]
    batch = torch.stack([torch.nn.functional.pad(text, (23 - len(text), 0), value=256) for text in texts])
    mask = (batch != 256).long()
    together = greedy(model, batch, 40, attention_mask=mask)
    for row, text in enumerate(texts):
        assert together[row, 23:].tolist() == greedy(model, text[None], 40)[0, len(text) :].tolist()
    with torch.no_grad():
        logits = model(batch, attention_mask=mask).logits
    assert not logits[1, :16].any()
    with torch.no_grad():
        assert_close_in_norm(logits[1, 16:], model(texts[1][None]).logits[0], tolerance=TOLERANCE)


def test_a_row_of_nothing_but_padding_begins_later(folder: Path) -> None:
    model, text = load(folder), tokens(9)
    batch = torch.cat([text, torch.full_like(text, 256)])
    mask = torch.tensor([[1] * 9, [0] * 9])
    with torch.no_grad():
        first = model(batch, attention_mask=mask, use_cache=True)
        later = model(
            text.repeat(2, 1),
            attention_mask=torch.cat([mask, torch.ones_like(mask)], 1),
            past_key_values=first.past_key_values,
        )
        assert_close_in_norm(later.logits[1], model(text).logits[0], tolerance=TOLERANCE)


def test_sampling_repeats_with_its_seed_and_several_answers_are_given(folder: Path) -> None:
    model = load(folder)

    def sampled() -> Tensor:
        torch.manual_seed(5)
        found: Tensor = model.generate(tokens(8), max_new_tokens=20, do_sample=True, num_return_sequences=3)
        return found

    assert torch.equal(sampled(), sampled())
    assert len({tuple(row) for row in sampled().tolist()}) == 3


def test_generation_goes_on_from_a_cache_and_a_copy_of_it_stays_behind(folder: Path) -> None:
    model, text = load(folder), tokens(12)
    begun = model.generate(text, max_new_tokens=10, do_sample=False, return_dict_in_generate=True)
    kept = copy.deepcopy(begun.past_key_values)
    longer = torch.cat([begun.sequences, tokens(5, seed=2)], dim=1)
    expected = greedy(model, longer, 15)
    assert torch.equal(greedy(model, longer, 15, past_key_values=begun.past_key_values), expected)
    assert kept.get_seq_length() < begun.past_key_values.get_seq_length()
    assert torch.equal(greedy(model, longer, 15, past_key_values=kept), expected)


def test_rows_of_a_cache_are_chosen_repeated_and_forgotten(folder: Path) -> None:
    model, batch = load(folder), torch.cat([tokens(6, seed=seed) for seed in (1, 2)])
    with torch.no_grad():
        cache: RecurrentCache = model(batch, use_cache=True).past_key_values
        cache.batch_select_indices(torch.tensor([1, 1, 0]))
        found = model(torch.tensor([[3], [3], [3]]), past_key_values=cache).logits
        expected = model(torch.cat([batch[[1, 1, 0]], torch.tensor([[3], [3], [3]])], 1)).logits[:, -1:]
        assert_close_in_norm(found, expected, tolerance=TOLERANCE)
        cache.batch_repeat_interleave(2)
        assert cache.batch_size == 6
        cache.reset()
        assert_close_in_norm(
            model(batch[[0] * 6], past_key_values=cache).logits, model(batch[[0] * 6]).logits, tolerance=TOLERANCE
        )


def test_only_wanted_columns_get_logits(folder: Path) -> None:
    model, text = load(folder), tokens(10)
    with torch.no_grad():
        whole = model(text).logits
        assert_close_in_norm(model(text, logits_to_keep=3).logits, whole[:, -3:], tolerance=TOLERANCE)
        chosen = model(text, logits_to_keep=torch.tensor([1, 4])).logits
    assert_close_in_norm(chosen, whole[:, [1, 4]], tolerance=TOLERANCE)


def test_answers_end_where_the_model_says(folder: Path) -> None:
    model = load(folder)
    assert model.generation_config.eos_token_id == [258]
    unending = greedy(model, tokens(8), 60)[0, 8:].tolist()
    model.generation_config.eos_token_id = [258, unending[20]]
    found = model.generate(tokens(8), max_new_tokens=60, do_sample=False)[0, 8:].tolist()
    assert found == unending[: unending.index(unending[20]) + 1]


def test_the_pipeline_generates_text_and_answers_chats(folder: Path) -> None:
    generator = pipeline("text-generation", model=str(folder))
    text = generator("hello", max_new_tokens=8, do_sample=False, return_full_text=False)[0]["generated_text"]
    ids = greedy(load(folder), torch.tensor([list(b"hello")]), 8)[0, 5:]
    assert text == AutoTokenizer.from_pretrained(folder).decode(ids, skip_special_tokens=True)
    chat = generator([{"role": "user", "content": "hi"}], max_new_tokens=4)[0]["generated_text"]
    assert chat[-1]["role"] == "assistant"


def test_the_config_has_the_names_that_others_read(folder: Path) -> None:
    config = AutoConfig.from_pretrained(folder)
    assert isinstance(config, DiJiangConfig)
    assert (config.hidden_size, config.vocab_size, config.num_hidden_layers, config.eos_token_id) == (64, 260, 2, [258])
    assert config.stored.config == CONFIGS["llama"]


def test_weights_are_loaded_in_other_dtypes_and_cast_in_no_other_way(folder: Path) -> None:
    model = load(folder, dtype="bfloat16")
    assert model.dtype == torch.bfloat16
    assert next(iter(model.network.attentions)).linear.log_decay.dtype == torch.float32
    with torch.no_grad():
        close = model(tokens(20)).logits
        assert_close_in_norm(close, load(folder)(tokens(20)).logits, tolerance=0.05)
    with pytest.raises(ValueError, match="dtype='float32'"):
        model.to(torch.float32)
    with pytest.raises(ValueError, match="load them anew"):
        model.half()
    assert model.to("cpu").to(torch.bfloat16) is model


def test_quantized_weights_answer_as_in_the_engine(tmp_path: Path, folder: Path) -> None:
    quantize_folder(folder, tmp_path / "int8", kind="int8")
    model, text = load(tmp_path / "int8"), random_text(30)
    assert isinstance(model.network.quantization, Quantization)
    assert greedy(model, torch.tensor([text]), 30)[0, 30:].tolist() == engine_greedy(tmp_path / "int8", text, 30)[1]
    with pytest.raises(ValueError, match="int8 weights cannot be trained"):
        model.train()(tokens(5), labels=tokens(5))


def test_states_can_be_narrow(folder: Path) -> None:
    model = load(folder, state_dtype=torch.int8)
    cache = model(tokens(9), use_cache=True).past_key_values
    assert cache.states.tensors["layers.0.near_keys"].dtype == torch.int8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 2}, "beam_search is not supported"),
        ({"inputs_embeds": torch.zeros(1, 3, 64)}, "inputs_embeds"),
        ({"prompt_lookup_num_tokens": 2}, "assisted_generation is not supported"),
        ({"past_key_values": DynamicCache()}, "past_key_values is a DynamicCache"),
    ],
)
def test_what_a_recurrent_state_cannot_do_is_refused(folder: Path, options: dict[str, object], message: str) -> None:
    model = load(folder)
    with pytest.raises(ValueError, match=message):
        model.generate(None if "inputs_embeds" in options else tokens(6), max_new_tokens=3, **options)


def test_arguments_that_contradict_the_batch_are_refused(folder: Path) -> None:
    model, text = load(folder), tokens(6)
    cache = model(text, use_cache=True).past_key_values
    for arguments, message in (
        ({"attention_mask": torch.ones(1, 5)}, r"has the shape \[1, 5\], must be \[1, 6\]"),
        ({"position_ids": torch.tensor([[0, 1, 2, 0, 1, 2]])}, "position_ids must count"),
        ({"past_key_values": cache, "attention_mask": torch.tensor([[0, *[1] * 11]])}, "calls other tokens padding"),
        ({"output_hidden_states": True}, "hidden states are not given out"),
    ):
        with pytest.raises(ValueError, match=message):
            model(text, **arguments)
    with pytest.raises(ValueError, match="input_ids has 2 rows, past_key_values 1"):
        model(text.repeat(2, 1), past_key_values=cache)
    with pytest.raises(ValueError, match="cannot be cropped"):
        cache.crop(1)
    with pytest.raises(ValueError, match="260 tokens and stays so"):
        model.resize_token_embeddings(300)


def test_what_cannot_be_loaded_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"does not take load_in_8bit; `dijiang quantize`"):
        load(folder, load_in_8bit=True)
    with pytest.raises(ValueError, match="names 2 devices"):
        load(folder, device_map={"a": "cpu", "b": "cuda"})
    assert load(folder, device_map="cpu", trust_remote_code=True, revision="main").device.type == "cpu"
    with pytest.raises(ValueError, match="a configuration has no weights"):
        DiJiangLM(AutoConfig.from_pretrained(folder))
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(ModelError, match=r"neither model\.safetensors"):
        load(broken)


def test_changed_wrapped_and_watched_weights_are_those_that_are_used(folder: Path) -> None:
    model, text = load(folder), tokens(20)

    @torch.no_grad()
    def both() -> tuple[Tensor, Tensor]:
        """Through the states and, as it has gradients, without them."""
        stepped = model(text).logits
        with torch.enable_grad():
            return stepped, model(text).logits.detach()

    assert model.steps.decoder() is not None, "the compiled kernels run it"
    before, _ = both()
    projection = model.model.layers[0].self_attn.q_proj
    with torch.no_grad():
        projection.weight.mul_(1.5)
        model.model.norm.weight.add_(0.5)
    changed, expected = both()
    assert_close_in_norm(changed, expected, tolerance=TOLERANCE)
    assert (changed - before).norm() > 0.01 * before.norm()
    twin = copy.deepcopy(model)
    handle = projection.register_forward_hook(lambda module, arguments, output: output * 0)
    assert model.steps.decoder() is None
    hooked, expected = both()
    assert_close_in_norm(hooked, expected, tolerance=TOLERANCE)
    assert (hooked - changed).norm() > 1e-3 * changed.norm()
    handle.remove()
    assert torch.equal(both()[0], changed)
    with torch.no_grad():
        projection.weight.zero_()
        assert torch.equal(twin(text).logits, changed), "a copy has weights of its own"
