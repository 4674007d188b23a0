"""The house keeps its order: imports go downward only, nothing goes in circles, and no room is crowded.

A *room* of a package is one of its folders, or a module that lies in the package itself. Every import counts, also one
inside a function and one for the type checker alone.
"""

import ast
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Set
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("server", "dijiang_model", "clients", "benchmarks")
MAX_MODULES = 20
MAX_LINES_OF_A_FILE = 400
MAX_LINES_OF_A_FUNCTION = 60
MAX_MODULES_OF = {"server/engine": 14}

LAYERS: Mapping[str, tuple[Set[str], ...]] = {
    "dijiang_model": (
        {"conversion", "hf"},
        {"segments", "serving", "tensor_parallel"},
        {"checkpoints", "reference"},
        {"families"},
        {"merged", "model"},
        {"attention", "quantization"},
        {"ops"},
        {"batch", "kernel", "native", "text"},
        {"features", "formats", "paths", "state"},
        {"config"},
        {"errors", "program", "rotary"},
    ),
    "dijiang_model.conversion": (
        {"default_model", "merge_cli", "quantize_cli"},
        {"merge"},
        {"evaluation"},
        {"cli"},
        {"convert"},
        {"quantize"},
        {"model_card"},
        {"calibration"},
        {"training"},
        {"sources"},
        {"bars", "default_folder", "recipes"},
    ),
    "server": (
        {"fleet"},
        {"startup"},
        {"app"},
        {"api"},
        {"responses"},
        {"generation"},
        {"http"},
        {"service"},
        {"text"},
        {"metrics", "protocol", "selfcheck", "tools"},
        {"engine_client", "grammar_check", "states"},
        {"engine", "options", "playground", "rate_limits"},
        {"cli", "errors", "event_log", "hardware", "healthcheck", "keys", "tracing"},
    ),
    "server.engine": (
        {"process"},
        {"tensor_parallel"},
        {"loading"},
        {"runner"},
        {"engine", "fast_steps"},
        {"sampling", "scheduler", "state"},
        {"batch", "grammars", "speculation"},
        {"fairness"},
        {"groups", "stages"},
        {"placement", "sequence"},
        {"failures", "followers", "request_faults", "slots", "transfer"},
        {"types"},
    ),
}
"""The rooms of a package, top first: a room imports from the layers below its own alone."""


def _files() -> Iterator[Path]:
    """Every module, those of the tests too."""
    return (path for package in (*PACKAGES, "tests") for path in sorted((ROOT / package).rglob("*.py")))


def _modules() -> dict[str, Path]:
    return {_name(path): path for path in _files() if path.relative_to(ROOT).parts[0] in PACKAGES}


def _name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imports(path: Path, known: Iterable[str]) -> set[str]:
    """The modules of the house that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in known else node.module for name in names}
    return found & set(known)


@pytest.fixture(scope="module")
def arrows() -> dict[str, set[str]]:
    modules = _modules()
    return {name: _imports(path, modules.keys()) - {name} for name, path in modules.items()}


def _room(module: str, package: str) -> str | None:
    inside = module.removeprefix(f"{package}.")
    return None if inside == module or inside == "__main__" else inside.split(".")[0]


@pytest.mark.parametrize("package", LAYERS)
def test_imports_go_downward_only(package: str, arrows: dict[str, set[str]]) -> None:
    depth = {room: number for number, layer in enumerate(LAYERS[package]) for room in layer}
    rooms = {room for module in arrows if (room := _room(module, package)) is not None}
    assert rooms == depth.keys(), "LAYERS names every room, and no other"
    upward = [
        f"{module} imports {target}"
        for module, targets in arrows.items()
        for target in targets
        if (room := _room(module, package)) is not None
        and (below := _room(target, package)) is not None
        and room != below
        and depth[below] <= depth[room]
    ]
    assert not upward


def test_no_modules_import_each_other_in_a_circle(arrows: dict[str, set[str]]) -> None:
    left = dict(arrows)
    while free := [module for module, targets in left.items() if not targets & left.keys()]:
        for module in free:
            del left[module]
    circles = {module: sorted(targets & left.keys()) for module, targets in left.items()}
    assert not circles, "each of these leads back to itself, or to a circle"


def test_no_folder_is_crowded() -> None:
    counts = Counter(path.parent.relative_to(ROOT).as_posix() for path in _files() if path.name != "__init__.py")
    crowded = {folder: count for folder, count in counts.items() if count > MAX_MODULES_OF.get(folder, MAX_MODULES)}
    assert not crowded


def test_no_file_is_long() -> None:
    lengths = {path.relative_to(ROOT).as_posix(): len(path.read_text().splitlines()) for path in _files()}
    assert not {path: length for path, length in lengths.items() if length > MAX_LINES_OF_A_FILE}


def test_no_function_is_long() -> None:
    """A function's lines are those of its signature, its docstring and its body."""
    long = [
        f"{path.relative_to(ROOT)}:{node.lineno} {node.name}"
        for path in _files()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (node.end_lineno or 0) - node.lineno >= MAX_LINES_OF_A_FUNCTION
    ]
    assert not long
