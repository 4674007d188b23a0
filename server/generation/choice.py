"""One choice of a request: its text while the events of its engine request come, and what it was as a whole."""

from dataclasses import dataclass, field

from server.engine.types.requests import FinishReason, TokenEvent
from server.errors import ServiceError
from server.generation.logprobs import ScoredTokens
from server.generation.measures import Measures
from server.generation.planning import RequestPlan
from server.protocol.sampling import FinishReasonText
from server.states.session import error_of


@dataclass(frozen=True, slots=True)
class TextDelta:
    """What is new in one choice: text and tokens since the last delta, and the end if there is one.

    Attributes:
        state_id: with the end: where the state after this answer is kept, if it is.
        state_error: with the end: why it is not, though it was to be.
        prompt, output: the tokens whose log-probabilities are wanted, since the last delta.
        stop: with the end: the stop string that was found, if one was.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReasonText | None
    state_id: str | None = None
    state_error: ServiceError | None = None
    prompt: ScoredTokens | None = None
    output: ScoredTokens | None = None
    stop: str | None = None

    @property
    def num_entries(self) -> int:
        """Log-probabilities in it."""
        return sum(scored.num_entries for scored in (self.prompt, self.output) if scored is not None)


@dataclass(slots=True)
class Answer:
    """One whole choice."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: FinishReasonText = "stop"
    stop: str | None = None
    state_id: str | None = None
    state_error: ServiceError | None = None
    prompt: list[ScoredTokens] = field(default_factory=list)
    output: list[ScoredTokens] = field(default_factory=list)

    @property
    def num_entries(self) -> int:
        """Log-probabilities in it."""
        return sum(scored.num_entries for scored in (*self.prompt, *self.output))


