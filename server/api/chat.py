"""`POST /v1/chat/completions`."""

import time
from collections.abc import AsyncGenerator
from functools import partial
from typing import Any

from fastapi import APIRouter, Request, Response

from server.api.json_body import JsonRoute, ServiceDependency
from server.generation.chat_answers import ChatAnswer
from server.generation.choice import Answer, Piece
from server.generation.conversations import encode_messages, template_variables
from server.generation.generation import Generation
from server.generation.logprobs import Places, logprob_format
from server.generation.planning import check_counts, plan_generation
from server.generation.predictions import predicted_tokens
from server.generation.sessions import admit, find_base, state_session, system_prefix
from server.generation.streaming import (
    ClientGoneResponse,
    collect_answers,
    stream_answers,
    written,
    written_response,
)
from server.generation.thinking import answer_parser, shown_token_ids, thinking_of
from server.generation.tools import checked_form, told_tools
from server.http.sse import KEEP_ALIVE, ClientDisconnectedError, event
from server.protocol.chat import (
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatDelta,
    ChatFinishReason,
    ChatRequest,
)
from server.protocol.logprobs import ChatLogprobs
from server.service import Service
from server.states.store import Turn
from server.text.reasoning import Thinking

router = APIRouter(route_class=JsonRoute, tags=["generation"])


@router.post(
    "/v1/chat/completions",
    responses={200: {"model": ChatCompletion, "content": {"text/event-stream": {}}}},
    response_class=Response,
)
async def create_chat_completion(body: ChatRequest, request: Request, service: ServiceDependency) -> Response:
    """Answers a conversation."""
    service.require_model(body.model)
    check_counts(service.options, body, num_prompts=1)
    info = service.require_open()
    admit(request, service)
    base = await find_base(request, service, info, body, num_choices=body.num_choices)
    continues = body.continue_final_message is True
    tools = told_tools(body.tool_use)
    prompt = await encode_messages(
        service,
        body.messages,
        add_generation_prompt=body.add_generation_prompt is not False,
        continue_final_message=continues,
        add_special_tokens=body.add_special_tokens is True,
        base=None if base is None else base.head,
        tools=tools,
        variables=template_variables(service, body.chat_template_kwargs, body.reasoning_effort),
    )
    thinking = thinking_of(service, prompt, body.messages, continue_final_message=continues)
    points = system_prefix(service, body.messages, prompt, tools=tools) if base is None else ()
    session = state_session(request, service, info, body, base, turn=Turn.OPEN, cache_points=points)
    generation = plan_generation(
        service,
        info,
        body,
        [prompt],
        param="messages",
        max_tokens=None,
        session=session,
        grammar=await checked_form(service, info, body.wanted_grammar, body.tool_use, thinking),
        shown_token_ids=shown_token_ids(service, thinking, body.tool_use),
        thinking=thinking,
        predicted=await predicted_tokens(service, body.prediction),
    )
    await generation.start()
    writer = _Writer(service, body, generation, thinking)
    if body.stream:
        return stream_answers(request, generation, writer.chunks())
    try:
        answers = await collect_answers(request, generation)
    except ClientDisconnectedError:
        return ClientGoneResponse()
    return await written_response(lambda: writer.whole(answers), answers)


