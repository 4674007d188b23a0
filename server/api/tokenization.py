"""`POST /tokenize`, `POST /detokenize`, `POST /apply-template`, `GET /tokenizer_info`."""

from collections.abc import Callable
from functools import partial

import orjson
from fastapi import APIRouter, Request, Response

from dijiang_model.text.template import TemplateFailure
from server.api.json_body import JsonRoute, ServiceDependency
from server.errors import InvalidRequestError, NotFoundError
from server.generation.prompts import (
    chat_message,
    encode_messages,
    require_chat_template,
    require_tokenizer,
    template_variables,
)
from server.generation.streaming import json_response, owner_of
from server.generation.tools import template_tools
from server.http.sse import unless_disconnected
from server.protocol.tokenization import (
    ApplyTemplateRequest,
    ApplyTemplateResponse,
    DetokenizeRequest,
    DetokenizeResponse,
    TokenizeRequest,
    TokenizeResponse,
    TokenizerInfo,
)
from server.protocol.wire import ResponseModel
from server.service import Service
from server.text.stream import TextStream

PIECE = 10_000
"""Tokens that are written at once."""
router = APIRouter(route_class=JsonRoute, tags=["tokenizer"])


@router.post("/tokenize", responses={200: {"model": TokenizeResponse}}, response_class=Response)
async def tokenize(body: TokenizeRequest, request: Request, service: ServiceDependency) -> Response:
    """Token ids of a text or of a conversation."""
    service.require_model(body.model)
    tokenizer = require_tokenizer(service, param="prompt")
    owner = owner_of(request)
    token_ids = await unless_disconnected(request.receive, _encode(body, owner, service))
    limit = service.options.max_prompt_tokens
    answer = TokenizeResponse(
        count=len(token_ids),
        max_model_len=limit if limit > 0 else None,
        tokens=[],
        token_strs=[] if body.return_token_strs else None,
    )
    spelling = {"token_strs": tokenizer.piece} if body.return_token_strs else {}
    write = partial(_with_lists, answer, token_ids, tokens=int, **spelling)
    return await service.texts.run(owner, len(token_ids), write)


async def _encode(body: TokenizeRequest, owner: str, service: Service) -> list[int]:
    if body.conversation is not None:
        return list(await encode_messages(service, owner, body.conversation, tools=template_tools(body.tool_use)))
    assert body.prompt is not None
    text, add_special_tokens = body.prompt, body.add_special_tokens is not False
    tokenizer = require_tokenizer(service, param="prompt")
    encode = partial(tokenizer.encode, text, add_special_tokens=add_special_tokens)
    return await service.texts.run(owner, len(text), encode)


@router.post("/apply-template", responses={200: {"model": ApplyTemplateResponse}}, response_class=Response)
async def apply_template(body: ApplyTemplateRequest, request: Request, service: ServiceDependency) -> Response:
    """A conversation as the text that the model gets to read."""
    service.require_model(body.model)
    template = require_chat_template(service)
    conversation = [chat_message(message) for message in body.messages]
    num_characters = sum(len(message.content) for message in conversation)

    def render() -> str:
        return template.render(
            conversation,
            tools=template_tools(body.tool_use),
            variables=template_variables(service, body),
            add_generation_prompt=body.add_generation_prompt is not False,
            continue_final_message=body.continue_final_message is True,
        )

    try:
        rendering = service.texts.run(owner_of(request), num_characters, render)
        return json_response(ApplyTemplateResponse(prompt=await unless_disconnected(request.receive, rendering)))
    except TemplateFailure as error:
        raise InvalidRequestError(str(error), param="messages", code="chat_template_error") from error


@router.post("/detokenize", responses={200: {"model": DetokenizeResponse}}, response_class=Response)
async def detokenize(body: DetokenizeRequest, request: Request, service: ServiceDependency) -> Response:
    """The text of token ids."""
    service.require_model(body.model)
    tokenizer = require_tokenizer(service, param="tokens")
    largest = max(body.tokens, default=0)
    if largest >= tokenizer.vocab_size:
        raise InvalidRequestError(
            f"tokens: {str(largest)[:24]} is outside the vocabulary of {tokenizer.vocab_size:,} tokens",
            param="tokens",
            code="invalid_value",
        )
    stream = TextStream(tokenizer.vocabulary, skip_special=body.skip_special_tokens is True, at_start=True)

    def decode() -> Response:
        text = "".join([stream.push(token_id) for token_id in body.tokens] + [stream.finish(is_whole=True)])
        if body.return_token_texts is not True:
            return json_response(DetokenizeResponse(prompt=text))
        answer = DetokenizeResponse(prompt=text, token_texts=[])
        return _with_lists(
            answer,
            body.tokens,
            token_texts=lambda token: tokenizer.vocabulary.bytes_of(token).decode("utf-8", "replace"),
        )

    decoding = service.texts.run(owner_of(request), len(body.tokens), decode)
    return await unless_disconnected(request.receive, decoding)


def _with_lists(answer: ResponseModel, token_ids: list[int], **lists: Callable[[int], object]) -> Response:
    """An answer in which each of these lists, empty so far, has an entry for each token.

    Long ones are written piece by piece, so that in a thread of their own they leave others their turns.
    """
    parts = [answer.to_json()]
    for name, entry in lists.items():
        before, _, after = parts.pop().partition(f'"{name}":[]'.encode())
        pieces = (token_ids[begin : begin + PIECE] for begin in range(0, len(token_ids), PIECE))
        written = b",".join(orjson.dumps([entry(token_id) for token_id in piece])[1:-1] for piece in pieces)
        parts += [before, f'"{name}":['.encode(), written, b"]", after]
    return Response(b"".join(parts), media_type="application/json")


@router.get("/tokenizer_info", responses={200: {"model": TokenizerInfo}}, response_class=Response)
async def tokenizer_info(service: ServiceDependency) -> Response:
    """Special tokens and chat template."""
    tokenizer = service.tokenizer
    if tokenizer is None:
        raise NotFoundError("this model has no tokenizer", code="no_tokenizer")
    tokens = tokenizer.special_tokens
    return json_response(
        TokenizerInfo(
            tokenizer_class=tokenizer.tokenizer_class,
            vocab_size=tokenizer.vocab_size,
            bos_token=tokens.get("bos_token"),
            eos_token=tokens.get("eos_token"),
            pad_token=tokens.get("pad_token"),
            unk_token=tokens.get("unk_token"),
            chat_template=tokenizer.chat_template,
        )
    )
