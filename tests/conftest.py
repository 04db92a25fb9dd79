"""Fixtures for all tests: a local S3. Plain functions that tests share are in tests/support."""

import os
import signal
import uuid
from collections.abc import Iterator

import boto3
import pytest
from moto.server import ThreadedMotoServer

from raytrain_brats import s3

os.environ.setdefault("RAYTRAIN_BRATS_RECIPE", "demo")  # the tests' own cases do not say that they are phantoms

# A suite in the background of a script ignores Ctrl-C, and so would every driver that it starts
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def _moto() -> Iterator[str]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3_server(_moto: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """`s3://` URI of a fresh bucket on a real local HTTP server; the environment points every client to it."""
    for name, value in (
        ("AWS_ENDPOINT_URL", _moto),
        ("AWS_ACCESS_KEY_ID", "testing"),
        ("AWS_SECRET_ACCESS_KEY", "testing"),
        ("AWS_DEFAULT_REGION", "us-east-1"),
    ):
        monkeypatch.setenv(name, value)
    bucket = f"bucket-{uuid.uuid4().hex}"
    boto3.client("s3").create_bucket(Bucket=bucket)
    s3.client.cache_clear()
    yield f"s3://{bucket}"
    s3.client.cache_clear()
