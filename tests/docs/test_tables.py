"""The tables fit the pages: no block is unknown to them, and nothing in them is left over."""

import re

from tests.docs.blocks import PARSED, RUN, SHOWN, blocks
from tests.docs.tables import PREPARED, RUN_ELSEWHERE, SKIPPED, bare
from tests.test_layout import ROOT

BLOCKS = list(blocks())


def test_every_block_says_what_it_is() -> None:
    assert [str(block) for block in BLOCKS if block.language not in (*RUN, *PARSED, *SHOWN)] == []


def test_every_command_that_is_skipped_is_there() -> None:
    commands = [bare(command) for block in BLOCKS if block.language == "bash" for command in block.commands]
    assert [pattern for pattern in SKIPPED if not any(re.fullmatch(pattern, command) for command in commands)] == []


def test_every_page_that_needs_something_is_there() -> None:
    assert PREPARED.keys() | RUN_ELSEWHERE.keys() <= {block.page for block in BLOCKS}
    assert all((ROOT / test).is_file() for test in RUN_ELSEWHERE.values())
