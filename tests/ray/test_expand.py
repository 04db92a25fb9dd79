"""`expand` on Ray Data makes the bytes that one process makes."""

from pathlib import Path

import pytest

from tests.support.cases import write_msd_folder
from tests.support.commands import OneRay
from tests.support.without_ray import Expand, books, expand_arguments, expand_here, volumes


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Expand:
    return expand_here(monkeypatch)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_msd_folder(tmp_path / "data", 3, shape=(14, 12, 10))


@pytest.mark.campaign
def test_ray_makes_the_same_bytes(one_ray: OneRay, run: Expand, data: Path, tmp_path: Path) -> None:
    """On Ray Data, over all CPUs, the files are those of one process that goes through the cases one by one."""
    assert run(data, tmp_path / "one", 3) == 0
    said, _ = one_ray.run(["expand", *expand_arguments(data, tmp_path / "many", 3)])
    assert "9 volumes of 3 cases" in said
    assert volumes(tmp_path / "many") == volumes(tmp_path / "one")
    assert books(tmp_path / "many") == books(tmp_path / "one")
