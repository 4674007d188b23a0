"""Bodies of an OpenAI-style server, for the tests."""

from typing import Any

from tests.clients.loopback import Exchange

USAGE = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
MODELS: dict[str, Any] = {
    "object": "list",
    "data": [{"id": "tiny", "object": "model", "created": 1, "owned_by": "test"}],
}


def error(message: str = "no", *, type: str | None = None, param: str | None = None, code: str | None = None) -> Any:
    return {"error": {"message": message, "type": type, "param": param, "code": code}}


def completion(text: str, finish_reason: str | None = None, index: int = 0, usage: Any = None) -> dict[str, Any]:
    choice = {"index": index, "text": text, "logprobs": None, "finish_reason": finish_reason}
    return {"id": "cmpl-1", "object": "text_completion", "created": 1, "model": "tiny", "choices": [choice]} | (
        {} if usage is None else {"usage": usage}
    )


def chat(content: str, usage: Any = None) -> dict[str, Any]:
    message = {"role": "assistant", "content": content}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}
    return {"id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": "tiny", "choices": [choice]} | (
        {} if usage is None else {"usage": usage}
    )


def chat_chunk(delta: dict[str, Any], finish_reason: str | None = None) -> dict[str, Any]:
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
    return {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "tiny", "choices": [choice]}


def chat_chunks(*pieces: str) -> list[dict[str, Any]]:
    """A whole chat stream, usage included, as `/v1/chat/completions` sends it."""
    return [
        chat_chunk({"role": "assistant", "content": ""}),
        *(chat_chunk({"content": piece}) for piece in pieces),
        chat_chunk({}, "stop"),
        {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "tiny", "choices": []}
        | {"usage": USAGE},
    ]


def echo(exchange: Exchange) -> None:
    """A server of one model, which repeats what was said last."""
    if exchange.path == "/v1/models":
        exchange.answer(200, MODELS)
    else:
        exchange.stream(*chat_chunks("You said: ", exchange.body["messages"][-1]["content"]))
