"""Every place where clients of other servers put the form of an answer: honoured, or refused by name."""

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest

from tests.e2e.serving import Server, serving
from tests.tiny_models import write_tiny_model

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"enum": ["Oslo", "Lima"]}, "sizes": {"type": "array", "minItems": 2, "maxItems": 2}},
    "required": ["city", "sizes"],
}
SCHEMA["properties"]["sizes"]["items"] = {"type": "integer", "minimum": 1, "maximum": 9}
TEXT = json.dumps(SCHEMA)
PATTERN = "[ab]{3}"
SAMPLING = {"max_tokens": 200, "temperature": 1, "seed": 5}
GBNF = 'root ::= ("a" | "b") ("a" | "b") ("a" | "b")'


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(write_tiny_model(tmp_path_factory.mktemp("models") / "tiny")) as running:
        yield running


def form(kind: str, **fields: Any) -> dict[str, Any]:
    return {"response_format": {"type": kind, **fields}}


AS_SCHEMA: dict[str, dict[str, Any]] = {
    "OpenAI": form("json_schema", json_schema={"name": "city", "schema": SCHEMA, "strict": True}),
    "LM Studio": form("json_schema", json_schema={"name": "city", "schema": SCHEMA, "strict": "true"}),
    "Fireworks, without a name": form("json_schema", json_schema={"schema": SCHEMA}),
    "Fireworks, Together, llama.cpp: json_object with a schema": form("json_object", schema=SCHEMA),
    "Together, llama.cpp: json_schema with a schema beside it": form("json_schema", schema=SCHEMA),
    "Responses, flat": form("json_schema", name="city", schema=SCHEMA, strict=True),
    "TGI: json": form("json", value=SCHEMA),
    "TGI: json_object": form("json_object", value=SCHEMA),
    "TGI: json_schema": form("json_schema", value={"name": "city", "schema": SCHEMA}),
    "nulls": form("json_object", schema=SCHEMA, json_schema=None, pattern=None, grammar=None),
    "llama.cpp": {"json_schema": SCHEMA},
    "SGLang": {"json_schema": TEXT},
    "vLLM, earlier": {"guided_json": SCHEMA},
    "vLLM, earlier, as text": {"guided_json": TEXT, "guided_decoding_backend": "xgrammar"},
    "vLLM": {"structured_outputs": {"json": SCHEMA}},
    "vLLM, as text": {"structured_outputs": {"json": TEXT, "disable_fallback": True}},
    "vLLM, with options": {
        "structured_outputs": {"json": SCHEMA, "disable_additional_properties": True, "disable_any_whitespace": True}
    },
    "NVIDIA": {"nvext": {"guided_json": SCHEMA, "guided_decoding_backend": None}},
}
AS_PATTERN: dict[str, dict[str, Any]] = {
    "Together: regex": form("regex", pattern=PATTERN),
    "TGI: regex": form("regex", value=PATTERN),
    "SGLang: regex": {"regex": PATTERN},
    "SGLang: ebnf": {"ebnf": GBNF},
    "llama.cpp: grammar": {"grammar": GBNF, "grammar_lazy": False},
    "Fireworks: grammar": form("grammar", grammar=GBNF),
    "vLLM: regex": {"structured_outputs": {"regex": PATTERN}},
    "vLLM: grammar": {"structured_outputs": {"grammar": GBNF}},
    "vLLM, earlier: regex": {"guided_regex": PATTERN},
    "vLLM, earlier: grammar": {"guided_grammar": GBNF},
    "vLLM: choice": {"structured_outputs": {"choice": ["aba", "bab"]}},
    "vLLM, earlier: choice": {"guided_choice": ["aba", "bab"]},
    "NVIDIA: choice": {"nvext": {"guided_choice": ["aba", "bab"]}},
}


