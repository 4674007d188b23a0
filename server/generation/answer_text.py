"""The text of one choice while its events come: the echoed prompt, the answer, and where each token lies in them."""

from dataclasses import dataclass

from server.engine.types.requests import FinishReason, GenerationRequest, TokenEvent
from server.generation.logprobs import Places
from server.text.stream import TextStream


@dataclass(frozen=True, slots=True)
class Taken:
    """What one event brought.

    Attributes:
        text: new text, of the echoed prompt too.
        num_tokens: how many of the event's tokens were taken before a stop string was complete.
        prompt: the next tokens of a prompt that is scored.
        output: the tokens, if they are scored.
    """

    text: str
    num_tokens: int
    prompt: Places | None
    output: Places | None


class AnswerText:
    """Pushes tokens through a text stream in the order of the text."""

    def __init__(
        self,
        stream: TextStream | None,
        request: GenerationRequest,
        *,
        echoes: bool,
        is_scored_elsewhere: bool = False,
    ) -> None:
        """
        Args:
            stream: where tokens become text; None if the model has no tokenizer.
            request: whose events come.
            echoes: whether the text begins with the prompt. The stream must look for no stop string there.
            is_scored_elsewhere: whether log-probabilities of the prompt come though the request asks for none.
        """
        self._stream = stream
        self._prompt = request.prompt_token_ids
        self._scores_prompt = is_scored_elsewhere or request.logprobs.num_prompt is not None
        self._scores_output = request.logprobs.num_output is not None
        self._echoes = echoes
        self._num_prompt_done = 0
        self._echo = ""

    @property
    def stopped(self) -> bool:
        """Whether a stop string was found."""
        return self._stream is not None and self._stream.stopped

    @property
    def num_unread(self) -> int:
        """Tokens that `read_prompt` would take."""
        is_at_once = self._echoes and not self._scores_prompt
        return len(self._prompt) - self._num_prompt_done if is_at_once else 0

    def read_prompt(self) -> None:
        """Reads the prompt that is to be echoed before the first event; worth a thread for a long one."""
        self._echo, _ = self._push_prompt(self.num_unread)

    def take(self, event: TokenEvent) -> Taken:
        """Takes an event that is not an error."""
        self.read_prompt()
        text, self._echo = self._echo, ""
        prompt = None
        if self._scores_prompt:
            table = event.prompt_logprobs
            begin = self._num_prompt_done
            num_rows = 0 if table is None else table.num_rows
            echo, offsets = self._push_prompt(num_rows + (1 if begin == 0 else 0))
            text += echo
            if offsets:
                prompt = Places(self._prompt[begin : self._num_prompt_done], offsets, table)
        more, num_taken, offsets = self._push_output(event)
        output = None
        if self._scores_output and event.logprobs is not None and num_taken > 0:
            output = Places(event.token_ids[:num_taken], offsets, event.logprobs.head(num_taken))
        if event.finish_reason is not None and not self.stopped and self._stream is not None:
            more += self._stream.finish()
        return Taken(text + more, num_taken, prompt, output)

    def held_back(self) -> str:
        """What might have become a stop string, and will not: nothing follows."""
        return "" if self._stream is None or self.stopped else self._stream.finish()

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
        """Text, number and offsets of the tokens taken."""
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
