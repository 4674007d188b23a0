"""Exactly one terminal event per request, under any order of add, abort, step and failing rows."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from server.engine.types.requests import FinishReason, TokenEvent
from tests.server.engine.fakes import EOS_TOKEN_ID, FakeRunner, engine, expected_output, request

NUM_SLOTS = 3
NAMES = [f"r{number}" for number in range(8)]


class EngineMachine(RuleBasedStateMachine):
    """Drives an engine and keeps its own book of what every request is owed."""

    @initialize(num_ahead=st.integers(0, 2), max_step_tokens=st.integers(3, 9), max_waiting=st.integers(0, 4))
    def start(self, num_ahead: int, max_step_tokens: int, max_waiting: int) -> None:
        self.runner = FakeRunner(max_step_tokens=max_step_tokens)
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
    )
    def add(self, name: str, prompt: list[int], max_tokens: int | None) -> None:
        if name in self.prompts:
            return
        self.prompts[name], self.limits[name], self.outputs[name] = tuple(prompt), max_tokens, []
        event = self.engine.add(request(name, *prompt, max_tokens=max_tokens))
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
