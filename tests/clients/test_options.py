"""The client's options are those that the server takes, no fewer and no more."""

from clients.types import GenerationOptions, Message
from server.protocol.chat import ChatRequest, MessageIn
from server.protocol.completions import CompletionRequest

OWN = {"model", "prompt", "messages", "stream"}
"""Arguments and methods of the client rather than options."""
WITHOUT_EFFECT = {"user"}
"""Accepted by the server like any field that it does not know."""


def test_every_field_of_a_request_is_an_option() -> None:
    fields = {*CompletionRequest.model_fields, *ChatRequest.model_fields} - OWN
    assert {*GenerationOptions.__annotations__} == fields | WITHOUT_EFFECT


def test_every_field_of_a_message_can_be_sent() -> None:
    assert {*Message.__annotations__} == {*MessageIn.model_fields}
