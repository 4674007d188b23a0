"""A Docker engine: the one that runs here, or one of our own for as long as the tests take.

Our own needs root, `dockerd` and `debootstrap` (Debian's packages docker.io and debootstrap). It has no bridge, so its
containers are on the host's network, and it takes its base image from Debian where no registry can be reached.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

from tests.waiting import PATIENCE_S, until

ROOT = Path(__file__).parents[2]
PUBLIC_BASE = "python:3.11-slim-bookworm"
OWN_BASE = "dijiang-test/debian"
PACKAGES = "ca-certificates,python3,python3-venv,python3-pip"
CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")
COMPOSE = Path(sys.executable).with_name("docker-compose")
WHEELS_PORT = 18437
"""Always the same: the address is an argument of the build, and decides what of it is done already."""
PULL_S, BUILD_S = 120, 3000


class NoEngineError(RuntimeError):
    """There is no Docker engine here, and none can be started; the message says why."""


@dataclass
class Engine:
    """A Docker engine that answers.

    Attributes:
        client: the `docker` program; one that can build with BuildKit.
        environment: of all commands.
        has_bridge: whether containers have a network of their own; else they are on the host's.
    """

    client: str
    environment: dict[str, str] = field(default_factory=dict)
    has_bridge: bool = True

    def run(self, *arguments: str, timeout_s: float = PATIENCE_S, **more: str) -> str:
        """Standard output of `docker ARGUMENTS`."""
        return _run([self.client, *arguments], self.environment | more, timeout_s)

    def compose(self, *arguments: str, timeout_s: float = PATIENCE_S) -> str:
        """Standard output of `docker-compose ARGUMENTS`, run beside the project's file."""
        return _run([str(COMPOSE), *arguments], self.environment, timeout_s)

    def has(self, *arguments: str, timeout_s: float = PATIENCE_S) -> bool:
        """Whether `docker ARGUMENTS` works."""
        try:
            self.run(*arguments, timeout_s=timeout_s)
        except (RuntimeError, subprocess.TimeoutExpired):
            return False
        return True


def _run(command: list[str], environment: dict[str, str], timeout_s: float) -> str:
    done = subprocess.run(
        command, env=os.environ | environment, cwd=ROOT, capture_output=True, text=True, timeout=timeout_s, check=False
    )
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}: {done.returncode}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}")
    return done.stdout.strip()


def find_client() -> str:
    """A `docker` that builds with BuildKit: by its plugin buildx, or before version 23 by itself."""
    folders = os.get_exec_path()
    for program in dict.fromkeys(path for folder in folders if (path := shutil.which("docker", path=folder))):
        engine = Engine(program)
        if engine.has("buildx", "version"):
            return program
        words = _run([program, "--version"], {}, PATIENCE_S).split()  # Docker version 28.2.2, build e6534b4
        if int(words[2].partition(".")[0]) < 23:
            return program
    raise NoEngineError("no `docker` that builds with BuildKit is installed")


@contextmanager
def engine() -> Iterator[Engine]:
    """The engine that answers here, else one of our own.

    Raises:
        NoEngineError: neither can be had.
    """
    found = Engine(find_client())
    if found.has("version"):
        yield found
        return
    if os.geteuid() != 0:
        raise NoEngineError("no Docker engine answers, and only root can start one")
    for program in ("dockerd", "debootstrap"):
        if shutil.which(program) is None:
            raise NoEngineError(f"no Docker engine answers, and {program} is not installed")
    with tempfile.TemporaryDirectory(prefix="dijiang-docker-") as folder:
        socket = f"unix://{folder}/socket"
        found.environment, found.has_bridge = {"DOCKER_HOST": socket}, False
        command = ["dockerd", "--data-root", f"{folder}/root", "--exec-root", f"{folder}/exec", "--host", socket]
        command += ["--pidfile", f"{folder}/pid", "--iptables=false", "--ip6tables=false", "--bridge=none"]
        with (Path(folder) / "log").open("wb") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            until(lambda: found.has("version") or process.poll() is not None)
            if process.poll() is not None:
                raise NoEngineError(f"dockerd does not start here: {(Path(folder) / 'log').read_text()[-500:]}")
            yield found
        finally:
            process.terminate()
            process.wait(PATIENCE_S)
            for mounted in _mounts_in(folder):  # the network of its containers
                _run(["umount", mounted], {}, PATIENCE_S)


def _mounts_in(folder: str) -> list[str]:
    """The innermost first."""
    mounted = [line.split()[1] for line in Path("/proc/mounts").read_text().splitlines()]
    return [path for path in reversed(mounted) if path.startswith(f"{folder}/")]


def base_image(docker: Engine) -> str:
    """The image to build from: `BASE_IMAGE`, the public one, or Debian's packages put together."""
    given = os.environ.get("BASE_IMAGE", PUBLIC_BASE)
    if docker.has("image", "inspect", given) or docker.has("pull", given, timeout_s=PULL_S):
        return given
    if docker.has("image", "inspect", OWN_BASE):
        return OWN_BASE
    with tempfile.TemporaryDirectory() as folder:
        command = ["debootstrap", "--variant=minbase", f"--include={PACKAGES}", "bookworm", folder]
        _run(command, {}, BUILD_S)
        shutil.copy(CERTIFICATES, folder + str(CERTIFICATES))
        change = f"ENV PIP_CERT={CERTIFICATES} SSL_CERT_FILE={CERTIFICATES}"
        with subprocess.Popen(["tar", "-C", folder, "-c", "."], stdout=subprocess.PIPE) as tar:
            subprocess.run(
                [docker.client, "import", "--change", change, "-", OWN_BASE],
                stdin=tar.stdout,
                env=os.environ | docker.environment,
                capture_output=True,
                check=True,
            )
    return OWN_BASE


@contextmanager
def wheels() -> Iterator[str]:
    """The address of the folder of wheels that pip looks into on this machine; empty without one."""
    folder = os.environ.get("PIP_FIND_LINKS", "")
    if not Path(folder).is_dir() or not folder:
        yield ""
        return
    server = ThreadingHTTPServer(("127.0.0.1", WHEELS_PORT), partial(_Quiet, directory=folder))
    Thread(target=server.serve_forever, daemon=True).start()
    with ExitStack() as stack:
        stack.callback(server.server_close)
        stack.callback(server.shutdown)
        yield f"http://127.0.0.1:{server.server_port}/"


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        """Says nothing."""


def build(docker: Engine, *, target: str, tag: str) -> None:
    """Builds an image of ours."""
    with wheels() as address:
        arguments = [f"--build-arg=BASE_IMAGE={base_image(docker)}", f"--build-arg=PIP_FIND_LINKS={address}"]
        docker.run(
            *("build", "--network=host", "--target", target, "--tag", tag, *arguments, "."),
            timeout_s=BUILD_S,
            DOCKER_BUILDKIT="1",
        )
