"""Tables of the site that are made from the code: each setting, each field of each request."""

import re
import typing
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from benchmarks.gpu.models import config_of
from dijiang_model.families import build_model
from server.protocol.chat import ChatRequest
from server.protocol.completions import CompletionRequest
from server.protocol.dialects.anthropic import CountTokensRequest, MessagesRequest
from server.protocol.dialects.ollama import OllamaChatRequest, OllamaGenerateRequest
from server.protocol.responses import ResponseRequest
from server.protocol.state_creation import CreateStateRequest
from server.protocol.states import ForkRequest, PointRequest, RewindRequest
from server.protocol.tokenization import ApplyTemplateRequest, DetokenizeRequest, TokenizeRequest
from server.startup.settings import PREFIX, Settings, flag_of

REQUESTS: Mapping[str, type[BaseModel]] = {
    "POST /v1/chat/completions": ChatRequest,
    "POST /v1/completions": CompletionRequest,
    "POST /v1/responses": ResponseRequest,
    "POST /v1/messages": MessagesRequest,
    "POST /v1/messages/count_tokens": CountTokensRequest,
    "POST /api/chat": OllamaChatRequest,
    "POST /api/generate": OllamaGenerateRequest,
    "POST /v1/states": CreateStateRequest,
    "POST /v1/states/{id}/fork": ForkRequest,
    "POST /v1/states/{id}/points": PointRequest,
    "POST /v1/states/{id}/rewind": RewindRequest,
    "POST /tokenize": TokenizeRequest,
    "POST /detokenize": DetokenizeRequest,
    "POST /apply-template": ApplyTemplateRequest,
}


def settings_table() -> str:
    """A section for each group of `dijiang serve --help`."""
    groups: dict[str, list[list[str]]] = {}
    for name, field in Settings.model_fields.items():
        extra = field.json_schema_extra
        group = str(extra["panel"]) if isinstance(extra, dict) else "Others"
        flag = "MODEL" if name == "model" else flag_of(name)
        row = [f"`{flag}`", f"`{PREFIX}{name.upper()}`", _default(field.default), _text(field.description)]
        groups.setdefault(group, []).append(row)
    head = ("flag", "environment", "default", "what it does")
    return "\n\n".join(f"## {group}\n\n{_table(head, rows)}" for group, rows in groups.items())


def fields_table() -> str:
    """A section for each endpoint that takes a body."""
    sections = []
    for endpoint, model in REQUESTS.items():
        rows = [
            [
                f"`{field.alias or name}`",
                f"`{_kind(field.annotation)}`",
                _default(field.default),
                _text(field.description),
            ]
            for name, field in sorted(model.model_fields.items())
        ]
        sections.append(f"## {endpoint}\n\n{_table(('field', 'type', 'default', 'meaning'), rows)}")
    return "\n\n".join(sections)


def _table(head: tuple[str, ...], rows: list[list[str]]) -> str:
    return "\n".join(["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)])


def _text(description: str | None) -> str:
    words = " ".join((description or "").split())
    return words.replace("|", "\\|").replace("<", "&lt;").replace("[", "\\[")


def _default(value: object) -> str:
    if value is None or value is PydanticUndefined or value == ():
        return ""
    human = getattr(value, "human_readable", None)
    return f"`{human(separator='')}`" if human is not None else f"`{value}`"


def _kind(annotation: Any) -> str:
    """A type in words: names of classes, literal words, joined by "or"."""
    return " or ".join(dict.fromkeys(_kinds(annotation))).replace("|", "/")


def _kinds(annotation: Any) -> Iterator[str]:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is type(None):
        yield "null"
    elif origin is Literal:
        yield from (f'"{word}"' if isinstance(word, str) else str(word).lower() for word in arguments)
    elif origin in (list, tuple, set, frozenset):
        yield f"list of {_kind(arguments[0])}" if arguments else "list"
    elif isinstance(origin, type) and issubclass(origin, Mapping):
        yield "object"
    elif arguments:  # unions, Annotated
        for argument in arguments if typing.get_origin(annotation) is not typing.Annotated else arguments[:1]:
            yield from _kinds(argument)
    else:
        names = {"str": "string", "int": "integer", "float": "number", "bool": "boolean", "dict": "object"}
        name = getattr(annotation, "__name__", str(annotation))
        yield names.get(name, "any" if name == "Any" else name)


def sizing_table() -> str:
    """Bytes of a conversation of some networks, and how many fit."""
    rows = []
    for name, num_bytes in _state_bytes().items():
        fit = (f"{gibibytes * 2**30 // num_bytes:,}" for gibibytes in (1, 8, 64))
        rows.append([name, f"{num_bytes:,}", *fit])
    return _table(("model, state", "bytes of a conversation", "in 1 GiB", "in 8 GiB", "in 64 GiB"), rows)


def _state_bytes() -> dict[str, int]:
    card = (Path(__file__).parents[2] / "dijiang_model/adapters/smollm2-135m-dijiang.md").read_text()
    measured = re.search(r"places a head, ([\d,]+) bytes", card)
    assert measured is not None
    found = {"the default model": int(measured[1].replace(",", ""))}
    shapes = {"smollm2-135m": "SmolLM2-135M", "pythia-2.8b": "Pythia-2.8B", "llama-2-7b": "LLaMA-2-7B"}
    for shape, name in shapes.items():
        model = build_model(config_of(shape, "hybrid"), device="meta", dtype=torch.float32)
        for dtype, words in {torch.float32: "fp32", torch.bfloat16: "bf16", torch.int8: "int8"}.items():
            found[f"{name}, window 60+4, {words}"] = model.keep_states_in(dtype).state_spec.bytes_per_slot
    return found


TABLES: Mapping[str, Callable[[], str]] = {"settings": settings_table, "fields": fields_table, "sizing": sizing_table}
"""By the name in the marker `<!-- table: NAME -->` of a page."""
