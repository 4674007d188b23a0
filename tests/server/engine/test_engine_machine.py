"""Under any order of add, abort, step and failing rows: exactly one terminal event per request, and fair shares.

Tenants of any weight come and go. A tenant without a slot gets one at once if another has several, and in its turn if
there are more tenants than slots.
"""

from collections import Counter
from dataclasses import replace
from unittest import mock

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from server.engine.batch import Batch
from server.engine.fairness import shares
from server.engine.types.requests import FinishReason, Tenant, TokenEvent
from tests.server.engine.fakes import EOS_TOKEN_ID, FakeRunner, engine, expected_output, request

NUM_SLOTS = 3
NAMES = [f"r{number}" for number in range(8)]
TENANTS = [Tenant("a"), Tenant("b", weight=2), Tenant("c", max_running=1), Tenant("d")]
QUANTUM = 6


class WatchedRunner(FakeRunner):
    """Lets somebody look at what was planned before it is launched."""

    def launch(self, batch: Batch) -> None:
        self.watch(batch)
        super().launch(batch)

    def watch(self, batch: Batch) -> None:
        """Replaced by the machine."""


class EngineMachine(RuleBasedStateMachine):
    """Drives an engine and keeps its own book of what every request is owed."""

    @initialize(num_ahead=st.integers(0, 2), max_step_tokens=st.integers(3, 9), max_waiting=st.integers(0, 4))
    def start(self, num_ahead: int, max_step_tokens: int, max_waiting: int) -> None:
        self.quantum = mock.patch.object(shares, "QUANTUM", QUANTUM)
        self.quantum.start()
        self.runner = WatchedRunner(max_step_tokens=max_step_tokens)
        self.runner.watch = self.check_shares  # type: ignore[method-assign]
        self.patience: Counter[str] = Counter()
        self.num_ahead = num_ahead
        limits = {"num_slots": NUM_SLOTS, "max_step_tokens": max_step_tokens, "max_waiting": max_waiting}
        self.engine = engine(self.runner, num_ahead=num_ahead, **limits)
        self.max_waiting = max_waiting
        self.prompts: dict[str, tuple[int, ...]] = {}
        self.limits: dict[str, int | None] = {}
        self.outputs: dict[str, list[int]] = {}

    @rule(
        name=st.sampled_from(NAMES),
        prompt=st.lists(st.integers(0, 48), min_size=1, max_size=20),
        max_tokens=st.none() | st.integers(1, 5),
        tenant=st.sampled_from(TENANTS),
    )
    def add(self, name: str, prompt: list[int], max_tokens: int | None, tenant: Tenant) -> None:
        if name in self.prompts:
            return
        self.prompts[name], self.limits[name], self.outputs[name] = tuple(prompt), max_tokens, []
        event = self.engine.add(replace(request(name, *prompt, max_tokens=max_tokens), tenant=tenant))
        if event is not None:
            assert event.error is not None
            assert event.error.code == "overloaded"
            assert len(self.prompts) > self.max_waiting
            self.take(event)

    @rule(name=st.sampled_from(NAMES))
    def abort(self, name: str) -> None:
        event = self.engine.abort(name)
        assert (event is not None) == (name in self.prompts)
        if event is not None:
            assert event.finish_reason is FinishReason.ABORT
            self.take(event)

    @rule(name=st.sampled_from(NAMES))
    def fail_row(self, name: str) -> None:
        self.runner.faulty.add(name)

    @rule(name=st.sampled_from(NAMES))
    def end_row(self, name: str) -> None:
        self.runner.scripted[name] = [EOS_TOKEN_ID]

    @rule(num_steps=st.integers(1, 6))
    def step(self, num_steps: int) -> None:
        for _ in range(num_steps):
            for event in self.engine.step():
                self.take(event)

    def check_shares(self, batch: Batch) -> None:
        """What was planned is fair."""
        scheduler = self.engine._scheduler
        running = Counter(sequence.tenant for sequence in scheduler.running)
        waiting = {sequence.tenant for sequence in scheduler._waiting}
        assert all(running[tenant] <= tenant.max_running for tenant in running if tenant.max_running)
        for sequence, _ in batch.preempted:
            heirs = {chunk.sequence.tenant for chunk in batch.chunks} - {sequence.tenant}
            assert heirs, "a slot was taken for nobody"
        for tenant in TENANTS:
            has_none = tenant in waiting and running[tenant] == 0
            self.patience[tenant.name] = self.patience[tenant.name] + 1 if has_none else 0
            if has_none and self.num_ahead == 0:
                assert max(running.values()) == 1, "another has several"
        assert max(self.patience.values()) <= len(TENANTS) * (QUANTUM + 1 + self.num_ahead), "somebody starves"

    @invariant()
    def owes_what_it_holds(self) -> None:
        stats = self.engine.stats
        assert stats.num_running + stats.num_waiting == len(self.prompts)
        assert stats.num_running + stats.num_free_slots == NUM_SLOTS
        assert stats.num_waiting <= self.max_waiting + NUM_SLOTS

    def take(self, event: TokenEvent) -> None:
        name = event.request_id
        assert name in self.prompts, "an event for a request that has had its terminal event"
        output = self.outputs[name]
        output.extend(event.token_ids)
        assert event.finish_reason is not None or event.token_ids, "an event that says nothing"
        assert (event.error is not None) == (event.finish_reason is FinishReason.ERROR)
        if event.finish_reason is FinishReason.LENGTH:
            assert len(output) == self.limits[name]
        if event.finish_reason is not None:
            if EOS_TOKEN_ID not in output:
                assert output == expected_output(self.prompts[name], len(output))
            self.runner.faulty.discard(name)
            self.runner.scripted.pop(name, None)
            del self.prompts[name], self.outputs[name], self.limits[name]

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        self.quantum.stop()
        for name in [*self.prompts]:
            if self.limits[name] is None:
                self.abort(name)
        for _ in range(1_000):
            if not self.engine.has_work:
                break
            self.step(1)
        assert not self.engine.has_work
        assert not self.prompts
        assert self.engine.stats.num_free_slots == NUM_SLOTS


EngineMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestEngineMachine = EngineMachine.TestCase
