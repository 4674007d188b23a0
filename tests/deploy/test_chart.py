"""The Helm chart: rendered by Helm's own engine, and every object checked against the schemas of Kubernetes' API."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import yaml

from server.startup.settings import Settings, variable_of

CHART = Path(__file__).parents[2] / "deploy" / "helm" / "dijiang"
KUBERNETES = "1.34"
NOT_IN_KUBERNETES = {"RayService", "ServiceMonitor"}
"""Kinds of other projects' operators, whose schemas are not in the API's: only their form is checked."""
_MISSING = [name for name in ("helm_python", "kubernetes_validate") if importlib.util.find_spec(name) is None]
pytestmark = pytest.mark.skipif(
    bool(_MISSING), reason=f"THE HELM CHART IS NOT TESTED: {_MISSING} are not installed; make test-chart installs them"
)
EVERYTHING: dict[str, Any] = {
    "settings": {"max_queue": 256},
    "model": {"existingClaim": "models", "path": "chat"},
    "keys": {"values": ["one", "two"]},
    "states": {"bytes": "s3://bucket/prefix"},
    "postgresql": {"enabled": True},
    "autoscaling": {"enabled": True},
    "ingress": {"enabled": True, "host": "chat.example", "className": "nginx", "tlsSecret": "tls"},
    "serviceMonitor": {"enabled": True},
    "serviceAccount": {"annotations": {"role": "states"}},
    "extraEnv": [{"name": "AWS_REGION", "value": "eu-central-1"}],
    "extraEnvFrom": [{"secretRef": {"name": "bucket"}}],
}
CASES = {
    "default": {},
    "external": {"states": {"existingSecret": "store"}, "keys": {"existingSecret": "keys"}},
    "everything": EVERYTHING,
    "ray": {**EVERYTHING, "ray": {"enabled": True, "gpusPerEngine": 1}},
}


def rendered(values: dict[str, Any]) -> list[dict[str, Any]]:
    import helm_python

    with helm_python.Chart.load(str(CHART)) as chart:
        files = chart.render(values, name="talk", namespace="prod")
    return [found for text in files.values() for found in yaml.safe_load_all(text) if found]


@pytest.fixture(params=CASES)
def objects(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    return rendered(CASES[request.param])


def of_kind(objects: list[dict[str, Any]], kind: str) -> dict[str, Any]:
    (found,) = (item for item in objects if item["kind"] == kind)
    return found


def test_every_object_is_what_the_api_takes(objects: list[dict[str, Any]]) -> None:
    import kubernetes_validate

    assert objects
    for item in objects:
        assert {"apiVersion", "kind", "metadata"} <= item.keys()
        if item["kind"] not in NOT_IN_KUBERNETES:
            kubernetes_validate.validate(item, KUBERNETES, strict=True)
    names = [(item["kind"], item["metadata"]["name"]) for item in objects]
    assert len({*names}) == len(names)


def test_every_variable_is_a_setting(objects: list[dict[str, Any]]) -> None:
    known = {variable_of(name) for name in Settings.model_fields}
    text = yaml.safe_dump_all(objects)
    found = {word.strip() for line in text.splitlines() for word in line.split() if word.startswith("DIJIANG_")}
    assert found
    assert found <= known


def test_what_is_referred_to_is_there(objects: list[dict[str, Any]]) -> None:
    made = {item["metadata"]["name"] for item in objects if item["kind"] == "Secret"}
    given = {"store", "keys", "bucket", "tls"}
    for item in objects:
        for container in _containers(item):
            secrets = {one["valueFrom"]["secretKeyRef"]["name"] for one in container["env"] if _is_secret(one)}
            assert secrets <= made | given


def test_a_stop_has_time_for_its_delay_its_drain_and_its_states() -> None:
    pod = of_kind(rendered({"drain": {"delaySeconds": 7, "timeoutSeconds": 100}}), "Deployment")["spec"]["template"]
    assert pod["spec"]["terminationGracePeriodSeconds"] >= 7 + 100 + 35
    (server,) = pod["spec"]["containers"]
    values = {one["name"]: one.get("value") for one in server["env"]}
    assert (values["DIJIANG_DRAIN_DELAY_S"], values["DIJIANG_DRAIN_TIMEOUT_S"]) == ("7", "100")
    assert server["readinessProbe"]["httpGet"]["path"] == "/ready"
    assert server["livenessProbe"]["httpGet"]["path"] == server["startupProbe"]["httpGet"]["path"] == "/health"
    assert server["readinessProbe"]["periodSeconds"] * server["readinessProbe"]["failureThreshold"] < 7


def test_the_autoscaler_looks_at_metrics_that_there_are() -> None:
    source = (CHART.parents[2] / "server" / "metrics.py").read_text()
    scaler = of_kind(rendered({"autoscaling": {"enabled": True}}), "HorizontalPodAutoscaler")
    for metric in scaler["spec"]["metrics"]:
        assert metric["pods"]["metric"]["name"] in source


def test_no_password_is_known_beforehand() -> None:
    first, second = (of_kind(rendered({"postgresql": {"enabled": True}}), "Secret")["stringData"] for _ in range(2))
    assert first["password"] != second["password"]
    assert first["password"] in first["url"]


def test_the_ray_application_is_one_that_there_is() -> None:
    from server.fleet.config import FleetConfig

    service = of_kind(rendered(CASES["ray"]), "RayService")
    (application,) = yaml.safe_load(service["spec"]["serveConfigV2"])["applications"]
    assert application["import_path"] == "server.fleet.application:build"
    config = FleetConfig(**{**application["args"], "serve": {"states": False}})
    assert config.fleet.gpus == 1


def _containers(item: dict[str, Any]) -> list[dict[str, Any]]:
    template = item.get("spec", {}).get("template", {})
    containers: list[dict[str, Any]] = template.get("spec", {}).get("containers", []) if template else []
    return containers


def _is_secret(variable: dict[str, Any]) -> bool:
    return "secretKeyRef" in variable.get("valueFrom", {})
