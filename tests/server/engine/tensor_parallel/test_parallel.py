"""An engine over several processes: a client gets what one process gives, and every death is an engine's death."""

import asyncio
import signal
import tempfile
from collections.abc import AsyncIterator, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from dijiang_model.errors import ModelError
from server.engine.engine import Engine
from server.engine.failures import EXIT_LOAD_FAILED, EXIT_STEP_FAILED
from server.engine.process.main import load_engine
from server.engine.tensor_parallel.assemble import load_parallel_engine
from server.engine.tensor_parallel.ranks import EXIT_RANK_DIED
from server.engine.types.logprobs import LogprobOptions
from server.engine.types.requests import EngineConfig, FinishReason, GenerationRequest, SamplingParams, TokenEvent
from server.engine.types.state import SavedState, StateOptions
from server.engine_client.client import EngineClient
from server.errors import EngineUnavailableError
from tests.server.engine.some_requests import make_request, mixed_requests
from tests.tiny_models import gpt_neox_config, llama_config, random_tensors, write_tiny_model
from tests.waiting import until_async

pytestmark = pytest.mark.anyio

SAME_LOGPROB = 2e-4
"""fp32 sums in another order, over two layers and a head."""
RELEASED_SIX_HEADS = replace(gpt_neox_config(), num_heads=6, num_kv_heads=6, hidden_size=96)
"""Over three ranks its GroupNorm's groups end within a rank's channels."""


