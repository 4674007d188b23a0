"""What `docker-compose.yml` opens and knows unless somebody says otherwise; needs no Docker engine."""

import re

import yaml

from tests.test_layout import ROOT

SERVICES = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]


def test_every_port_is_open_on_this_machine_alone() -> None:
    ports = [port for service in SERVICES.values() for port in service.get("ports", ())]
    assert len(ports) >= 5
    defaults = [re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", port) for port in ports]
    assert {port.rpartition(":")[0].rpartition(":")[0] for port in defaults} == {"127.0.0.1"}


def test_no_secret_has_a_default_that_is_known() -> None:
    secrets = {
        name: value
        for service in SERVICES.values()
        for name, value in dict(service.get("environment") or {}).items()
        if re.search(r"PASSWORD$|SECRET|_KEYS?$", name)
    }
    known = {name: value for name, value in secrets.items() if not re.fullmatch(r"\$\{\w+:-(none)?\}", str(value))}
    assert "DIJIANG_API_KEYS" in secrets
    assert known == {}
