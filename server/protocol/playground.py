"""`POST /playground/markdown`."""

from pydantic import Field

from server.playground.markdown import MAX_CHARACTERS
from server.protocol.wire import RequestModel


class MarkdownRequest(RequestModel):
    """A text to show on the page."""

    text: str = Field(max_length=MAX_CHARACTERS)
    """Markdown."""
