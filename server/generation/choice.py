"""One choice of a request: what is planned, what comes of it piece by piece, and what it was as a whole."""

import asyncio
import time
from dataclasses import dataclass, field

from server.engine.types.requests import FinishReason, GenerationRequest, TokenEvent
from server.generation.answer_text import AnswerText
from server.generation.logprobs import Places
from server.metrics import Metrics
from server.protocol.sampling import FinishReasonText
from server.states.session import api_error
from server.text.reasoning import ThoughtCounter
from server.text.stream import TextStream


@dataclass(frozen=True, slots=True)
class Plan:
    """One choice to generate.

    Attributes:
        request: what the engine gets.
        text: where its tokens become text; None if the model has no tokenizer.
        echoes: whether the text begins with the prompt.
        scored_by: number of the choice whose request scores the prompt for this one too; None: its own does, if any.
        thought: counts the tokens of what is thought before the answer; None: nothing is.
    """

    request: GenerationRequest
    text: TextStream | None
    echoes: bool = False
    scored_by: int | None = None
    thought: ThoughtCounter | None = None


@dataclass(frozen=True, slots=True)
class Piece:
    """What is new in one choice: text and tokens since the last piece, and the end if there is one.

    Attributes:
        state_id: with the end: where the state after this answer is kept, if it is.
        prompt, output: the tokens whose log-probabilities are wanted, since the last piece.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReasonText | None
    state_id: str | None = None
    prompt: Places | None = None
    output: Places | None = None

    @property
    def num_entries(self) -> int:
        """Log-probabilities in it."""
        return sum(places.num_entries for places in (self.prompt, self.output) if places is not None)


@dataclass(slots=True)
class Answer:
    """One whole choice."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: FinishReasonText = "stop"
    state_id: str | None = None
    prompt: list[Places] = field(default_factory=list)
    output: list[Places] = field(default_factory=list)

    @property
    def num_entries(self) -> int:
        """Log-probabilities in it."""
        return sum(places.num_entries for places in (*self.prompt, *self.output))


class Choice:
    """Turns the events of one engine request into pieces, and measures it.

    Attributes:
        followers: choices that get the log-probabilities of the prompt from this one.
        prompt_is_scored: set when they have got all of them.
    """

    def __init__(self, index: int, plan: Plan, metrics: Metrics, *, keeps_tokens: bool = False) -> None:
        """`keeps_tokens`: whether `token_ids` will be asked for."""
        self.index = index
        self.text = AnswerText(
            plan.text, plan.request, echoes=plan.echoes, is_scored_elsewhere=plan.scored_by is not None
        )
        self.thought = plan.thought
        self.followers: list[Choice] = []
        self.prompt_is_scored = asyncio.Event()
        self._metrics = metrics
        self._num_prompt_tokens = len(plan.request.prompt_token_ids)
        self._begin = self._last = time.perf_counter()
        self._reason: str | None = None
        self.num_tokens = 0
        self.num_received = 0
        self.num_cached_tokens = 0
        self.num_predicted_right = 0
        self.num_predicted_wrong = 0
        self.token_ids: list[int] | None = [] if keeps_tokens else None

    def take(self, event: TokenEvent) -> Piece:
        """The piece that one event makes.

        Raises:
            ApiError: the engine ended the request with an error, or stopped.
        """
        if event.finish_reason in (FinishReason.ERROR, FinishReason.ABORT):
            self._reason = str(event.finish_reason)
            raise api_error(event.error)
        reason: FinishReasonText | None = None
        if event.finish_reason is not None:
            reason = "stop" if event.finish_reason is FinishReason.STOP else "length"
        taken = self.text.take(event)
        num_taken = taken.num_tokens
        if self.text.stopped:
            reason = "stop"
        self._measure(num_taken)
        self.num_received += len(event.token_ids)
        num_right = min(event.num_accepted, num_taken)
        self.num_predicted_right += num_right
        self.num_predicted_wrong += event.num_rejected + event.num_accepted - num_right
        self.num_cached_tokens += event.num_cached_tokens
        if self.thought is not None:
            self.thought.take(event.token_ids[:num_taken])
        if self.token_ids is not None:
            self.token_ids += event.token_ids[:num_taken]
        if reason is not None:
            self._reason = reason
        return Piece(
            self.index,
            taken.text,
            event.token_ids[:num_taken],
            reason,
            prompt=taken.prompt,
            output=taken.output,
        )

    def shared(self, event: TokenEvent) -> list[Piece]:
        """What an event's log-probabilities of the prompt are to the followers."""
        if event.prompt_logprobs is None:
            return []
        return [
            follower.take(TokenEvent(event.request_id, prompt_logprobs=event.prompt_logprobs))
            for follower in self.followers
        ]

    def go_on_behind(self, token_ids: tuple[int, ...], *, num_cached_tokens: int) -> str:
        """The text of tokens that came before it was cut off; they were measured then."""
        taken = self.text.take(TokenEvent("", token_ids))
        self.num_tokens = self.num_received = len(token_ids)
        self.num_cached_tokens = num_cached_tokens
        if self.thought is not None:
            self.thought.take(token_ids)
        if self.token_ids is not None:
            self.token_ids += token_ids
        return taken.text

    def cut_off(self) -> str:
        """The text that was held back for what might have come."""
        self._reason = str(FinishReason.SUSPENDED)
        return self.text.held_back()

    def close(self) -> None:
        """Counts the end, whatever it was."""
        self._metrics.finished.labels(self._reason if self._reason is not None else "abort").inc()
        self._metrics.e2e_latency.observe(time.perf_counter() - self._begin)
        self._metrics.prompt_length.observe(self._num_prompt_tokens)
        self._metrics.answer_length.observe(self.num_tokens)

    def _measure(self, num_tokens: int) -> None:
        if num_tokens == 0:
            return
        now = time.perf_counter()
        if self.num_tokens == 0:
            self._metrics.time_to_first_token.observe(now - self._begin)
        else:
            self._metrics.inter_token_latency.observe((now - self._last) / num_tokens)
        self._last = now
        self.num_tokens += num_tokens
        self._metrics.generation_tokens.inc(num_tokens)
