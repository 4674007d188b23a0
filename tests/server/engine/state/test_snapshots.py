"""States beyond their slots, on real tiny models: saved, gone on from, cached; and what goes wrong with one alone."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dijiang_model.serving.network import FrozenModel
from server.engine.loading import PoolAccess
from server.engine.state.pool import StatePool
from server.engine.state.prefix_disk import PrefixDisk
from server.engine.state.snapshot_files import read_snapshot
from server.engine.state.snapshots import CachePolicy
from server.engine.types.requests import FinishReason
from server.engine.types.state import StateOptions
from tests.server.engine.state.snapshot_bench import PROMPT, Bench, ask
from tests.tiny_models import gpt_neox_config, llama_config, opt_config, tiny_network

MODELS = {"hybrid llama": llama_config(), "released gpt_neox": gpt_neox_config(), "hybrid opt": opt_config()}


@pytest.fixture(scope="module", params=list(MODELS))
def model(request: pytest.FixtureRequest) -> FrozenModel:
    return tiny_network(MODELS[request.param])


@pytest.fixture(scope="module")
def hybrid() -> FrozenModel:
    return tiny_network()


@pytest.fixture
def bench(hybrid: FrozenModel, tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(hybrid, tmp_path)
    yield bench
    bench.snapshots.close()


SAVE = StateOptions(save_to="a.safetensors")
LOAD = StateOptions(load_from="a.safetensors")


@pytest.mark.parametrize("num_ahead", [0, 1])
def test_a_saved_conversation_goes_on_as_if_it_had_not_stopped(
    model: FrozenModel, tmp_path: Path, num_ahead: int
) -> None:
    whole = Bench(model, tmp_path, num_ahead=num_ahead).one(*PROMPT, max_tokens=30)
    first = Bench(model, tmp_path, num_ahead=num_ahead).one(*PROMPT, states=SAVE)
    assert first.saved is not None
    assert first.saved.position + len(first.saved.pending) == len(PROMPT) + 12
    # Another engine, as after a restart; the last token of the first half was never fed and comes first.
    second = Bench(model, tmp_path, num_ahead=num_ahead).one(states=LOAD, max_tokens=18)
    assert first.tokens + second.tokens == whole.tokens


def test_new_tokens_after_a_saved_state_count_alone_and_go_on_exactly(model: FrozenModel, tmp_path: Path) -> None:
    bench = Bench(model, tmp_path)
    first = bench.one(*PROMPT, states=SAVE)
    before = bench.engine.stats.num_prefill_tokens
    second = bench.one(7, 8, 9, states=LOAD)
    assert bench.engine.stats.num_prefill_tokens - before == 1 + 3
    undisturbed = Bench(model, tmp_path).one(*PROMPT, *first.tokens, 7, 8, 9)
    assert second.tokens == undisturbed.tokens


def test_the_file_holds_exactly_what_the_slot_held(bench: Bench, tmp_path: Path) -> None:
    bench.one(*PROMPT, max_tokens=1, states=replace(SAVE, prompt_only=True, note="hello"))
    saved = read_snapshot(tmp_path / "a.safetensors", bench.layout)
    assert (saved.position, saved.pending, saved.last_token, saved.note) == (len(PROMPT), (), PROMPT[-1], "hello")
    direct = Bench(tiny_network(), tmp_path)
    direct.engine.add(ask("x", *PROMPT, max_tokens=2))
    while direct.engine.stats.num_decode_tokens == 0 and direct.engine.stats.num_prefill_tokens < len(PROMPT):
        direct.engine.step()
    row = next(row for row in direct.pool.buffer.storage[1:] if row.any())
    assert torch.equal(row, torch.from_numpy(saved.row))


def test_one_state_may_be_gone_on_from_many_times_at_once(bench: Bench) -> None:
    bench.one(*PROMPT, states=SAVE)
    alone = bench.one(5, states=LOAD)
    together = bench.run(*(ask(str(number), 5, states=LOAD) for number in range(6)))
    assert all(result.tokens == alone.tokens for result in together.values())


def test_an_end_of_sequence_token_is_pending_or_fed_but_never_lost(hybrid: FrozenModel, tmp_path: Path) -> None:
    plain = Bench(hybrid, tmp_path).one(*PROMPT)
    stop = plain.tokens[5]
    expected = plain.tokens[: plain.tokens.index(stop) + 1]
    for num_ahead in (0, 1):
        bench = Bench(hybrid, tmp_path, num_ahead=num_ahead)
        ended = bench.one(*PROMPT, stop_token_ids=(stop,), states=SAVE)
        assert (ended.tokens, ended.reason) == (expected, FinishReason.STOP)
        assert ended.saved is not None
        assert ended.saved.position + len(ended.saved.pending) == len(PROMPT) + len(expected)
        went_on = bench.one(3, 4, states=LOAD)
        assert went_on.tokens == Bench(hybrid, tmp_path).one(*PROMPT, *expected, 3, 4).tokens


def test_a_state_of_another_model_ends_that_request_alone(hybrid: FrozenModel, tmp_path: Path) -> None:
    Bench(hybrid, tmp_path, fingerprint="dj-other").one(*PROMPT, states=SAVE)
    bench = Bench(hybrid, tmp_path)
    results = bench.run(ask("bad", 5, states=LOAD), ask("good", *PROMPT))
    assert results["bad"].reason is FinishReason.ERROR
    assert results["bad"].error is not None
    assert results["bad"].error.code == "state_of_another_model"
    assert results["good"].tokens == Bench(hybrid, tmp_path).one(*PROMPT).tokens


@pytest.mark.parametrize("name", ["missing.safetensors", "../a.safetensors", "/etc/passwd", "a", ""])
def test_files_that_are_not_there_end_the_request_cleanly(bench: Bench, name: str) -> None:
    result = bench.one(5, states=StateOptions(load_from=name))
    assert result.reason is FinishReason.ERROR
    assert result.error is not None
    assert result.error.code in ("state_not_found", "state_invalid")


def test_a_damaged_file_is_refused(bench: Bench, tmp_path: Path) -> None:
    bench.one(*PROMPT, states=SAVE)
    path = tmp_path / "a.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    result = bench.one(5, states=LOAD)
    assert result.error is not None
    assert result.error.code == "state_invalid"


def test_a_state_without_a_place_to_go_is_an_error_and_its_answer_is_none(bench: Bench, tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").mkdir()
    result = bench.one(*PROMPT, states=SAVE)
    assert (result.error, result.saved) == (None, None)
    assert result.save_error is not None
    assert result.save_error.code == "state_not_saved"
    assert result.tokens


def test_a_server_without_a_folder_says_so(hybrid: FrozenModel, tmp_path: Path) -> None:
    bench = Bench(hybrid, tmp_path)
    bench.snapshots._folder = None
    for states in (LOAD, SAVE):
        result = bench.one(5, states=states)
        assert result.error is not None
        assert result.error.code == "states_unavailable"


def test_an_aborted_request_leaves_no_file(bench: Bench, tmp_path: Path) -> None:
    bench.engine.add(ask("x", *PROMPT, max_tokens=1, states=SAVE))
    while not bench.snapshots.owns("x"):
        bench.engine.step()
    event = bench.engine.abort("x")
    assert event is not None
    assert event.finish_reason is FinishReason.ABORT
    assert not bench.engine.has_work
    bench.snapshots.close()
    assert [*tmp_path.iterdir()] == []


def test_a_request_may_be_aborted_while_its_state_is_read(bench: Bench) -> None:
    bench.one(*PROMPT, states=SAVE)
    bench.engine.add(ask("x", 5, states=LOAD))
    event = bench.engine.abort("x")
    assert event is not None
    assert event.finish_reason is FinishReason.ABORT
    assert not bench.engine.has_work
    assert bench.one(5, states=LOAD).reason is FinishReason.LENGTH


def test_one_id_is_one_request_also_while_it_waits_for_a_file(bench: Bench) -> None:
    bench.one(*PROMPT, states=SAVE)
    bench.engine.add(ask("x", 5, states=LOAD))
    with pytest.raises(ValueError, match="already in the engine"):
        bench.engine.add(ask("x", 5))


def test_a_long_answer_is_saved_exactly_though_its_tokens_are_forgotten(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = bench.one(*PROMPT, max_tokens=60)
    monkeypatch.setattr("server.engine.sequence.MAX_OUTPUTS_KEPT", 8)
    first = bench.one(*PROMPT, max_tokens=40, states=replace(SAVE, cache_namespace="me"))
    assert first.saved is not None
    assert first.saved.pending == (first.tokens[-1],)
    assert first.tokens + bench.one(states=LOAD, max_tokens=20).tokens == whole.tokens
    assert bench.cache.stats.num_entries == 1, "the prompt alone"


CACHED = StateOptions(cache_namespace="me")


@pytest.mark.parametrize("num_ahead", [0, 1])
def test_the_same_prompt_again_costs_one_token_and_says_the_same(
    model: FrozenModel, tmp_path: Path, num_ahead: int
) -> None:
    bench = Bench(model, tmp_path, num_ahead=num_ahead)
    first = bench.one(*PROMPT, states=CACHED)
    before = bench.engine.stats.num_prefill_tokens
    again = bench.one(*PROMPT, states=CACHED)
    assert (first.num_cached, again.num_cached) == (0, len(PROMPT) - 1)
    assert bench.engine.stats.num_prefill_tokens - before == 1
    assert again.tokens == first.tokens
    assert again.tokens == bench.one(*PROMPT).tokens, "with and without the cache"


@pytest.mark.parametrize("num_ahead", [0, 1])
def test_answers_of_one_group_share_a_prefix_and_save_their_own_ends(
    model: FrozenModel, tmp_path: Path, num_ahead: int
) -> None:
    bench = Bench(model, tmp_path, num_ahead=num_ahead)
    for _ in range(2):  # the second time from the cache
        requests = [
            replace(
                ask(
                    str(number),
                    *PROMPT,
                    temperature=1.0,
                    seed=number,
                    states=replace(CACHED, save_to=f"{number}.safetensors"),
                ),
                group="all",
            )
            for number in range(6)
        ]
        results = bench.run(*requests)
        for number, result in enumerate(results.values()):
            alone = Bench(model, tmp_path).one(*PROMPT, temperature=1.0, seed=number)
            assert result.tokens == alone.tokens
            went_on = bench.one(9, states=StateOptions(load_from=f"{number}.safetensors"))
            assert went_on.tokens == Bench(model, tmp_path).one(*PROMPT, *result.tokens, 9).tokens


@pytest.mark.parametrize("num_ahead", [0, 1])
def test_the_next_turn_begins_where_the_last_answer_ended(model: FrozenModel, tmp_path: Path, num_ahead: int) -> None:
    bench = Bench(model, tmp_path, num_ahead=num_ahead)
    first = bench.one(*PROMPT, states=CACHED)
    next_prompt = (*PROMPT, *first.tokens, 1, 2, 3)
    second = bench.one(*next_prompt, states=CACHED)
    assert second.num_cached == len(PROMPT) + len(first.tokens) - 1
    assert second.tokens == bench.one(*next_prompt).tokens


def test_prompts_that_share_a_named_prefix_share_its_state(bench: Bench) -> None:
    system = PROMPT[:20]
    states = replace(CACHED, cache_points=(20,))
    bench.one(*system, 1, 2, 3, 4, states=states)
    other = bench.one(*system, 9, 8, 7, states=states)
    assert other.num_cached == 20
    assert other.tokens == bench.one(*system, 9, 8, 7).tokens


def test_spacing_leaves_states_along_a_long_prompt(hybrid: FrozenModel, tmp_path: Path) -> None:
    bench = Bench(hybrid, tmp_path, policy=CachePolicy(min_tokens=4, spacing=10))
    bench.one(*PROMPT, states=CACHED)
    assert bench.one(*PROMPT[:37], 1, states=CACHED).num_cached == 30


def test_namespaces_keep_apart_and_none_keeps_out(bench: Bench) -> None:
    bench.one(*PROMPT, states=CACHED)
    assert bench.one(*PROMPT, states=StateOptions(cache_namespace="you")).num_cached == 0
    lookups = bench.cache.stats.num_lookups
    assert bench.one(*PROMPT).num_cached == 0
    assert bench.cache.stats.num_lookups == lookups


def test_short_prompts_are_not_worth_an_entry(hybrid: FrozenModel, tmp_path: Path) -> None:
    bench = Bench(hybrid, tmp_path, policy=CachePolicy(min_tokens=100))
    bench.one(*PROMPT, states=CACHED)
    assert bench.cache.stats.num_entries == 0


def test_prefixes_come_back_from_the_disk(hybrid: FrozenModel, tmp_path: Path) -> None:
    plain = Bench(hybrid, tmp_path)
    bench = Bench(hybrid, tmp_path, cache_bytes=2 * (plain.pool.bytes_per_slot + 4 * 200), disk=tmp_path / "prefixes")
    prompts = [(number, *PROMPT) for number in range(5)]
    firsts = [bench.one(*prompt, states=CACHED) for prompt in prompts]
    assert bench.disk is not None
    bench.disk.wait()
    for prompt, first in zip(prompts, firsts, strict=True):
        again = bench.one(*prompt, states=CACHED)
        assert again.num_cached == len(prompt) - 1
        assert again.tokens == first.tokens == plain.one(*prompt).tokens
    # All at once they push each other out again: some are computed once more, and all are right.
    together = bench.run(*(ask(str(prompt[0]), *prompt, states=CACHED) for prompt in prompts))
    assert [result.tokens for result in together.values()] == [first.tokens for first in firsts]


def test_a_damaged_file_of_the_cache_is_a_miss(hybrid: FrozenModel, tmp_path: Path) -> None:
    access = PoolAccess(StatePool(hybrid.state_spec, 2))
    disk = PrefixDisk(access, tmp_path / "prefixes")
    digest = disk.write(7, access.take(1)).result()
    assert torch.equal(disk.read(7, digest).result(), access.take(1))
    (tmp_path / "prefixes" / "7.prefix").write_bytes(b"something else")
    assert isinstance(disk.read(7, digest).exception(), ValueError)
    disk.remove(7)
    disk.wait()
    disk.close()
    assert [*(tmp_path / "prefixes").iterdir()] == []
    (tmp_path / "prefixes" / "3.prefix").write_bytes(b"left by a crash")
    PrefixDisk(access, tmp_path / "prefixes").close()
    assert [*(tmp_path / "prefixes").iterdir()] == []


def test_a_prompt_after_a_state_is_cached_under_that_state(bench: Bench) -> None:
    bench.one(*PROMPT, states=SAVE)
    states = replace(LOAD, cache_namespace="me after a")
    question = tuple(range(10, 30))
    first = bench.one(*question, states=states)
    again = bench.one(*question, states=states)
    assert (first.num_cached, again.num_cached) == (0, len(question))  # and the pending token before it, but the last
    assert again.tokens == first.tokens


def test_nan_in_a_state_ends_its_request_and_is_neither_cached_nor_saved(bench: Bench, tmp_path: Path) -> None:
    bench.engine.add(ask("bad", *PROMPT, max_tokens=50, states=replace(SAVE, cache_namespace="me")))
    events = []
    while bench.engine.stats.num_decode_tokens < 3:
        events += bench.engine.step()
    bench.pool.buffer.tensors["layers.0.linear_state"][1].fill_(float("nan"))
    while bench.engine.has_work:
        events += bench.engine.step()
    assert events[-1].finish_reason is FinishReason.ERROR
    assert [*tmp_path.iterdir()] == []
    assert bench.cache.stats.num_entries == 0
    assert bench.one(*PROMPT, states=CACHED).reason is FinishReason.LENGTH


def test_slots_are_clear_after_states_came_and_went(bench: Bench) -> None:
    bench.one(*PROMPT, states=replace(SAVE, cache_namespace="me"))
    bench.one(5, states=LOAD)
    bench.one(*PROMPT, 5, states=CACHED)
    assert not bench.pool.buffer.storage[1:].any()


def test_company_does_not_change_cached_and_loaded_answers(bench: Bench) -> None:
    first = bench.one(*PROMPT, states=replace(SAVE, cache_namespace="me"))
    alone = {
        "loaded": bench.one(5, states=LOAD).tokens,
        "cached": bench.one(*PROMPT, *first.tokens, 4, states=CACHED).tokens,
        "plain": bench.one(*PROMPT[3:]).tokens,
    }
    together = bench.run(
        ask("plain", *PROMPT[3:]),
        ask("loaded", 5, states=LOAD),
        ask("cached", *PROMPT, *first.tokens, 4, states=CACHED),
    )
    assert {name: result.tokens for name, result in together.items()} == alone
