"""The playground: one page that talks to this server's public API, with everything that it needs beside it.

Nothing is fetched from elsewhere, and the page has no right to (its content security policy says so). It holds no
secret, so it is served to everybody; what it asks the API for takes a key like any other program.
"""

import hashlib
from dataclasses import dataclass
from importlib.resources import files

PAGE = "index.html"
FOLDER = "/playground/"
MARKDOWN_PATH = "/playground/markdown"
MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".mjs": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
SECURITY_HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
}


@dataclass(frozen=True, slots=True)
class Asset:
    """A file of the page.

    Attributes:
        etag: changes with the content.
    """

    content: bytes
    media_type: str
    etag: str


def load_assets() -> dict[str, Asset]:
    """Every file of the page, by the path that it is served at; `/` is the page itself."""
    assets: dict[str, Asset] = {}
    for file in files("server.playground").iterdir():
        suffix = file.name[file.name.rfind(".") :]
        if suffix not in MEDIA_TYPES:
            continue
        content = file.read_bytes()
        etag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
        path = "/" if file.name == PAGE else FOLDER + file.name
        assets[path] = Asset(content, MEDIA_TYPES[suffix], etag)
    return assets
