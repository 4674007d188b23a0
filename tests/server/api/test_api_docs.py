"""docs/api.md names every field of a request, and no other."""

import re
from pathlib import Path

from server.protocol.chat import ChatRequest
from server.protocol.completions import CompletionRequest
from server.protocol.responses import ResponseRequest
from server.protocol.unsupported import CHAT_FIELDS, COMPLETION_FIELDS

PAGE = (Path(__file__).parents[3] / "docs/api.md").read_text()


def named_in_tables() -> set[str]:
    """Fields in the first column of the tables that are not of endpoints."""
    cells = [line.split("|")[1] for line in PAGE.splitlines() if line.startswith("| `")]
    return {name for cell in cells for name in re.findall(r"`([a-z_]+)`", cell)}


def test_every_field_is_documented() -> None:
    requests = (CompletionRequest, ChatRequest, ResponseRequest)
    assert named_in_tables() == {name for request in requests for name in request.model_fields}


def test_every_field_that_is_refused_is_documented() -> None:
    refused = PAGE.split("## Not here")[1]
    names = {name for name in (*COMPLETION_FIELDS, *CHAT_FIELDS) if not name.startswith("guided_")}
    assert names <= set(re.findall(r"`([a-z_]+)`", refused))
