"""HTTPS, with a certificate that is renewed while the server runs, and the health check of containers."""

import os
import signal
import ssl
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import trustme

from tests.ports import free_port
from tests.tiny_models import write_tiny_model
from tests.waiting import PATIENCE_S, until


@dataclass
class Secure:
    """A server that speaks HTTPS, and its certificate's files."""

    process: subprocess.Popen[bytes]
    port: int
    cert: Path
    key: Path

    def certificate(self) -> str:
        return ssl.get_server_certificate(("127.0.0.1", self.port), timeout=PATIENCE_S)

    def health_status(self, *, has_tls: bool) -> int:
        """The exit status of the health check."""
        told = {"DIJIANG_PORT": str(self.port), "DIJIANG_TLS_CERT": str(self.cert) if has_tls else ""}
        command = [sys.executable, "-m", "server.healthcheck"]
        return subprocess.run(command, env=os.environ | told, timeout=PATIENCE_S, check=False).returncode


def issue(cert: Path, key: Path) -> None:
    issued = trustme.CA().issue_cert("127.0.0.1")
    issued.private_key_pem.write_to_path(key)
    issued.cert_chain_pems[0].write_to_path(cert)


@pytest.fixture
def secure(tmp_path: Path) -> Iterator[Secure]:
    cert, key, port = tmp_path / "cert.pem", tmp_path / "key.pem", free_port()
    issue(cert, key)
    tiny = write_tiny_model(tmp_path / "tiny")
    command = [sys.executable, "-m", "server", "serve", str(tiny), "--port", str(port), "--threads", "1", "--no-states"]
    command += ["--tls-cert", str(cert), "--tls-key", str(key)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield Secure(process, port, cert, key)
    finally:
        process.terminate()
        process.wait(PATIENCE_S)


def test_the_health_check_follows_readiness_with_tls(secure: Secure) -> None:
    until(lambda: secure.health_status(has_tls=True) == 0)
    assert secure.health_status(has_tls=False) == 1
    secure.process.terminate()
    secure.process.wait(PATIENCE_S)
    assert secure.health_status(has_tls=True) == 1


def test_a_renewed_certificate_is_read_on_sighup_and_a_broken_one_changes_nothing(secure: Secure) -> None:
    until(lambda: secure.health_status(has_tls=True) == 0)
    first = secure.certificate()
    secure.cert.write_text("nothing of the kind")
    secure.process.send_signal(signal.SIGHUP)
    assert secure.certificate() == first
    issue(secure.cert, secure.key)
    secure.process.send_signal(signal.SIGHUP)
    until(lambda: secure.certificate() != first)
