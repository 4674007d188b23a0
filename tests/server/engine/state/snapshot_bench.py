"""An engine on a tiny model whose states go to files and into a cache; what each request got."""

from dataclasses import dataclass, field
from pathlib import Path

import torch

from dijiang_model.config import ModelConfig
from dijiang_model.model import DiJiangForCausalLM
from server.engine.engine import Engine
from server.engine.loading import PoolAccess, state_layout
from server.engine.runner import ModelRunner
from server.engine.sampling.sampler import Sampler
from server.engine.scheduler import Scheduler
from server.engine.state.pool import StatePool
from server.engine.state.prefix_cache import PrefixCache
from server.engine.state.prefix_disk import PrefixDisk
from server.engine.state.snapshots import CachePolicy, Snapshots
from server.engine.types.requests import EngineError, FinishReason, GenerationRequest, SamplingParams, TokenEvent
from server.engine.types.state import SavedState, StateOptions
from tests.server.engine.fakes import engine_info

CPU = torch.device("cpu")
PROMPT = tuple(range(40, 97))


@dataclass
class Result:
    """What one request got."""

    tokens: list[int] = field(default_factory=list)
    num_cached: int = 0
    reason: FinishReason | None = None
    error: EngineError | None = None
    saved: SavedState | None = None
    save_error: EngineError | None = None

    def take(self, event: TokenEvent) -> None:
        assert self.reason is None, "an event came after the terminal one"
        self.tokens += event.token_ids
        self.num_cached += event.num_cached_tokens
        self.reason, self.error, self.saved = event.finish_reason, event.error, event.saved
        self.save_error = event.save_error


class Bench:
    """An engine with state files and a prefix cache, both to look at."""

    def __init__(
        self,
        model: DiJiangForCausalLM,
        folder: Path,
        *,
        num_ahead: int = 0,
        max_step_tokens: int = 16,
        cache_bytes: int = 1 << 24,
        policy: CachePolicy | None = None,
        fingerprint: str = "dj-tiny",
        disk: Path | None = None,
    ) -> None:
        config: ModelConfig = model.config
        self.pool = StatePool(model.state_spec, 4)
        self.layout = state_layout(model.state_spec, config.vocab_size, fingerprint)
        self.access = PoolAccess(self.pool)
        self.disk = None if disk is None else PrefixDisk(self.access, disk)
        self.cache = PrefixCache(
            snapshot_bytes=self.pool.bytes_per_slot, host_bytes=cache_bytes, disk_bytes=1 << 24, disk=self.disk
        )
        policy = CachePolicy(min_tokens=4) if policy is None else policy
        self.snapshots = Snapshots(self.access, self.layout, folder=folder, cache=self.cache, policy=policy)
        scheduler = Scheduler(
            num_slots=4,
            max_step_tokens=max_step_tokens,
            max_waiting=100,
            vocab_size=config.vocab_size,
            eos_token_ids=config.eos_token_ids,
            on_admission=self.snapshots.begin,
        )
        sampler = Sampler(config.vocab_size, config.eos_token_ids, CPU)
        runner = ModelRunner(model, pool=self.pool, sampler=sampler, device=CPU)
        self.engine = Engine(
            scheduler=scheduler, runner=runner, info=engine_info(), num_ahead=num_ahead, snapshots=self.snapshots
        )

    def run(self, *requests: GenerationRequest) -> dict[str, Result]:
        results = {request.request_id: Result() for request in requests}
        for request in requests:
            event = self.engine.add(request)
            if event is not None:
                results[event.request_id].take(event)
        while self.engine.has_work:
            for event in self.engine.step():
                results[event.request_id].take(event)
        return results

    def one(self, *prompt: int, states: StateOptions = StateOptions(), **sampling: object) -> Result:  # noqa: B008
        return self.run(ask("one", *prompt, states=states, **sampling))["one"]


def ask(request_id: str, *prompt: int, states: StateOptions = StateOptions(), **sampling: object) -> GenerationRequest:  # noqa: B008
    values = {"temperature": 0.0, "max_tokens": 12, "ignore_eos": True, **sampling}
    return GenerationRequest(request_id, prompt, SamplingParams(**values), states)  # type: ignore[arg-type]