@dataclass
class Answer:
    """What one request got."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    prompt_logprobs: list[float] = field(default_factory=list)
    num_cached: int = 0
    reason: FinishReason | None = None
    saved: SavedState | None = None
    error_code: str | None = None

    def take(self, event: TokenEvent) -> None:
        self.tokens += event.token_ids
        for rows, table in ((self.logprobs, event.logprobs), (self.prompt_logprobs, event.prompt_logprobs)):
            if table is not None:
                rows += [value for row in table.rows() for value in row.values]
        self.num_cached += event.num_cached_tokens
        self.reason, self.saved = event.finish_reason, event.saved
        self.error_code = None if event.error is None else event.error.code


def config_of(folder: Path, **changes: object) -> EngineConfig:
    base = EngineConfig(
        model_path=str(folder / "model"),
        device="cpu",
        weights_dtype="float32",
        num_threads=1,
        state_memory_bytes=2**20,
        max_num_slots=4,
        max_step_tokens=16,
        max_waiting=100,
        states_folder=str(folder),
        prefix_cache_host_bytes=2**22,
        prefix_cache_min_tokens=4,
    )
    return replace(base, **changes)  # type: ignore[arg-type]


def alone(engine: Engine, requests: Iterable[GenerationRequest]) -> dict[str, Answer]:
    """The answers of an engine of one process."""
    answers = {}
    for request in requests:
        answers[request.request_id] = Answer()
        assert engine.add(request) is None
    while engine.has_work:
        for event in engine.step():
            answers[event.request_id].take(event)
    return answers


async def ask(client: EngineClient, request: GenerationRequest) -> Answer:
    answer = Answer()
    async with client.submit(request) as stream:
        async for event in stream:
            answer.take(event)
    return answer


async def together(client: EngineClient, requests: Iterable[GenerationRequest]) -> dict[str, Answer]:
    requests = list(requests)
    answers = await asyncio.gather(*(ask(client, request) for request in requests))
    return {request.request_id: answer for request, answer in zip(requests, answers, strict=True)}


def ranks_of(client: EngineClient) -> list[psutil.Process]:
    assert client.pid is not None
    return psutil.Process(client.pid).children()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parallel")
    write_tiny_model(folder / "model", with_tokenizer=False)
    return folder


@pytest.fixture(scope="module")
def single(folder: Path) -> Engine:
    threads = torch.get_num_threads()
    engine = load_engine(config_of(folder))
    torch.set_num_threads(threads)
    return engine


def contents(folder: Path) -> set[Path]:
    return {*folder.iterdir()}


def rank_folders(temporary: Path) -> list[Path]:
    return list(temporary.glob("*/dijiang-ranks-*"))


@pytest.fixture(scope="module")
def temporary() -> Iterator[Path]:
    """Where the engine processes put what goes with them; a short name, for it is part of the names of sockets."""
    with tempfile.TemporaryDirectory(prefix="dj") as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", folder)
        patch.setattr(tempfile, "tempdir", folder)
        yield Path(folder)


@pytest.fixture(scope="module")
async def pair(folder: Path, temporary: Path) -> AsyncIterator[EngineClient]:
    """A client of an engine over two processes; what kills one of them waits until it is ready again."""
    client = EngineClient(config_of(folder, tensor_parallel=2))
    await client.start()
    try:
        await client.wait_ready()
        yield client
    finally:
        await client.close()


async def test_tokens_are_those_of_one_process(pair: EngineClient, single: Engine) -> None:
    requests = mixed_requests(10)  # greedy ones, and sampled ones with seeds and every filter
    found, wanted = await together(pair, requests), alone(single, requests)
    assert {name: answer.tokens for name, answer in found.items()} == {
        name: answer.tokens for name, answer in wanted.items()
    }


async def test_logprobs_of_prompts_and_answers_are_those_of_one_process(pair: EngineClient, single: Engine) -> None:
    request = replace(make_request("scored", 60, seed=5), logprobs=LogprobOptions(num_output=5, num_prompt=5))
    found, wanted = await ask(pair, request), alone(single, [request])["scored"]
    assert len(found.prompt_logprobs) == len(wanted.prompt_logprobs) >= 59 * 5
    assert found.prompt_logprobs == pytest.approx(wanted.prompt_logprobs, abs=SAME_LOGPROB)
    assert found.logprobs == pytest.approx(wanted.logprobs, abs=SAME_LOGPROB)
    assert found.tokens == wanted.tokens


async def test_each_rank_holds_half_of_every_state(pair: EngineClient, single: Engine) -> None:
    info = await pair.wait_ready()
    assert info.num_ranks == 2
    assert info.state_bytes_per_rank * 2 == info.state_bytes_per_slot
    assert replace(info, num_ranks=1, state_bytes_per_rank=info.state_bytes_per_slot, load_s=0.0) == replace(
        single.info, load_s=0.0, max_drafts=0, steps="torch", kernels=""
    ), "capacity, parameters, fingerprint and the layout of saved states are those of the whole model"
    assert len(ranks_of(pair)) == 1


@pytest.mark.parametrize("saved_by", ["two ranks", "one process"])
async def test_a_saved_state_goes_on_under_another_number_of_ranks(
    pair: EngineClient, single: Engine, folder: Path, saved_by: str
) -> None:
    file, other = f"{saved_by.split()[0]}.safetensors", f"{saved_by.split()[0]}-again.safetensors"
    whole = make_request("whole", 40, seed=7, max_tokens=12)
    wanted = alone(single, [whole])["whole"].tokens
    begin = replace(whole, sampling=replace(whole.sampling, max_tokens=5), states=StateOptions(save_to=file))
    rest = GenerationRequest(
        "rest", (), replace(whole.sampling, max_tokens=7), states=StateOptions(load_from=file, save_to=other)
    )
    if saved_by == "two ranks":
        first, second = await ask(pair, begin), alone(single, [rest])["rest"]
    else:
        first, second = alone(single, [begin])["whole"], await ask(pair, rest)
    assert first.saved is not None
    assert first.tokens + second.tokens == wanted
    again = replace(rest, states=StateOptions(load_from=file, save_to=f"x-{other}"))
    same = await ask(pair, again) if saved_by == "two ranks" else alone(single, [again])["rest"]
    assert same.tokens == second.tokens, "the ranks read what they have written themselves, too"
    left, right = load_file(folder / other), load_file(folder / f"x-{other}")
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        torch.testing.assert_close(tensor, right[name], rtol=0, atol=1e-4)


async def test_a_cached_prefix_is_found_and_changes_no_token(pair: EngineClient) -> None:
    request = replace(make_request("first", 40, seed=11), states=StateOptions(cache_namespace="a"))
    first = await ask(pair, request)
    second = await ask(pair, replace(request, request_id="second"))
    assert (first.num_cached, second.num_cached) == (0, 39)
    assert second.tokens == first.tokens


async def test_answers_of_one_prompt_share_its_state(pair: EngineClient, single: Engine) -> None:
    requests = [
        replace(make_request("n", 30, seed=3, temperature=1.0), request_id=f"n{number}", group="g")
        for number in range(3)
    ]
    requests = [replace(one, sampling=replace(one.sampling, seed=number)) for number, one in enumerate(requests)]
    found, wanted = await together(pair, requests), alone(single, requests)
    assert [found[name].tokens for name in wanted] == [answer.tokens for answer in wanted.values()]


async def test_an_abort_frees_the_slot_and_leaves_nothing_behind(pair: EngineClient, single: Engine) -> None:
    endless = replace(make_request("endless", 30), sampling=SamplingParams(temperature=0.0, ignore_eos=True))
    async with pair.submit(endless) as stream:
        await anext(stream)
    after = make_request("after", 21, seed=2)
    assert (await ask(pair, after)).tokens == alone(single, [after])["after"].tokens
    await until_async(lambda: pair.stats is not None and pair.stats.num_free_slots == 4)


async def test_the_death_of_a_rank_restarts_the_engine(pair: EngineClient, single: Engine, temporary: Path) -> None:
    endless = replace(make_request("endless", 30), sampling=SamplingParams(temperature=0.0, ignore_eos=True))
    engine, (worker,) = pair.pid, ranks_of(pair)
    restarts = pair.num_restarts
    async with pair.submit(endless) as stream:
        await anext(stream)
        worker.send_signal(signal.SIGKILL)
        events = [event async for event in stream]
    assert events[-1].finish_reason is FinishReason.ERROR
    assert events[-1].error is not None
    assert events[-1].error.code == "engine_restarting"
    with pytest.raises(EngineUnavailableError):
        await ask(pair, make_request("too early", 3))
    await pair.wait_ready()
    assert pair.num_restarts == restarts + 1
    assert pair.pid != engine
    request = make_request("next", 21, seed=4)
    assert (await ask(pair, request)).tokens == alone(single, [request])["next"].tokens
    await until_async(lambda: len(rank_folders(temporary)) == 1)  # that of the dead ones is gone


async def test_a_rank_that_is_stopped_is_noticed_and_goes_with_its_engine(folder: Path, temporary: Path) -> None:
    client = EngineClient(config_of(folder, tensor_parallel=2, heartbeat_s=2.0))
    await client.start()
    try:
        await client.wait_ready()
        (worker,) = ranks_of(client)
        endless = replace(make_request("endless", 30), sampling=SamplingParams(temperature=0.0, ignore_eos=True))
        async with client.submit(endless) as stream:
            await anext(stream)
            worker.send_signal(signal.SIGSTOP)
            events = [event async for event in stream]
        assert events[-1].error is not None
        assert events[-1].error.code == "engine_restarting"
        await client.wait_ready()
        assert client.num_restarts == 1
        assert not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE
    finally:
        await client.close()


async def test_ranks_end_with_the_engine_and_leave_nothing(folder: Path, temporary: Path) -> None:
    before = contents(temporary)
    client = EngineClient(config_of(folder, tensor_parallel=2))
    await client.start()
    try:
        await client.wait_ready()
        (worker,) = ranks_of(client)
    finally:
        await client.close()  # kills the engine
    await until_async(lambda: not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE)
    await until_async(lambda: contents(temporary) <= before)


@pytest.mark.slow
async def test_three_ranks_of_a_released_model_answer_as_one(tmp_path: Path) -> None:
    write_tiny_model(tmp_path / "model", RELEASED_SIX_HEADS, with_tokenizer=False)
    requests = mixed_requests(6)
    wanted = alone(load_engine(config_of(tmp_path)), requests)
    client = EngineClient(config_of(tmp_path, tensor_parallel=3))
    await client.start()
    try:
        found = await together_when_ready(client, requests)
        assert len(ranks_of(client)) == 2
    finally:
        await client.close()
    assert {name: answer.tokens for name, answer in found.items()} == {
        name: answer.tokens for name, answer in wanted.items()
    }


async def together_when_ready(client: EngineClient, requests: list[GenerationRequest]) -> dict[str, Answer]:
    await client.wait_ready()
    return await together(client, requests)


def test_a_degree_that_does_not_divide_the_heads_is_refused_with_those_that_do(folder: Path) -> None:
    with pytest.raises(ModelError, match="cannot be split over 3 ranks; it can over 1 or 2"):
        load_engine(config_of(folder, tensor_parallel=3))


def test_what_another_rank_cannot_load_is_told_and_ends_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    write_tiny_model(tmp_path / "model", with_tokenizer=False)
    tensors = random_tensors(llama_config())
    tensors["model.layers.1.mlp.up_proj.weight"][-1, 0] = torch.inf
    save_file(tensors, tmp_path / "model" / "model.safetensors")
    threads = torch.get_num_threads()
    with pytest.raises(ModelError, match=r"(?s)rank 1 cannot load its part: .*up_proj.weight has values"):
        load_parallel_engine(config_of(tmp_path, tensor_parallel=2))
    torch.set_num_threads(threads)
    assert not rank_folders(tmp_path)
    commands = [" ".join(child.cmdline()) for child in psutil.Process().children()]
    assert not [command for command in commands if "tensor_parallel.worker" in command]


def test_the_exit_status_is_one_of_its_own() -> None:
    assert len({EXIT_RANK_DIED, EXIT_LOAD_FAILED, EXIT_STEP_FAILED}) == 3