def post(server: Server, path: str, fields: dict[str, Any]) -> Any:
    told = {"prompt": "Say"} if path == "/v1/completions" else {"messages": [{"role": "user", "content": "Say"}]}
    answer = server.client.with_options(timeout=60).post(
        path.removeprefix("/v1"),
        cast_to=object,
        body={"max_tokens": 200, "temperature": 1, "seed": 5, **told, **fields},
    )
    assert isinstance(answer, dict)
    choice = answer["choices"][0]
    return choice["text"] if "text" in choice else choice["message"]["content"]


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
@pytest.mark.parametrize("fields", AS_SCHEMA.values(), ids=AS_SCHEMA)
def test_a_schema_is_kept_wherever_it_stands(server: Server, fields: dict[str, Any], path: str) -> None:
    city = json.loads(post(server, path, fields))
    assert city["city"] in ("Oslo", "Lima")
    assert [type(size) for size in city["sizes"]] == [int, int]


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
@pytest.mark.parametrize("fields", AS_PATTERN.values(), ids=AS_PATTERN)
def test_a_pattern_is_kept_wherever_it_stands(server: Server, fields: dict[str, Any], path: str) -> None:
    assert re.fullmatch(PATTERN, post(server, path, fields))


@pytest.mark.parametrize("fields", [{"guided_json": {}}, {"json_schema": {}}, {"structured_outputs": {"json": {}}}])
def test_an_empty_schema_is_kept_with_any_json(server: Server, fields: dict[str, Any]) -> None:
    biased = {"stop_token_ids": [], "logit_bias": {}, "max_tokens": 1, "n": 4, "temperature": 2}
    texts = server.client.post("/completions", cast_to=object, body={"prompt": "Say", "seed": 5, **biased, **fields})
    assert isinstance(texts, dict)
    assert all(choice["text"][:1] in '{["-0123456789tfn' for choice in texts["choices"])


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "vLLM, SGLang: structural tags": (form("structural_tag", structures=[], triggers=[]), "response_format"),
    "SGLang: structural_tag": ({"structural_tag": "{}"}, "structural_tag"),
    "vLLM: structural_tag": ({"structured_outputs": {"structural_tag": "{}"}}, "structural_tag"),
    "llama.cpp: lazy grammars": ({"grammar": GBNF, "grammar_lazy": True}, "grammar_lazy"),
    "llama.cpp: triggers": ({"grammar": GBNF, "grammar_triggers": [{"type": 0, "value": "x"}]}, "grammar_triggers"),
    "NVIDIA: more": ({"nvext": {"guided_json": SCHEMA, "greed_sampling": True}}, "nvext.greed_sampling"),
    "a type of nobody": (form("xml"), "response_format.type"),
    "a pattern without its type": (form("text", pattern=PATTERN), "response_format"),
    "a type without its pattern": (form("regex"), "response_format"),
    "two at once": ({**form("json_object"), "guided_regex": PATTERN}, "structured_outputs"),
}


@pytest.mark.parametrize(("fields", "param"), REFUSED.values(), ids=REFUSED)
def test_what_is_not_built_is_a_400_that_names_it(server: Server, fields: dict[str, Any], param: str) -> None:
    with pytest.raises(Exception, match=param.split(".")[0]) as caught:
        post(server, "/v1/chat/completions", fields)
    assert getattr(caught.value, "status_code", None) == 400
    assert getattr(caught.value, "param", None) == param


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("fields", [AS_SCHEMA["OpenAI"], form("json_object", schema=SCHEMA)], ids=["openai", "object"])
def test_white_space_is_a_space_behind_commas_and_colons_at_most(
    server: Server, fields: dict[str, Any], seed: int
) -> None:
    text = post(server, "/v1/chat/completions", {**fields, "seed": seed})
    assert re.fullmatch(r'\{"city": ?"(Oslo|Lima)", ?"sizes": ?\[\d, ?\d\]\}', text)


WHITE: dict[str, tuple[dict[str, Any], str]] = {
    "none": ({"structured_outputs": {"json": SCHEMA, "disable_any_whitespace": True}}, ""),
    "one of two": ({"structured_outputs": {"json": SCHEMA, "whitespace_pattern": "[ \\n]"}}, "[ \n]?"),
    "as it was called": ({"guided_json": SCHEMA, "guided_whitespace_pattern": "\\n"}, "\n?"),
}


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("fields", "white"), WHITE.values(), ids=WHITE)
def test_white_space_is_what_the_request_says(server: Server, fields: dict[str, Any], white: str, seed: int) -> None:
    text = post(server, "/v1/chat/completions", {**fields, "seed": seed})
    assert json.loads(text)
    outside = re.sub(r'"[a-zA-Z]+"', "x", text)
    assert re.fullmatch(r"\{w?xw?:w?xw?,w?xw?:w?\[w?\dw?,w?\dw?\]w?\}".replace("w?", white), outside), text
