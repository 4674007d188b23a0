"""`requirements.lock`, what the image installs, agrees with what everybody else installs."""

import re
import tomllib

from tests.docker.engine import ROOT


def _pins(file: str) -> dict[str, str]:
    lines = re.findall(r"^([\w.-]+)==([^\s;\\]+)", (ROOT / file).read_text(), re.MULTILINE)
    return {name.lower().replace("_", "-"): version for name, version in lines}


def test_the_lock_has_every_requirement_but_torch_at_the_version_of_the_constraints() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["postgres"]]
    names = {re.split(r"[\[<>=; ]", name)[0].lower().replace("_", "-") for name in wanted} - {"torch"}
    locked, constrained = _pins("requirements.lock"), _pins("constraints.txt")
    assert names <= locked.keys(), "run `make lock`"
    both = locked.keys() & constrained.keys()
    assert {name: locked[name] for name in both} == {name: constrained[name] for name in both}, "run `make lock`"
