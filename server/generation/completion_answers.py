"""The answers of a completion on the wire, whole or in chunks."""

from collections.abc import Sequence
from typing import Any

from server.generation.choice import Answer, TextDelta
from server.generation.generation import Generation
from server.generation.logprobs import ScoredTokens
from server.generation.streaming import OpenAIWriter
from server.http.sse import DONE, event
from server.protocol.completions import Completion, CompletionChoice
from server.protocol.logprobs import CompletionLogprobs
from server.service import Service


class CompletionWriter(OpenAIWriter):
    """Writes `text_completion` objects."""

    def __init__(self, service: Service, generation: Generation) -> None:
        super().__init__(service, generation)
        self._with_token_ids |= generation.plan.tokenizer is None
        self._head |= {"id": f"cmpl-{self._fields.own_id}", "object": "text_completion"}
        self._seen: set[int] = set()

    def whole(self, answers: Sequence[Answer]) -> Completion:
        choices = [
            CompletionChoice(
                index=index,
                text=answer.text,
                logprobs=self._completion_logprobs(answer.prompt, answer.output),
                finish_reason=answer.finish_reason,
                stop_reason=answer.stop,
                **self._prompt_logprobs(answer.prompt),
                **self._token_ids(index, tuple(answer.token_ids)),
                **self._state(answer),
            )
            for index, answer in enumerate(answers)
        ]
        return Completion(**self._head, choices=choices, usage=self._generation.usage)

    def begin(self) -> Sequence[bytes]:
        return []

    def delta(self, delta: TextDelta) -> Sequence[bytes]:
        tells = delta.text or delta.finish_reason is not None or self._with_token_ids or delta.num_entries > 0
        if not tells:
            return []
        prompt = [] if delta.prompt is None else [delta.prompt]
        output = [] if delta.output is None else [delta.output]
        choice = CompletionChoice(
            index=delta.index,
            text=delta.text,
            logprobs=self._completion_logprobs(prompt, output) if prompt or output else None,
            finish_reason=delta.finish_reason,
            **({} if delta.finish_reason is None else {"stop_reason": delta.stop}),
            **(self._prompt_logprobs(prompt) if prompt else {}),
            **self._token_ids(delta.index, delta.token_ids),
            **self._state(delta),
        )
        return [event(Completion(**self._head, choices=[choice], **self._usage()).to_json())]

    def end(self) -> Sequence[bytes]:
        if not self._fields.wants_usage:
            return [DONE]
        return [event(Completion(**self._head, choices=[], usage=self._generation.usage).to_json()), DONE]

    def _completion_logprobs(
        self, prompt: Sequence[ScoredTokens], output: Sequence[ScoredTokens]
    ) -> CompletionLogprobs | None:
        num_top = self._fields.num_top_logprobs
        if num_top is None:
            return None
        return self._logprobs.completion(prompt if self._fields.echoes else (), output, num_top=num_top)

    def _token_ids(self, index: int, token_ids: tuple[int, ...]) -> dict[str, Any]:
        """With those of the prompt in the first chunk of a choice."""
        if not self._with_token_ids:
            return {}
        prompt = {} if index in self._seen else {"prompt_token_ids": self._generation.prompt_token_ids(index)}
        self._seen.add(index)
        return {"token_ids": token_ids} | prompt
