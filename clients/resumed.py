"""A conversation that the server remembers: each turn sends only itself, and survives the end of both programs."""

from collections.abc import Generator

from clients.client import Client
from clients.conversation import Conversation, Spoken, spoken
from clients.errors import APIResponseError
from clients.states import State, States
from clients.types import GenerationOptions, Message


class ResumedConversation(Conversation):
    """A `Conversation` in a saved state of a name.

    Attributes:
        state: where it is; None before its first answer.
    """

    def __init__(
        self, client: Client, model: str, *, name: str, options: GenerationOptions, system: str | None = None
    ) -> None:
        """Looks the name up.

        Args:
            name: of the state; one that does not exist is made with the first answer.
            system: the system prompt of a new conversation; of one that goes on it becomes a message of its own.
        """
        super().__init__(client, model, options=options, system=system)
        self._states = States(client)
        self._name = name
        self._system_sent: str | None = None
        self.state: State | None = self._states.find(name)

    def ask(self, text: str) -> Generator[Spoken, None, None]:
        """Sends a turn alone and yields the answer piece by piece.

        A turn that fails or is stopped leaves the saved conversation as it was.
        """
        question = Message(role="user", content=text)
        news: list[Message] = [question]
        if self.system is not None and self.system != self._system_sent:
            news = [Message(role="system", content=self.system), question]
        pieces: list[str] = []
        state_id: str | None = None
        self.usage = None
        with self._client.stream_chat(news, model=self._model, **self._state_options()) as stream:
            for chunk in stream:
                state_id = next((found for choice in chunk.choices if (found := _state_id(choice))), state_id)
                pieces.append(chunk.text)
                yield from spoken(chunk)
        if state_id is None:
            raise APIResponseError("the server has not saved the conversation; it saves no states")
        self.state = self._states.get(state_id)
        self._system_sent = self.system
        self._keep(question, "".join(pieces))
        self.usage = stream.usage

    def reset(self) -> None:
        """Forgets the turns here and at the server, not the system prompt."""
        super().reset()
        if self.state is not None:
            self._states.delete(self.state.id)
        self.state, self._system_sent = None, None

    def _state_options(self) -> GenerationOptions:
        if self.state is None:
            return GenerationOptions(**self._options, return_state={"name": self._name})
        return GenerationOptions(**self._options, state_id=self.state.id, return_state={"update": True})


def _state_id(choice: object) -> str | None:
    value = getattr(choice, "state_id", None)
    return value if isinstance(value, str) and value else None
