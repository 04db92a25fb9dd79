"""`expand` killed at any point: finished volumes stay, the end is that of an undisturbed run."""

import os
import random
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from raytrain_brats import storage
from raytrain_brats.cases.scan import scan
from tests.support.cases import write_msd_folder
from tests.support.crashes import Disk, die_before_request, in_child
from tests.support.without_ray import Expand, books, expand_arguments, expand_here, volumes


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Expand:
    return expand_here(monkeypatch)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_msd_folder(tmp_path / "data", 3, shape=(14, 12, 10))


def start(data: Path, out: Path, copies: int) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "raytrain_brats", "expand", *expand_arguments(data, out, copies)],
        env=os.environ | {"RAY_ADDRESS": "local"},
        stdout=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("every", [pytest.param(1, marks=pytest.mark.campaign), 4])
def test_a_kill_at_any_point_costs_nothing_but_time(run: Expand, tmp_path: Path, every: int) -> None:
    """Before every call that touches the disk, each day before every fourth: what was whole stays, and the end is that
    of an undisturbed run."""
    data, undisturbed = write_msd_folder(tmp_path / "data", 1, shape=(14, 12, 10)), tmp_path / "undisturbed"
    assert run(data, undisturbed, 1) == 0
    for last in range(0, 400, every):
        out = tmp_path / str(last)
        code = in_child(partial(Disk, last, False), partial(run, data, out, 1))
        assert code in (0, 9)
        whole = {name: (out / name).stat().st_mtime_ns for name in storage.list_files(str(out)) if "Tr/" in name}
        assert run(data, out, 1) == 0
        pairs = {n for n in whole if n.replace("images", "labels") in whole and n.replace("labels", "images") in whole}
        assert all((out / name).stat().st_mtime_ns == whole[name] for name in pairs)
        made = {name: (out / name).read_bytes() for name in storage.list_files(str(out))}
        assert made == volumes(undisturbed) | books(undisturbed)
        if code == 0:
            break
    assert 30 < last < 399


def test_s3_gets_the_same_bytes_after_a_kill_too(run: Expand, data: Path, tmp_path: Path, s3_server: str) -> None:
    """A set on S3, killed halfway, ends as a local one."""
    local, remote = tmp_path / "out", f"{s3_server}/out"
    assert run(data, local, 2) == 0
    assert in_child(partial(die_before_request, 8), partial(run, data, remote, 2)) == 9
    assert not scanned(remote) and run(data, remote, 2) == 0 and scanned(remote)
    there = {name: storage.read_bytes(storage.join(remote, name)) for name in storage.list_files(remote)}
    assert there == volumes(local) | books(local)


def scanned(uri: str) -> bool:
    return "dataset.json" in storage.list_files(uri) and len(scan(uri).cases) == 6


@pytest.mark.campaign
def test_sigkill_of_the_real_command_at_random_moments(run: Expand, tmp_path: Path) -> None:
    """On Ray, killed again and again: finished volumes are not made again, and the end is the undisturbed one."""
    data, dice = write_msd_folder(tmp_path / "data", 6, shape=(60, 55, 45)), random.Random(5)
    assert run(data, tmp_path / "undisturbed", 12) == 0
    out, stamps, kills = tmp_path / "out", dict[str, int](), 0

    def whole() -> dict[str, int]:
        return {n: (out / n).stat().st_mtime_ns for n in storage.list_files(str(out)) if n.startswith("labelsTr/")}

    while True:
        process, wanted = start(data, out, 12), len(stamps) + dice.randrange(20)
        while process.poll() is None and len(whole()) < wanted:
            time.sleep(0.01)
        time.sleep(dice.random() / 2)
        if process.poll() is not None:
            break
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        kills += 1
        time.sleep(2)  # Ray's processes follow their driver; what they still finish counts as made
        assert stamps.items() <= whole().items()
        stamps = whole()
    assert process.returncode == 0 and kills >= 3 and stamps.items() <= whole().items()
    assert volumes(out) == volumes(tmp_path / "undisturbed")
    assert books(out) == books(tmp_path / "undisturbed")
