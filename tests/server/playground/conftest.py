"""The fixtures of the HTTP tests: a service with a scripted engine on loopback."""

from tests.server.conftest import (  # noqa: F401 (fixtures, by their names)
    _quiet_logs,
    byte_tokenizer,
    options,
    server,
    shared_loopback,
    tokenizer_folder,
)
