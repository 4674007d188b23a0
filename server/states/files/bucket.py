"""Objects in a bucket that speaks S3, as far as snapshots need it: whole ones, put, got and deleted by name."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
from boto3.exceptions import Boto3Error
from boto3.s3.transfer import TransferConfig
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from server.states.errors import StoreError, StoreUnavailableError, snapshot_gone

PIECE_BYTES = 1 << 20
TRANSFER = TransferConfig(use_threads=False)
"""Several requests copy at once anyway; a file of more than 8 MiB goes in parts."""
_UNAVAILABLE = (BotoCoreError, ClientError, Boto3Error)


class Bucket:
    """See the module. Used by several threads."""

    def __init__(self, url: str, *, timeout_s: float, max_connections: int) -> None:
        """
        Args:
            url: `s3://bucket/prefix`; address, region and keys as the AWS tools take them from the environment.
            timeout_s: for a connection, and for each piece of an answer.
            max_connections: open at once.

        Raises:
            StoreError: the bucket cannot be used.
        """
        self._name, _, prefix = url.removeprefix("s3://").partition("/")
        self._prefix = f"{prefix.strip('/')}/" if prefix.strip("/") else ""
        config = Config(
            connect_timeout=timeout_s,
            read_timeout=timeout_s,
            max_pool_connections=max_connections,
            retries={"mode": "standard", "total_max_attempts": 2},
        )
        try:
            self._client: Any = boto3.client("s3", config=config)
            self._client.head_bucket(Bucket=self._name)
        except _UNAVAILABLE as error:
            raise StoreError(f"the bucket {self._name} for the bytes of states cannot be used: {error}") from error

    def put(self, name: str, path: Path) -> None:
        """Wholly or not at all; raises `OSError`, `StoreUnavailableError`."""
        try:
            self._client.upload_file(str(path), self._name, self._prefix + name, Config=TRANSFER)
        except _UNAVAILABLE as error:
            raise StoreUnavailableError from error

    def get(self, name: str) -> Iterator[bytes]:
        """An object in pieces; raises `NotFoundError` before the first, `StoreUnavailableError`."""
        try:
            body = self._client.get_object(Bucket=self._name, Key=self._prefix + name)["Body"]
            yield from body.iter_chunks(PIECE_BYTES)
        except ClientError as error:
            if error.response["Error"]["Code"] in ("NoSuchKey", "404"):
                raise snapshot_gone() from error
            raise StoreUnavailableError from error
        except _UNAVAILABLE as error:
            raise StoreUnavailableError from error

    def delete(self, name: str) -> None:
        """Nothing happens if it is not there; raises `StoreUnavailableError`."""
        try:
            self._client.delete_object(Bucket=self._name, Key=self._prefix + name)
        except _UNAVAILABLE as error:
            raise StoreUnavailableError from error
