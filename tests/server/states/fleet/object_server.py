"""A real server that speaks S3, in a process of its own, that can be stopped and started."""

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import boto3
import httpx

from tests.ports import free_port
from tests.waiting import PATIENCE_S, until

SERVE = """
import sys
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import run_simple
app = DomainDispatcherApplication(create_backend_app)
run_simple("127.0.0.1", int(sys.argv[1]), app, threaded=True)
"""


class ObjectServer:
    """See the module.

    Attributes:
        bucket: name of the bucket that is there.
        environment: variables that lead a client here.
    """

    bucket = "states"

    def __init__(self) -> None:
        self._port = free_port()
        self.url = f"http://127.0.0.1:{self._port}"
        self.environment = {
            "AWS_ENDPOINT_URL_S3": self.url,
            "AWS_ACCESS_KEY_ID": "tests",
            "AWS_SECRET_ACCESS_KEY": "tests",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        self._process: subprocess.Popen[bytes] | None = None
        self.client: Any = boto3.client(
            "s3",
            endpoint_url=self.url,
            aws_access_key_id="tests",
            aws_secret_access_key="tests",
            region_name="us-east-1",
        )

    def start(self) -> None:
        """Returns when it answers, with an empty bucket."""
        command = [sys.executable, "-W", "ignore", "-c", SERVE, str(self._port)]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        until(self._answers)
        self.client.create_bucket(Bucket=self.bucket)

    def stop(self) -> None:
        """All that it holds is lost: it keeps it in memory."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(PATIENCE_S)
            self._process = None

    def sizes(self, prefix: str) -> dict[str, int]:
        """Objects under a prefix, without it, and their sizes in bytes."""
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=prefix)
        return {item["Key"].removeprefix(prefix): item["Size"] for page in pages for item in page.get("Contents", ())}

    def _answers(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, "the server ended"
        try:
            return httpx.get(self.url, trust_env=False, timeout=10).status_code < 500
        except httpx.TransportError:
            return False


@contextlib.contextmanager
def object_server() -> Iterator[ObjectServer]:
    """A server, gone with all it holds afterwards."""
    server = ObjectServer()
    try:
        server.start()
        yield server
    finally:
        server.stop()
