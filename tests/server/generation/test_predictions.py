"""Predicted answers over HTTP, with a real engine on a tiny model: the same answers, and every guess counted."""

from collections.abc import Iterator
from typing import Any

import pytest

from server.engine.speculation import rules
from server.engine.speculation.index import MAX_PREDICTED
from server.text.tokenizer import Tokenizer
from tests.server.conftest import OPTIONS, Loopback, serve
from tests.server.engine.fakes import FixedCosts
from tests.server.tiny_engine import TinyEngine
from tests.tiny_models import tiny_network

LETTERS = [*range(ord("a"), ord("z") + 1)]
NUM_TOKENS = 60


@pytest.fixture(scope="module")
def guessing(byte_tokenizer: Tokenizer) -> Iterator[Loopback]:
    """Its costs are fixed: what a row costs a tiny model on a busy machine is a matter of chance."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rules, "StepCosts", FixedCosts)
        engine = TinyEngine(tiny_network(), "tiny")
    with serve(engine, OPTIONS, byte_tokenizer) as running:  # type: ignore[arg-type]
        yield running


def ask(server: Loopback, prediction: Any = None, **fields: Any) -> Any:
    # Letters alone, so that the answer of a random model is a text that can be predicted.
    extra = {"allowed_token_ids": LETTERS, **({} if prediction is None else {"prediction": prediction})}
    return server.openai.chat.completions.create(
        **{
            "model": "org/tiny",
            "messages": [{"role": "user", "content": "Hi"}],
            "max_tokens": NUM_TOKENS,
            "temperature": 0,
            "extra_body": extra,
            **fields,
        }
    )


def content(text: str) -> dict[str, Any]:
    return {"type": "content", "content": text}


def counted(answer: Any) -> tuple[int, int]:
    details = answer.usage.completion_tokens_details
    return details.accepted_prediction_tokens, details.rejected_prediction_tokens


def text_of(answer: Any) -> str:
    text: str = answer.choices[0].message.content
    return text


def test_an_answer_is_the_same_with_a_right_a_changed_and_a_wrong_prediction(guessing: Loopback) -> None:
    plain = ask(guessing)
    text = text_of(plain)
    assert plain.usage.completion_tokens_details is None
    changed = text[:20] + "XYZ" + text[25:40] + text[41:]
    accepted = {}
    for name, predicted in (("right", text), ("changed", changed), ("wrong", "no, nothing of that" * 3)):
        before = guessing.engine.stats
        answer = ask(guessing, content(predicted))
        after = guessing.engine.stats
        assert text_of(answer) == text
        assert answer.usage.completion_tokens == NUM_TOKENS
        accepted[name], rejected = counted(answer)
        assert 0 <= accepted[name] <= after.num_accepted_tokens - before.num_accepted_tokens
        assert accepted[name] + rejected <= after.num_drafted_tokens - before.num_drafted_tokens
    assert NUM_TOKENS // 2 < accepted["changed"] < accepted["right"] < NUM_TOKENS
    assert accepted["wrong"] < 20


def test_text_parts_are_one_prediction(guessing: Loopback) -> None:
    text = text_of(ask(guessing))
    parts = [{"type": "text", "text": part} for part in (text[:30], text[30:])]
    answer = ask(guessing, {"type": "content", "content": parts})
    assert text_of(answer) == text
    assert counted(answer)[0] > NUM_TOKENS // 2


def test_a_stream_tells_the_same_counts_at_its_end(guessing: Loopback) -> None:
    text = text_of(ask(guessing))
    chunks = [*ask(guessing, content(text), stream=True, stream_options={"include_usage": True})]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == text
    accepted, rejected = counted(chunks[-1])
    assert NUM_TOKENS // 2 < accepted <= NUM_TOKENS
    assert rejected >= 0


def test_every_one_of_several_answers_is_guessed_from_it(guessing: Loopback) -> None:
    fields = {"n": 3, "temperature": 0.7, "seed": 4}
    plain = ask(guessing, **fields)
    texts = [choice.message.content for choice in plain.choices]
    answer = ask(guessing, content(texts[1]), **fields)
    assert [choice.message.content for choice in answer.choices] == texts
    assert counted(answer)[0] > NUM_TOKENS // 2


def test_guesses_behind_a_stop_text_are_no_tokens_of_the_answer(guessing: Loopback) -> None:
    text = text_of(ask(guessing))
    stop = text[30:33]
    plain = ask(guessing, stop=stop)
    answer = ask(guessing, content(text), stop=stop)
    assert text_of(answer) == text_of(plain) == text[: text.index(stop)]
    assert answer.usage.completion_tokens == plain.usage.completion_tokens
    assert counted(answer)[0] <= answer.usage.completion_tokens


def test_an_empty_prediction_predicts_nothing(guessing: Loopback) -> None:
    assert counted(ask(guessing, content(""))) == (0, 0)


def test_a_server_that_does_not_guess_takes_predictions_all_the_same(byte_tokenizer: Tokenizer) -> None:
    engine = TinyEngine(tiny_network(), "tiny", max_drafts=0)
    with serve(engine, OPTIONS, byte_tokenizer) as running:  # type: ignore[arg-type]
        text = text_of(ask(running))
        answer = ask(running, content(text))
        assert text_of(answer) == text
        assert counted(answer) == (0, 0)


@pytest.mark.parametrize(
    "prediction",
    [
        "text",
        {},
        {"type": "content"},
        {"type": "content", "content": 7},
        {"type": "content", "content": [{"type": "image_url"}]},
        {"type": "tokens", "content": "x"},
        {"type": "content", "content": "x" * (MAX_PREDICTED + 1)},
    ],
    ids=["no object", "empty", "no content", "number", "image", "other type", "too long"],
)
def test_what_is_no_prediction_is_refused_by_name(guessing: Loopback, prediction: Any) -> None:
    body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2, "prediction": prediction}
    answer = guessing.http.post("/v1/chat/completions", json=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"].startswith("prediction")


def test_completions_refuse_a_prediction_by_name(guessing: Loopback) -> None:
    answer = guessing.http.post("/v1/completions", json={"prompt": "x", "prediction": content("y")})
    assert answer.status_code == 400
    assert (answer.json()["error"]["param"], answer.json()["error"]["code"]) == ("prediction", "unsupported_parameter")
