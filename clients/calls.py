"""The requests that the client makes, as plain values: one for each method, shared by sync and async."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar, cast
from urllib.parse import quote

import httpx
from pydantic import ValidationError

from clients.errors import APIResponseError
from clients.types import (
    ChatChunk,
    ChatCompletion,
    Completion,
    Detokenized,
    GenerationOptions,
    Health,
    Message,
    Model,
    ModelList,
    Prompt,
    Tokenized,
)

ResultT = TypeVar("ResultT")

FILE_MEDIA_TYPE = "application/octet-stream"
INCLUDE_USAGE = {"include_usage": True}


@dataclass(frozen=True, slots=True)
class Call(Generic[ResultT]):
    """One request and how to read its answer.

    Attributes:
        path: below the server's root, e.g. `/v1/models`.
        body: sent as JSON; None: no body.
        content: a file to send in place of a body.
        parse: from the decoded JSON of the answer (of each chunk, for a stream), or from the bytes of a file.
        retry: whether the usual retries apply.
    """

    method: Literal["GET", "POST", "DELETE"]
    path: str
    parse: Callable[[object], ResultT]
    body: Mapping[str, Any] | None = None
    retry: bool = True
    content: bytes | None = None


def complete(model: str, prompt: Prompt, options: GenerationOptions) -> Call[Completion]:
    """`POST /v1/completions`, the answer as a whole."""
    return Call("POST", "/v1/completions", Completion.model_validate, {"model": model, "prompt": prompt, **options})


def stream_complete(model: str, prompt: Prompt, options: GenerationOptions) -> Call[Completion]:
    """`POST /v1/completions`, the answer as a stream of chunks."""
    return Call("POST", "/v1/completions", Completion.model_validate, _streamed(model, "prompt", prompt, options))


def chat(model: str, messages: Iterable[Message], options: GenerationOptions) -> Call[ChatCompletion]:
    """`POST /v1/chat/completions`, the answer as a whole."""
    body = {"model": model, "messages": list(messages), **options}
    return Call("POST", "/v1/chat/completions", ChatCompletion.model_validate, body)


def stream_chat(model: str, messages: Iterable[Message], options: GenerationOptions) -> Call[ChatChunk]:
    """`POST /v1/chat/completions`, the answer as a stream of chunks."""
    body = _streamed(model, "messages", list(messages), options)
    return Call("POST", "/v1/chat/completions", ChatChunk.model_validate, body)


def models() -> Call[tuple[Model, ...]]:
    """`GET /v1/models`."""
    return Call("GET", "/v1/models", lambda body: ModelList.model_validate(body).data)


def model(name: str) -> Call[Model]:
    """`GET /v1/models/{id}`; ids may contain slashes."""
    return Call("GET", f"/v1/models/{quote(name)}", Model.model_validate)


def tokenize(model: str, text: str, *, add_special_tokens: bool) -> Call[tuple[int, ...]]:
    """`POST /tokenize`."""
    body = {"model": model, "prompt": text, "add_special_tokens": add_special_tokens}
    return Call("POST", "/tokenize", lambda answer: Tokenized.model_validate(answer).tokens, body)


def detokenize(model: str, tokens: Sequence[int]) -> Call[str]:
    """`POST /detokenize`."""
    body = {"model": model, "tokens": list(tokens)}
    return Call("POST", "/detokenize", lambda answer: Detokenized.model_validate(answer).prompt, body)


def health() -> Call[Health]:
    """`GET /health`: never repeated, since the question is how the server is now."""
    # Some servers answer with an empty body.
    return Call("GET", "/health", lambda body: Health.model_validate({} if body is None else body), retry=False)


def ready() -> Call[None]:
    """`GET /ready`: never repeated, since the question is how the server is now."""
    return Call("GET", "/ready", lambda _: None, retry=False)


def server_root(base_url: str) -> str:
    """The address below which `/v1` lies, from one given with or without it.

    Raises:
        ValueError: not an http(s) URL.
    """
    url = httpx.URL(base_url)
    if url.scheme not in ("http", "https") or url.host == "":
        raise ValueError(f"base_url must look like http://host:port or http://host:port/v1, not {base_url!r}")
    return str(url.copy_with(query=None, fragment=None)).rstrip("/").removesuffix("/v1")


def read_answer(call: Call[ResultT], response: httpx.Response) -> ResultT:
    """The typed answer of a response that is no error and was read.

    Raises:
        APIResponseError: the body is not what the call expects.
    """
    if response.content == b"":
        return parse_value(call.parse, None)
    if response.headers.get("content-type", "").startswith((FILE_MEDIA_TYPE, "text/plain")):
        return parse_value(call.parse, response.content)
    try:
        body = response.json()
    except ValueError as error:
        raise APIResponseError(f"the answer to {call.method} {call.path} is not JSON") from error
    return parse_value(call.parse, body)


def parse_value(parse: Callable[[object], ResultT], value: object) -> ResultT:
    """Applies a call's parser.

    Raises:
        APIResponseError: the value is not what the parser expects.
    """
    try:
        return parse(value)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise APIResponseError(f"the answer is not OpenAI-style: {place}: {first['msg']}") from error


def _streamed(model: str, input_name: str, value: object, options: GenerationOptions) -> dict[str, Any]:
    body = {"model": model, input_name: value, "stream_options": INCLUDE_USAGE, **cast(Mapping[str, Any], options)}
    return {**body, "stream": True}
