"""`POST /v1/completions`."""

import time
from collections.abc import AsyncGenerator
from functools import partial
from typing import Any

from fastapi import APIRouter, Request, Response

from server.api.json_body import JsonRoute, ServiceDependency
from server.generation.choice import Answer, Piece
from server.generation.generation import Generation
from server.generation.logprobs import Places, logprob_format
from server.generation.planning import check_counts, encode_prompts, plan_generation
from server.generation.sessions import admit, find_base, state_session
from server.generation.streaming import (
    ClientGoneResponse,
    collect_answers,
    stream_answers,
    written,
    written_response,
)
from server.generation.structure import checked_grammar
from server.http.sse import KEEP_ALIVE, ClientDisconnectedError, event
from server.protocol.completions import DEFAULT_MAX_TOKENS, Completion, CompletionChoice, CompletionRequest
from server.protocol.logprobs import CompletionLogprobs
from server.service import Service
from server.states.store import Turn

router = APIRouter(route_class=JsonRoute, tags=["generation"])


@router.post(
    "/v1/completions",
    responses={200: {"model": Completion, "content": {"text/event-stream": {}}}},
    response_class=Response,
)
async def create_completion(body: CompletionRequest, request: Request, service: ServiceDependency) -> Response:
    """Goes on from a text or from token ids."""
    service.require_model(body.model)
    check_counts(service.options, body, num_prompts=len(body.prompts))
    info = service.require_open()
    admit(request, service)
    num_choices = len(body.prompts) * body.num_choices
    base = await find_base(request, service, info, body, num_choices=num_choices)
    is_start = base is None
    prompts = await encode_prompts(
        service,
        body.prompts,
        add_special_tokens=is_start if body.add_special_tokens is None else body.add_special_tokens,
        continues=not is_start,
    )
    session = state_session(request, service, info, body, base, turn=Turn.TEXT)
    grammar = await checked_grammar(service, info, body.wanted_grammar)
    generation = plan_generation(
        service,
        info,
        body,
        prompts,
        param="prompt",
        max_tokens=DEFAULT_MAX_TOKENS,
        session=session,
        grammar=grammar,
    )
    await generation.start()
    writer = _Writer(service, body, generation)
    if body.stream:
        return stream_answers(request, generation, writer.chunks())
    try:
        answers = await collect_answers(request, generation)
    except ClientDisconnectedError:
        return ClientGoneResponse()
    return await written_response(lambda: writer.whole(answers), answers)


class _Writer:
    """Puts pieces and answers into the shapes of the wire."""

    def __init__(self, service: Service, body: CompletionRequest, generation: Generation) -> None:
        self._body = body
        self._generation = generation
        self._with_token_ids = body.return_token_ids is True or service.tokenizer is None
        self._idle_s = service.options.keepalive_s
        self._logprobs = logprob_format(service, body)
        self._head: dict[str, Any] = {
            "id": f"cmpl-{body.own_id}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": service.options.model_name,
            "system_fingerprint": service.options.fingerprint,
        }

    def whole(self, answers: list[Answer]) -> Completion:
        choices = [
            CompletionChoice(
                index=index,
                text=answer.text,
                logprobs=self._completion_logprobs(answer.prompt, answer.output),
                finish_reason=answer.finish_reason,
                **self._prompt_logprobs(answer.prompt),
                **self._token_ids(index, tuple(answer.token_ids), is_first=True),
                **self._state(answer.state_id),
            )
            for index, answer in enumerate(answers)
        ]
        return Completion(**self._head, choices=choices, usage=self._generation.usage)

    async def chunks(self) -> AsyncGenerator[bytes, None]:
        seen: set[int] = set()
        async for piece in self._generation.pieces(idle_s=self._idle_s):
            if piece is None:
                yield KEEP_ALIVE
            elif piece.text or piece.finish_reason is not None or self._with_token_ids or piece.num_entries > 0:
                write = partial(self._chunk, piece, is_first=piece.index not in seen)
                yield await written(write, num_entries=piece.num_entries)
                seen.add(piece.index)
        if self._body.wants_usage:
            yield event(Completion(**self._head, choices=[], usage=self._generation.usage).to_json())

    def _chunk(self, piece: Piece, *, is_first: bool) -> bytes:
        prompt = [] if piece.prompt is None else [piece.prompt]
        output = [] if piece.output is None else [piece.output]
        choice = CompletionChoice(
            index=piece.index,
            text=piece.text,
            logprobs=self._completion_logprobs(prompt, output) if prompt or output else None,
            finish_reason=piece.finish_reason,
            **(self._prompt_logprobs(prompt) if prompt else {}),
            **self._token_ids(piece.index, piece.token_ids, is_first=is_first),
            **self._state(piece.state_id),
        )
        return event(Completion(**self._head, choices=[choice], **self._usage()).to_json())

    def _completion_logprobs(self, prompt: list[Places], output: list[Places]) -> CompletionLogprobs | None:
        num_top = self._body.num_top_logprobs
        if num_top is None:
            return None
        return self._logprobs.completion(prompt + output if self._body.echoes else output, num_top=num_top)

    def _prompt_logprobs(self, prompt: list[Places]) -> dict[str, Any]:
        num_top = self._body.prompt_logprobs
        return {} if num_top is None else {"prompt_logprobs": self._logprobs.prompt(prompt, num_top=num_top)}

    def _state(self, state_id: str | None) -> dict[str, Any]:
        return {} if state_id is None else {"state_id": state_id}

    def _usage(self) -> dict[str, Any]:
        if not self._body.wants_usage:
            return {}
        return {"usage": self._generation.usage if self._body.wants_usage_in_every_chunk else None}

    def _token_ids(self, index: int, token_ids: tuple[int, ...], *, is_first: bool) -> dict[str, Any]:
        if not self._with_token_ids:
            return {}
        prompt = {"prompt_token_ids": self._generation.prompt_token_ids(index)} if is_first else {}
        return {"token_ids": token_ids} | prompt
