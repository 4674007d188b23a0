"""A conversation with a chat model: its history, and what of an answer is kept."""

import errno
import json
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path

from clients.client import Client
from clients.errors import ClientError
from clients.types import ChatChunk, GenerationOptions, Message, Usage


@dataclass(frozen=True, slots=True)
class Spoken:
    """A piece of what a model says.

    Attributes:
        is_thought: it belongs to what is thought before the answer, and is not kept.
    """

    text: str
    is_thought: bool = False


def spoken(chunk: ChatChunk) -> list[Spoken]:
    """What a chunk of a stream brings, without empty pieces."""
    pieces = [Spoken(chunk.thought, is_thought=True), Spoken(chunk.text)]
    return [piece for piece in pieces if piece.text]


class Conversation:
    """The turns so far, and the client that answers the next one.

    Attributes:
        messages: the turns, without the system prompt.
        system: the system prompt; None sends none.
        usage: what the last answer cost, if the server said so.
    """

    def __init__(self, client: Client, model: str, *, options: GenerationOptions, system: str | None = None) -> None:
        self.messages: list[Message] = []
        self.system = system
        self.usage: Usage | None = None
        self._client = client
        self._model = model
        self._options = options

    def ask(self, text: str) -> Generator[Spoken, None, None]:
        """Sends a turn and yields the answer piece by piece.

        The turn and its answer join the history when the answer is complete, or, with what there is of it,
        when the caller stops it (closes this generator, or interrupts it). Of a request that failed nothing
        is kept, so that it can be asked again.
        """
        question = Message(role="user", content=text)
        pieces: list[str] = []
        self.usage = None
        try:
            with self._client.stream_chat([*self.transcript(), question], model=self._model, **self._options) as stream:
                for chunk in stream:
                    pieces.append(chunk.text)
                    yield from spoken(chunk)
        except ClientError:
            raise
        except BaseException:
            if any(pieces):
                self._keep(question, "".join(pieces))
            raise
        self._keep(question, "".join(pieces))
        self.usage = stream.usage

    def reset(self) -> None:
        """Forgets the turns, not the system prompt."""
        self.messages.clear()

    def save(self, path: Path) -> None:
        """Writes the conversation as JSON, in the form of a request's `messages`.

        Raises:
            OSError: the file cannot be written, or is there and holds something else than a conversation.
        """
        if path.exists() and not _is_transcript(path):
            raise FileExistsError(errno.EEXIST, "it exists and holds no saved conversation", str(path))
        path.write_text(json.dumps(self.transcript(), ensure_ascii=False, indent=2) + "\n", encoding="utf-8")

    def transcript(self) -> list[Message]:
        """The system prompt, if any, and the turns."""
        if self.system is None:
            return list(self.messages)
        return [Message(role="system", content=self.system), *self.messages]

    def _keep(self, question: Message, answer: str) -> None:
        self.messages += [question, Message(role="assistant", content=answer)]


def _is_transcript(path: Path) -> bool:
    """Whether a file holds what `Conversation.save` writes."""
    try:
        turns = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(turns, list) and all(isinstance(turn, dict) and "role" in turn for turn in turns)
