"""The image as an operator gets it: built, started by Compose, killed in mid-answer, resumed, stopped."""

import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.docker.engine import BUILD_S, ROOT, Engine, NoEngineError, build, engine
from tests.ports import free_port
from tests.waiting import PATIENCE_S

pytestmark = [pytest.mark.docker, pytest.mark.timeout(2 * BUILD_S)]
PROJECT, IMAGE = "dijiang-test", "dijiang:cpu"
MAX_IMAGE_BYTES = 1_500_000_000
MEMORY_BYTES = 3 << 30
QUESTION = "What is the capital of France?"


@dataclass
class Deployment:
    """What `docker compose --profile cpu` runs."""

    docker: Engine
    files: list[str]
    port: int

    def compose(self, *arguments: str) -> str:
        options = [f"--file={file}" for file in self.files]
        return self.docker.compose(*options, "--project-name", PROJECT, "--profile", "cpu", *arguments, timeout_s=600)

    def up(self) -> None:
        """Returns when the container says that it is healthy."""
        self.compose("up", "--detach", "--wait", "--no-build")

    @property
    def container(self) -> str:
        return self.compose("ps", "--all", "--quiet", "cpu")

    def inspect(self) -> dict[str, Any]:
        return json.loads(self.docker.run("inspect", self.container))[0]  # type: ignore[no-any-return]

    def inside(self, *command: str) -> str:
        return self.docker.run("exec", self.container, *command)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=PATIENCE_S)


@pytest.fixture(scope="module")
def docker() -> Iterator[Engine]:
    try:
        with engine() as found:
            build(found, target="cpu", tag=IMAGE)
            yield found
    except NoEngineError as error:
        pytest.skip(f"DOCKER WAS NOT TESTED: {error}")


@pytest.fixture
def deployment(docker: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Deployment]:
    port = free_port()
    monkeypatch.setenv("DIJIANG_PORT", str(port))
    monkeypatch.setenv("DIJIANG_MEMORY", str(MEMORY_BYTES))
    files = [str(ROOT / "docker-compose.yml")]
    if not docker.has_bridge:
        on_host = tmp_path / "on-host.yml"
        on_host.write_text(
            "services:\n  cpu:\n    network_mode: host\n    ports: !reset []\n"
            f'    environment:\n      DIJIANG_PORT: "{port}"\n      DIJIANG_HOST: 127.0.0.1\n'
        )
        files.append(str(on_host))
    deployed = Deployment(docker, files, port)
    try:
        yield deployed
    finally:
        deployed.compose("down", "--volumes", "--timeout", "75")
    assert docker.run("ps", "--all", "--quiet", "--filter", f"label=com.docker.compose.project={PROJECT}") == ""
    assert docker.run("volume", "ls", "--quiet", "--filter", f"label=com.docker.compose.project={PROJECT}") == ""


def test_the_image_is_small_and_says_what_it_is(docker: Engine) -> None:
    image = json.loads(docker.run("image", "inspect", IMAGE))[0]
    assert image["Size"] <= MAX_IMAGE_BYTES
    assert image["Config"]["User"] == "10001"
    assert image["Config"]["Labels"]["org.opencontainers.image.licenses"] == "Apache-2.0"


def kill_in_mid_answer(deployment: Deployment, client: openai.OpenAI) -> None:
    """Reads a stream to its end, which is when the container has died."""
    killer = threading.Thread(target=lambda: deployment.docker.run("kill", deployment.container))
    stream = client.chat.completions.create(
        model="smollm2-135m-dijiang",
        messages=[{"role": "user", "content": "Count for ever."}],
        stream=True,
        max_tokens=60_000,
        extra_body={"ignore_eos": True},
    )
    try:
        for number, _ in enumerate(stream):
            if number == 10:
                killer.start()
    finally:
        killer.join(PATIENCE_S)


def test_a_container_is_killed_in_mid_answer_and_goes_on_with_what_was_saved(deployment: Deployment) -> None:
    deployment.up()
    client = deployment.client()
    answer = client.chat.completions.create(
        model="smollm2-135m-dijiang", messages=[{"role": "user", "content": QUESTION}], temperature=0
    )
    assert "Paris" in (answer.choices[0].message.content or "")

    saved = httpx.post(f"{deployment.url}/v1/states", json={"prompt": "The capital of France is"}, timeout=PATIENCE_S)
    body = {"state_id": saved.json()["id"], "prompt": " the", "max_tokens": 12, "temperature": 0}
    expected = httpx.post(f"{deployment.url}/v1/completions", json=body, timeout=PATIENCE_S).json()["choices"][0][
        "text"
    ]

    with pytest.raises((openai.APIError, httpx.TransportError)):
        kill_in_mid_answer(deployment, client)
    assert deployment.inspect()["State"]["ExitCode"] == 137

    deployment.up()
    again = httpx.post(f"{deployment.url}/v1/completions", json=body, timeout=PATIENCE_S)
    assert again.json()["choices"][0]["text"] == expected

    deployment.compose("stop")
    assert deployment.inspect()["State"]["ExitCode"] == 0, "it did not stop within its grace period"


def test_a_container_has_no_more_rights_than_it_needs(deployment: Deployment) -> None:
    deployment.up()
    found = deployment.inspect()
    assert found["State"]["Health"]["Status"] == "healthy"
    assert found["HostConfig"]["Memory"] == MEMORY_BYTES
    assert found["HostConfig"]["PidsLimit"] == 1024
    assert found["HostConfig"]["ReadonlyRootfs"]
    assert found["HostConfig"]["CapDrop"] == ["ALL"]
    assert deployment.inside("id", "--user") == "10001"
    with pytest.raises(RuntimeError, match="Read-only file system"):
        deployment.inside("touch", "/here")
    if deployment.docker.has_bridge:
        addresses = {one["HostIp"] for one in found["NetworkSettings"]["Ports"]["8000/tcp"]}
        assert addresses == {"127.0.0.1"}