class _Writer:
    """Puts pieces and answers into the shapes of the wire."""

    def __init__(self, service: Service, body: ChatRequest, generation: Generation, thinking: Thinking | None) -> None:
        self._body = body
        self._generation = generation
        self._with_token_ids = body.return_token_ids is True
        self._idle_s = service.options.keepalive_s
        self._logprobs = logprob_format(service, body)
        self._answers = [
            ChatAnswer(
                answer_parser(service, thinking, body.tool_use), shows_thought=body.include_reasoning is not False
            )
            for _ in range(body.num_choices)
        ]
        self._head: dict[str, Any] = {
            "id": f"chatcmpl-{body.own_id}",
            "created": int(time.time()),
            "model": service.options.model_name,
            "system_fingerprint": service.options.fingerprint,
        }

    def whole(self, answers: list[Answer]) -> ChatCompletion:
        choices = [
            ChatChoice(
                index=index,
                message=self._answers[index].message(answer.text),
                logprobs=self._chat_logprobs(answer.output),
                finish_reason=self._answers[index].finish_reason(answer.finish_reason),
                **self._token_ids(tuple(answer.token_ids)),
                **self._state(answer.state_id),
            )
            for index, answer in enumerate(answers)
        ]
        return ChatCompletion(
            **self._head,
            object="chat.completion",
            choices=choices,
            usage=self._generation.usage,
            **self._prompt_token_ids(),
            **self._prompt_logprobs(answers[0].prompt),
        )

    async def chunks(self) -> AsyncGenerator[bytes, None]:
        for index in range(self._body.num_choices):
            opening = ChatDelta(role="assistant", content="")
            yield self._chunk(index, opening, token_ids=(), **(self._prompt_token_ids() if index == 0 else {}))
        async for piece in self._generation.pieces(idle_s=self._idle_s):
            if piece is None:
                yield KEEP_ALIVE
            else:
                for chunk in await written(partial(self._piece, piece), num_entries=piece.num_entries):
                    yield chunk
        if self._body.wants_usage:
            yield self._event(choices=[], usage=self._generation.usage)

    def _piece(self, piece: Piece) -> list[bytes]:
        """The new text or calls, if there are any; then the end, if it is there."""
        chunks: list[bytes] = []
        answer = self._answers[piece.index]
        token_ids = piece.token_ids
        output = [] if piece.output is None else [piece.output]
        more = {} if piece.prompt is None or piece.index > 0 else self._prompt_logprobs([piece.prompt])
        deltas = answer.deltas(piece.text, is_last=piece.finish_reason is not None)
        if not deltas and (more or ((self._with_token_ids or output) and piece.finish_reason is None)):
            deltas = [ChatDelta(content="")]
        for delta in deltas:
            chunks.append(self._chunk(piece.index, delta, token_ids=token_ids, output=output, **more))
            token_ids, output, more = (), [], {}
        if piece.finish_reason is not None:
            chunks.append(
                self._chunk(
                    piece.index,
                    ChatDelta(),
                    token_ids=token_ids,
                    output=output,
                    finish_reason=answer.finish_reason(piece.finish_reason),
                    state_id=piece.state_id,
                )
            )
        return chunks

    def _chunk(
        self,
        index: int,
        delta: ChatDelta,
        *,
        token_ids: tuple[int, ...],
        output: list[Places] | None = None,
        finish_reason: ChatFinishReason | None = None,
        state_id: str | None = None,
        **more: Any,
    ) -> bytes:
        choice = ChatChunkChoice(
            index=index,
            delta=delta,
            logprobs=self._chat_logprobs(output) if output else None,
            finish_reason=finish_reason,
            **self._token_ids(token_ids),
            **self._state(state_id),
        )
        if self._body.wants_usage:
            more["usage"] = self._generation.usage if self._body.wants_usage_in_every_chunk else None
        return self._event(choices=[choice], **more)

    def _event(self, **fields: Any) -> bytes:
        return event(ChatChunk(**self._head, object="chat.completion.chunk", **fields).to_json())

    def _token_ids(self, token_ids: tuple[int, ...]) -> dict[str, Any]:
        return {"token_ids": token_ids} if self._with_token_ids else {}

    def _chat_logprobs(self, output: list[Places]) -> ChatLogprobs | None:
        num_top = self._body.num_top_logprobs
        return None if num_top is None else self._logprobs.chat(output, num_top=num_top)

    def _prompt_logprobs(self, prompt: list[Places]) -> dict[str, Any]:
        num_top = self._body.prompt_logprobs
        return {} if num_top is None else {"prompt_logprobs": self._logprobs.prompt(prompt, num_top=num_top)}

    def _state(self, state_id: str | None) -> dict[str, Any]:
        return {} if state_id is None else {"state_id": state_id}

    def _prompt_token_ids(self) -> dict[str, Any]:
        return {"prompt_token_ids": self._generation.prompt_token_ids(0)} if self._with_token_ids else {}
