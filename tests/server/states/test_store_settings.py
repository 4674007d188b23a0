"""`--state-store` and what belongs to it, as an operator meets it."""

import io
import sys
from pathlib import Path

import pytest
from rich.console import Console

from server.startup.assemble import open_store
from server.startup.notices import Notices
from server.startup.settings import Settings, SettingsError, read_settings
from server.states.errors import StoreError
from server.states.indexed import IndexedStore
from tests.server.states.stores import SharedKind

pytestmark = pytest.mark.anyio
URL = "postgresql://ann:secret@127.0.0.1:1/db"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"state_store": "redis://127.0.0.1"}, "--state-store .*must be the address of a PostgreSQL"),
        ({"state_store": URL, "states": False}, "state_store has no effect with --no-states"),
        (
            {"state_store_schema": "mine"},
            "state_store_schema, _bytes, _copies, _connections and _timeout_s have no effect without state_store",
        ),
        (
            {"state_store_copies": "1GiB"},
            "state_store_schema, _bytes, _copies, _connections and _timeout_s have no effect without state_store",
        ),
        ({"state_store": URL, "state_store_schema": 'a"; DROP TABLE x'}, "--state-store-schema"),
    ],
)
def test_what_cannot_take_effect_is_refused(flags: dict[str, object], message: str) -> None:
    with pytest.raises(SettingsError, match=message) as caught:
        read_settings(flags)
    assert "secret" not in str(caught.value)


def test_the_password_is_not_shown() -> None:
    assert "secret" not in repr(read_settings({"state_store": URL}))


def test_without_the_extra_the_operator_is_told_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "psycopg_pool", None)
    for name in ("shared", "files.contents", "index.postgres"):
        monkeypatch.delitem(sys.modules, f"server.states.{name}")
    with pytest.raises(StoreError, match=r"pip install 'dijiang\[postgres\]'"):
        open_store(Settings(state_store=URL, states_folder=tmp_path), "tiny", Notices(Console(file=io.StringIO())))


def test_a_store_that_is_not_there_is_no_reason_to_go_on_without(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="the store of states cannot be used"):
        open_store(Settings(state_store=URL, cache_dir=tmp_path), "tiny", Notices(Console(file=io.StringIO())))


async def test_settings_reach_the_store(shared_kind: SharedKind, tmp_path: Path) -> None:
    kind = shared_kind
    settings = Settings(
        state_store=kind.postgres.url, state_store_schema=kind.schema, cache_dir=tmp_path, states_disk=12_345
    )
    store = open_store(settings, "org/tiny", Notices(Console(file=io.StringIO())))
    assert isinstance(store, IndexedStore)
    assert store.files_folder == tmp_path / "states" / "org_tiny" / "replica-0" / "files"
    assert store.totals.max_bytes == 12_345
    assert kind.ask("SELECT count(*) FROM {}.replicas") == [(1,)]
    await store.close()
