"""Every command and snippet of the pages is run, on a tiny model, or says in `tables.py` why it is not."""

import contextlib
import hashlib
import itertools
import json
import re
import shlex
import shutil
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import openai
import pytest
import yaml
from typer.core import TyperGroup
from typer.main import get_command

from server.cli import app
from server.fleet.config import read_config
from server.startup.keys import read_keys_file
from tests.dijiang_model.teachers import llama_teacher, save_teacher
from tests.docs.blocks import PARSED, Block, blocks
from tests.docs.shell import Shell
from tests.docs.tables import ADDRESS, JAVASCRIPT, KEY_DIGEST, PREPARED, RUN_ELSEWHERE, bare, reason_to_skip
from tests.e2e.serving import Server, serving
from tests.tiny_models import write_tiny_model

BLOCKS = list(blocks())
PAGES = {page: list(of_page) for page, of_page in itertools.groupby(BLOCKS, key=lambda block: block.page)}
MODEL_NAME = "smollm2-135m-dijiang"


@pytest.fixture(scope="module")
def things(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What `tables.PREPARED` names."""
    folder = tmp_path_factory.mktemp("prepared")
    texts = folder / "texts"
    texts.mkdir()
    text = texts / "rain.txt"
    text.write_text("It rained all day. Nobody went out. The cat slept on the stove. " * 600)
    return {
        "text": text,
        "texts": texts,
        "teacher": save_teacher(llama_teacher(max_position_embeddings=2048), folder / "teacher"),
        "model": write_tiny_model(folder / "model"),
    }


@pytest.fixture(scope="module")
def server(things: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    states = tmp_path_factory.mktemp("states")
    options = ("--served-model-name", MODEL_NAME, "--default-answer-tokens", "1024", "--states-folder", str(states))
    with serving(things["model"], *options) as running:
        yield running


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_every_snippet_of_a_page_works(
    page: str,
    server: Server,
    things: dict[str, Path],
    tmp_path: Path,
    record_property: Callable[[str, object], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    address = server.base_url.removeprefix("http://")
    shell = Shell(tmp_path, address, things)
    monkeypatch.chdir(tmp_path)
    for name, kind in PREPARED.get(page, {}).items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        copy = shutil.copytree if things[kind].is_dir() else shutil.copy2
        copy(things[kind], tmp_path / name)
    namespace: dict[str, object] = {"__name__": "__main__"}
    with contextlib.ExitStack() as clients:
        for block in PAGES[page]:
            for said in run(block, shell, namespace):
                record_property("snippet", said)
            for value in namespace.values():
                if isinstance(value, openai.OpenAI):
                    clients.push(value)


def run(block: Block, shell: Shell, namespace: dict[str, object]) -> Iterator[str]:
    """What became of it: a line for each command, or one for the block."""
    if block.language == "bash":
        for command in block.commands:
            reason, shown = reason_to_skip(command), command.splitlines()[0].partition("  #")[0].rstrip()
            if reason is None:
                shell.run(command)
            yield f"{block} ran: {shown}" if reason is None else f"{block} skipped, {reason}: {shown}"
    elif block.language == "js":
        yield f"{block} run by {JAVASCRIPT}"
    elif block.page in RUN_ELSEWHERE:
        yield f"{block} ran by {RUN_ELSEWHERE[block.page]}"
    elif block.language == "python":
        run_python(block, re.sub(ADDRESS, shell.address, block.text), namespace, shell.folder)
        yield f"{block} ran"
    elif block.language in PARSED:
        parse(block, shell.folder)
        yield f"{block} parsed"


def run_python(block: Block, text: str, namespace: dict[str, object], folder: Path) -> None:
    """A block that begins with the name of a file becomes that file, which the commands behind it use."""
    named = re.match(r"# (\w+\.py)\n", text)
    if named is None:
        exec(compile(text, str(block), "exec"), namespace)
        return
    (folder / named[1]).write_text(text)
    later = [other for other in PAGES[block.page] if other.line > block.line]
    assert any(named[1] in shlex.split(command, comments=True) for other in later for command in other.commands)


def parse(block: Block, folder: Path) -> None:
    if block.language == "json":
        json.loads(block.text)
    elif block.language == "yaml":
        assert yaml.safe_load(block.text)
    elif "[[keys]]" in block.text:
        numbers = itertools.count()
        file = folder / "keys.toml"
        file.write_text(re.sub(KEY_DIGEST, lambda _: f"sha256:{digest(next(numbers))}", block.text))
        assert read_keys_file(file)
    elif "[fleet]" in block.text:
        file = folder / "fleet.toml"
        file.write_text(block.text)
        assert read_config(file).fleet.max_replicas > 1
    else:
        assert tomllib.loads(block.text)


def digest(number: int) -> str:
    return hashlib.sha256(str(number).encode()).hexdigest()


def test_what_is_skipped_has_only_options_that_exist() -> None:
    commands = [bare(command) for block in BLOCKS if block.language == "bash" for command in block.commands]
    ours = [shlex.split(command) for command in commands if reason_to_skip(command) is not None]
    ours = [words[words.index("dijiang") + 1 :] for words in map(without_folder, ours) if "dijiang" in words]
    assert ours
    for arguments in ours:
        context = get_command(app).make_context("dijiang", list(arguments))
        while isinstance(context.command, TyperGroup):
            name, command, rest = context.command.resolve_command(context, [*context._protected_args, *context.args])
            assert command is not None
            context = command.make_context(name, rest, parent=context)


def without_folder(words: list[str]) -> list[str]:
    return [word.removeprefix(".venv/bin/") for word in words]
