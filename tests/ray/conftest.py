"""Fixtures for tests on a real Ray, which they share where its state allows."""

from collections.abc import Iterator

import pytest

from tests.support.cases import AWS
from tests.support.commands import OneRay


@pytest.fixture(scope="module", autouse=True)
def _ray_place(ray_place: None) -> None:
    pass


@pytest.fixture(scope="session")
def one_ray(_moto: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[OneRay]:
    """One process and one Ray for the commands of all tests here that need no other; it reaches the local S3."""
    started = OneRay(tmp_path_factory.mktemp("one_ray"), {"AWS_ENDPOINT_URL": _moto} | AWS)
    yield started
    started.close()
