"""`/v1/conversations` through the official client: kept lists of items that responses answer and extend."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.e2e.serving import Server, serving
from tests.tiny_models import write_tiny_model

HELLO: Any = {"type": "message", "role": "user", "content": "Hello"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = write_tiny_model(tmp_path_factory.mktemp("models") / "tiny")
    states = tmp_path_factory.mktemp("states")
    with serving(folder, "--states-folder", str(states), "--prefix-cache-memory", "0") as running:
        yield running


def answer(server: Server, conversation: str, text: str = "Hé?", **more: Any) -> Any:
    options = {"max_output_tokens": 8, "temperature": 0, **more}
    return server.client.responses.create(model=server.model, input=text, conversation=conversation, **options)


def items(server: Server, conversation: str) -> list[Any]:
    return list(server.client.conversations.items.list(conversation, order="asc"))


def test_a_conversation_is_created_read_changed_and_deleted(server: Server) -> None:
    conversations = server.client.conversations
    made = conversations.create(metadata={"topic": "a"}, items=[HELLO])
    assert (made.object, made.metadata) == ("conversation", {"topic": "a"})
    assert conversations.retrieve(made.id) == made
    changed = conversations.update(made.id, metadata={"topic": "b"})
    assert changed.metadata == {"topic": "b"}
    assert conversations.retrieve(made.id) == changed
    assert [item.content[0].text for item in items(server, made.id)] == ["Hello"]
    gone = conversations.delete(made.id)
    assert (gone.id, gone.object, gone.deleted) == (made.id, "conversation.deleted", True)
    with pytest.raises(openai.NotFoundError) as caught:
        conversations.retrieve(made.id)
    assert caught.value.code == "conversation_not_found"


def test_an_item_may_be_as_long_as_a_prompt(server: Server) -> None:
    made = server.client.conversations.create()
    text = "long " * 80_000
    server.client.conversations.items.create(made.id, items=[{**HELLO, "content": text}])
    assert [item.content[0].text for item in items(server, made.id)] == [text]


def test_items_are_added_paged_read_and_deleted(server: Server) -> None:
    conversations = server.client.conversations
    made = conversations.create()
    texts = [f"text {number}" for number in range(5)]
    added = conversations.items.create(
        made.id, items=[{"type": "message", "role": "user", "content": text} for text in texts]
    )
    assert [item.content[0].text for item in added.data] == texts  # type: ignore[union-attr]
    assert len({item.id for item in added.data}) == 5
    page = conversations.items.list(made.id, limit=2)
    assert [item.content[0].text for item in page.data] == ["text 4", "text 3"]  # type: ignore[union-attr]
    assert page.has_more
    assert [item.content[0].text for item in conversations.items.list(made.id, limit=2)] == texts[::-1]  # type: ignore[union-attr]
    one = added.data[1]
    assert conversations.items.retrieve(one.id, conversation_id=made.id) == one
    assert conversations.items.delete(one.id, conversation_id=made.id).id == made.id
    assert [item.id for item in items(server, made.id)] == [item.id for item in added.data if item is not one]
    with pytest.raises(openai.NotFoundError) as caught:
        conversations.items.retrieve(one.id, conversation_id=made.id)
    assert caught.value.code == "item_not_found"


@pytest.mark.parametrize("stream", [False, True])
def test_a_response_extends_its_conversation_and_continues_from_its_state(server: Server, stream: bool) -> None:
    made = server.client.conversations.create(items=[HELLO])
    if stream:
        (first,) = [event.response for event in answer(server, made.id, stream=True) if "complete" in event.type]
    else:
        first = answer(server, made.id)
    assert first.conversation.id == made.id
    found = items(server, made.id)
    assert [item.role for item in found] == ["user", "user", "assistant"]
    assert found[2].content[0].text == first.output_text
    second = answer(server, made.id, "And?")
    num_tokens = first.usage.input_tokens + first.usage.output_tokens
    assert second.usage.input_tokens_details.cached_tokens in (num_tokens, num_tokens - 1)
    # The same conversation by hand.
    by_hand = server.client.responses.create(
        model=server.model, input="And?", previous_response_id=first.id, max_output_tokens=8, temperature=0
    )
    assert second.output_text == by_hand.output_text
    assert len(items(server, made.id)) == 5


def test_a_conversation_whose_items_changed_is_read_again_as_it_is_now(server: Server) -> None:
    made = server.client.conversations.create()
    answer(server, made.id)
    for item in items(server, made.id):
        server.client.conversations.items.delete(item.id, conversation_id=made.id)
    alone = server.client.responses.create(model=server.model, input="And?", max_output_tokens=8, temperature=0)
    again = answer(server, made.id, "And?")
    assert again.output_text == alone.output_text
    assert again.usage.input_tokens == alone.usage.input_tokens
    assert again.usage.input_tokens_details.cached_tokens == 0


def test_instructions_are_those_of_each_response(server: Server) -> None:
    made = server.client.conversations.create()
    first = answer(server, made.id, instructions="Be brief.")
    second = answer(server, made.id, "And?", instructions="Be long.")
    words = [{"role": "user", "content": "Hé?"}, {"role": "assistant", "content": first.output_text}]
    by_hand: Any = [*words, {"role": "user", "content": "And?"}]
    alone = server.client.responses.create(
        model=server.model, input=by_hand, instructions="Be long.", max_output_tokens=8, temperature=0
    )
    assert second.usage.input_tokens == alone.usage.input_tokens
    third = answer(server, made.id, "And?", instructions="Be long.")
    assert third.usage.input_tokens_details.cached_tokens > 0


def test_what_deletes_a_response_leaves_the_conversation(server: Server) -> None:
    made = server.client.conversations.create()
    first = answer(server, made.id)
    server.client.responses.delete(first.id)
    assert [item.role for item in items(server, made.id)] == ["user", "assistant"]
    assert answer(server, made.id).usage.input_tokens_details.cached_tokens == 0


def test_calls_of_functions_are_items_that_later_inputs_answer(server: Server) -> None:
    made = server.client.conversations.create()
    tool: Any = {"type": "function", "name": "look_up", "parameters": {"type": "object", "properties": {}}}
    answer(server, made.id, tools=[tool], tool_choice="required", max_output_tokens=200)
    (call, *_) = [item for item in items(server, made.id) if item.type == "function_call"]
    output: Any = [{"type": "function_call_output", "call_id": call.call_id, "output": "found"}]
    answer(server, made.id, output, tools=[tool])
    assert "function_call_output" in [item.type for item in items(server, made.id)]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"conversation": "conv_1", "previous_response_id": "resp_1"}, "conversation"),
        ({"conversation": {}}, "conversation"),
        ({"conversation": 5}, "conversation"),
    ],
    ids=str,
)
def test_a_bad_conversation_is_a_400(server: Server, fields: Any, param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        server.client.responses.create(model=server.model, input="x", extra_body=fields)
    assert caught.value.param == param


def test_a_conversation_that_is_not_there_is_a_404_and_is_no_response(server: Server) -> None:
    made = server.client.conversations.create()
    for missing in ("conv_nothing", "resp_nothing", "x" * 90):
        with pytest.raises(openai.NotFoundError):
            answer(server, missing)
    for ask in (server.client.responses.retrieve, server.client.responses.delete, server.client.responses.cancel):
        with pytest.raises(openai.NotFoundError):
            ask(made.id)
    with pytest.raises(openai.BadRequestError):
        server.client.conversations.items.create(made.id, items=[HELLO] * 21)


def test_a_conversation_outlives_the_server(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "tiny")
    options = ("--states-folder", str(tmp_path / "states"))
    with serving(folder, *options) as server:
        made = server.client.conversations.create(items=[HELLO])
        first = answer(server, made.id)
    with serving(folder, *options) as server:
        assert server.client.conversations.retrieve(made.id) == made
        assert [item.role for item in items(server, made.id)] == ["user", "user", "assistant"]
        second = answer(server, made.id)
        num_tokens = first.usage.input_tokens + first.usage.output_tokens
        assert second.usage.input_tokens_details.cached_tokens in (num_tokens, num_tokens - 1)
