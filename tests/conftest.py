"""Fixtures for all tests: a local S3, a folder for Ray, a cluster. Plain functions are in tests/support."""

import contextlib
import itertools
import os
import signal
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from filelock import FileLock, Timeout
from moto.server import ThreadedMotoServer

from raytrain_brats import s3
from tests.support.cases import AWS

os.environ.setdefault("RAYTRAIN_BRATS_RECIPE", "demo")  # the tests' own cases do not say that they are phantoms
os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # many processes share the cores: the reason is in ray_ext/cluster.py

# A suite in the background of a script ignores Ctrl-C, and so would every driver that it starts
signal.signal(signal.SIGINT, signal.default_int_handler)


LONGEST = ("test_pipeline", "test_cluster", "test_chaos", "test_elastic", "test_demo", "test_crash_points")
"""The third needs no Ray: there is room for two."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files that take longest come first, so that processes that run side by side end together."""
    order = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder with a short name: Ray's sockets do not fit below pytest's own."""
    with tempfile.TemporaryDirectory(prefix="rb", dir="/tmp", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def ray_place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One of two for all that are tested side by side: three Rays at a time on two cores take longer than in turn."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        yield
        return
    shared = tmp_path_factory.getbasetemp().parent  # of all processes of this session
    for place in itertools.cycle(FileLock(shared / f"ray-{number}.lock") for number in range(2)):
        with contextlib.suppress(Timeout):
            place.acquire(timeout=0.2)
            break
    yield
    place.release()


@pytest.fixture
def cluster(place: Path) -> Iterator[Any]:
    """A head with two CPUs, to which nodes can be added."""
    from tests.support.clusters import Cluster

    started = Cluster(place)
    yield started
    started.close()


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
    for name, value in ({"AWS_ENDPOINT_URL": _moto} | AWS).items():
        monkeypatch.setenv(name, value)
    bucket = f"bucket-{uuid.uuid4().hex}"
    boto3.client("s3").create_bucket(Bucket=bucket)
    s3.client.cache_clear()
    yield f"s3://{bucket}"
    s3.client.cache_clear()


@pytest.fixture(autouse=True)
def all_warnings_are_caught(caplog: pytest.LogCaptureFixture) -> None:
    """Ray quiets the handlers it finds in this process, pytest's among them."""
    caplog.handler.setLevel(0)
