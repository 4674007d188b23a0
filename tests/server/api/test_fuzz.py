"""Whatever JSON comes, the answer is a success or an error of the client, in the envelope; never a 500."""

from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from server.protocol.chat import ChatRequest
from server.protocol.completions import CompletionRequest
from server.protocol.tokenization import DetokenizeRequest, TokenizeRequest
from server.protocol.unsupported import CHAT_FIELDS, COMPLETION_FIELDS
from tests.server.conftest import Loopback

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12) | st.sampled_from(["<|im_end|>", "text", "user"])
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.integers(-3, 300)
    | st.floats(allow_nan=False, allow_infinity=False)
    | TEXT
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT | st.just("type"), inner, max_size=3),
    max_leaves=8,
)
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "assistant", "system"]) | VALUES, "content": TEXT | VALUES}
    ),
    max_size=3,
)
ROUTES: list[tuple[str, list[str], dict[str, st.SearchStrategy[Any]]]] = [
    ("/v1/completions", [*CompletionRequest.model_fields, *COMPLETION_FIELDS], {"prompt": TEXT}),
    ("/v1/chat/completions", [*ChatRequest.model_fields, *CHAT_FIELDS], {"messages": MESSAGES}),
    ("/tokenize", [*TokenizeRequest.model_fields], {"prompt": TEXT}),
    ("/detokenize", [*DetokenizeRequest.model_fields], {"tokens": st.lists(st.integers(0, 259), max_size=5)}),
]


@st.composite
def requests(draw: st.DrawFn) -> tuple[str, Any]:
    """A route, and a body of which a few fields have random values."""
    path, fields, required = draw(st.sampled_from(ROUTES))
    body = draw(st.fixed_dictionaries(required))
    return path, body | draw(st.dictionaries(st.sampled_from(fields), VALUES, max_size=3))


@given(request=requests())
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_any_body_gets_a_success_or_an_error_of_the_client(server: Loopback, request: tuple[str, Any]) -> None:
    path, body = request
    answer = server.http.post(path, json=body)
    assert answer.status_code in {200, 400, 404, 504}, answer.text
    if answer.status_code != 200:
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