class Choice:
    """Turns the events of one engine request into deltas, and measures it.

    Attributes:
        has_ended: nothing of it comes any more.
        measures: what it costs.
        followers: choices that get the log-probabilities of the prompt from this one.
        deferred: events of a follower that came before all of these.
        prompt_is_scored: the followers have got all of them.
    """

    def __init__(self, index: int, plan: RequestPlan, measures: Measures) -> None:
        request = plan.requests[index]
        scores_prompt = plan.fields.logprob_options.num_prompt is not None
        self.index = index
        self.has_ended = False
        self.is_follower = scores_prompt and index % plan.num_per_prompt > 0
        self.followers: list[Choice] = []
        self.deferred: list[TokenEvent] = []
        self.prompt_is_scored = False
        self.thought = plan.thought_counter()
        self.num_tokens = self.num_received = self.num_cached_tokens = 0
        self.num_predicted_right = self.num_predicted_wrong = 0
        self.token_ids: list[int] | None = [] if plan.session.keeps else None
        self._stream = plan.text_stream(index)
        self._prompt = request.prompt_token_ids
        self._scores_prompt = scores_prompt
        self._scores_output = request.logprobs.num_output is not None
        self._echoes = plan.fields.echoes
        self._num_prompt_done = 0
        self._echo = ""
        self.measures = measures

    def take(self, event: TokenEvent) -> TextDelta:
        """The delta that one event makes.

        Raises:
            ServiceError: the engine ended the request with an error, or stopped.
        """
        if event.finish_reason in (FinishReason.ERROR, FinishReason.ABORT):
            self.measures.reason = str(event.finish_reason)
            raise error_of(event.error)
        text, prompt = self._take_prompt(event)
        more, num_taken, offsets = self._push_output(event)
        reason: FinishReasonText | None = None
        stop: str | None = None
        if event.finish_reason is not None:
            reason = "stop" if event.finish_reason is FinishReason.STOP else "length"
        if self._stream is not None and self._stream.stopped:
            reason, stop = "stop", self._stream.found
        elif event.finish_reason is not None and self._stream is not None:
            more += self._stream.finish()
        output = None
        if self._scores_output and event.logprobs is not None and num_taken > 0:
            output = ScoredTokens(event.token_ids[:num_taken], offsets, event.logprobs.head(num_taken))
        token_ids = event.token_ids[:num_taken]
        self._count(event, token_ids)
        if reason is not None:
            self.measures.reason = reason
        return TextDelta(self.index, text + more, token_ids, reason, prompt=prompt, output=output, stop=stop)

    def resume(self, token_ids: tuple[int, ...], *, num_cached_tokens: int) -> str:
        """The text of tokens that came before it was cut off; they were measured then."""
        text, num_taken, _ = self._push_output(TokenEvent("", token_ids))
        self.num_tokens = self.num_received = len(token_ids)
        self.num_cached_tokens = num_cached_tokens
        self._remember(token_ids[:num_taken])
        return text

    def cut_off(self) -> str:
        """The text that was held back for what might have come."""
        self.measures.reason = str(FinishReason.SUSPENDED)
        return "" if self._stream is None or self._stream.stopped else self._stream.finish()

    def end(self) -> None:
        """Counts the end, whatever it was. May be called twice."""
        if self.has_ended:
            return
        self.has_ended = True
        self.measures.end(num_tokens=self.num_tokens)

    @property
    def num_unread(self) -> int:
        """Tokens that `read_prompt` would take."""
        is_at_once = self._echoes and not self._scores_prompt
        return len(self._prompt) - self._num_prompt_done if is_at_once else 0

    def read_prompt(self) -> None:
        """Reads the prompt that is to be echoed before the first event; worth a thread for a long one."""
        self._echo, _ = self._push_prompt(self.num_unread)

    def _take_prompt(self, event: TokenEvent) -> tuple[str, ScoredTokens | None]:
        """New text of an echoed prompt, and the next tokens of one that is scored."""
        if not self._scores_prompt:
            if self.num_unread:
                self.read_prompt()
            echo, self._echo = self._echo, ""
            return echo, None
        table, begin = event.prompt_logprobs, self._num_prompt_done
        num_rows = 0 if table is None else table.num_rows
        echo, offsets = self._push_prompt(num_rows + (1 if begin == 0 else 0))
        return echo, ScoredTokens(self._prompt[begin : self._num_prompt_done], offsets, table) if offsets else None

    def _push_prompt(self, num_tokens: int) -> tuple[str, tuple[int, ...]]:
        """Text (if the prompt is echoed) and offsets of its next tokens."""
        begin = self._num_prompt_done
        self._num_prompt_done += num_tokens
        parts, offsets = [], []
        for token_id in self._prompt[begin : self._num_prompt_done]:
            offsets.append(self._position)
            if self._echoes and self._stream is not None:
                parts.append(self._stream.push(token_id))
        return "".join(parts), tuple(offsets)

    def _push_output(self, event: TokenEvent) -> tuple[str, int, tuple[int, ...]]:
        """Text, number and offsets of the tokens taken before a stop string was complete."""
        parts, offsets = [], []
        ends_with_stop_token = event.finish_reason is FinishReason.STOP
        for number, token_id in enumerate(event.token_ids, start=1):
            offsets.append(self._position)
            if self._stream is None or (ends_with_stop_token and number == len(event.token_ids)):
                continue  # the token that ended the sequence is no text
            parts.append(self._stream.push(token_id))
            if self._stream.stopped:
                break
        return "".join(parts), len(offsets), tuple(offsets)

    @property
    def _position(self) -> int:
        return 0 if self._stream is None else self._stream.num_characters

    def _count(self, event: TokenEvent, token_ids: tuple[int, ...]) -> None:
        num_right = min(event.num_accepted, len(token_ids))
        self.num_received += len(event.token_ids)
        self.num_predicted_right += num_right
        self.num_predicted_wrong += event.num_rejected + event.num_accepted - num_right
        self.num_cached_tokens += event.num_cached_tokens
        if not token_ids:
            return
        self._remember(token_ids)
        self.measures.tokens(len(token_ids))
        self.num_tokens += len(token_ids)

    def _remember(self, token_ids: tuple[int, ...]) -> None:
        if self.thought is not None:
            self.thought.take(token_ids)
        if self.token_ids is not None:
            self.token_ids += token_ids
