"""`prepare` killed at any point: no object is made twice, the end is that of an undisturbed run."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from raytrain_brats import storage
from raytrain_brats.cases import scan
from raytrain_brats.data import manifest as manifests
from raytrain_brats.data import store as stores
from tests.support.cases import write_msd_folder
from tests.support.crashes import Disk, die_before_request, in_child
from tests.support.without_ray import SPACING, Prepare, files, prepare_here


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Prepare:
    return prepare_here(monkeypatch)


def check_every_point(
    data: Path, store: Callable[[int], str], arm: Callable[[int], Any], run: Prepare, every: int = 1
) -> int:
    """Die before every call; the same command again ends as if nothing had been, and makes no object twice."""
    undisturbed = None
    for last in range(0, 400, every):
        home = store(last)
        code = in_child(partial(arm, last), partial(run, data, home))
        assert code in (0, 9)
        there = set(stores.objects(home).values())
        ended, worked = run(data, home)
        keys = {stores.key(c, {"spacing_mm": 1.0}, "msd"): c.id for c in scan.open_manifest(str(data)).cases}
        assert ended == 0 and not {keys[name[8:40]] for name in there} & set(worked)
        names = [name for name in storage.list_files(home) if name != "index.jsonl"]
        found: dict[str, Any] = {name: storage.read_bytes(storage.join(home, name)) for name in names}
        found["index"] = stores.open_index(home, {"spacing_mm": 1.0}).cases
        undisturbed = undisturbed or found
        assert found == undisturbed
        if code == 0:
            break
    return last


@pytest.mark.parametrize("every", [pytest.param(1, marks=pytest.mark.campaign), 4])
def test_a_kill_at_any_point_costs_nothing_but_time(run: Prepare, tmp_path: Path, every: int) -> None:
    """On a local disk, before every call that touches it; each day before every fourth."""
    data = write_msd_folder(tmp_path / "data", 2, shape=(10, 9, 8))
    manifests.write(scan.open_manifest(str(data)), str(tmp_path / "m.jsonl"))
    deaths = check_every_point(
        tmp_path / "m.jsonl", lambda n: str(tmp_path / f"{n}"), lambda n: Disk(n, power_loss=False), run, every
    )
    assert 40 < deaths < 399


def test_a_kill_at_any_point_on_s3(run: Prepare, tmp_path: Path, s3_server: str) -> None:
    """On S3, before every request that changes something: probe twice, settings, manifest, two objects, three books."""
    data = write_msd_folder(tmp_path / "data", 2, shape=(10, 9, 8))
    assert check_every_point(data, lambda n: f"{s3_server}/{n}", die_before_request, run) == 9


@pytest.mark.campaign
def test_sigkill_of_the_real_command_at_random_moments(tmp_path: Path) -> None:
    """On Ray, killed after a random number of objects and milliseconds: the end is that of an undisturbed run."""
    data, dice = write_msd_folder(tmp_path / "data", 24, shape=(120, 110, 90)), random.Random(4)
    environment = os.environ | {"RAY_ADDRESS": "local"}

    def start(store: Path) -> subprocess.Popen[bytes]:
        command = [
            sys.executable,
            "-m",
            "raytrain_brats",
            "prepare",
            "--data",
            str(data),
            "--store",
            str(store),
            SPACING,
        ]
        return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)

    assert start(tmp_path / "undisturbed").wait(300) == 0
    store, stamps, kills = tmp_path / "store", {}, 0
    while True:
        process, wanted = start(store), len(stamps) + dice.randrange(6)
        while process.poll() is None and len(stores.objects(str(store))) < wanted:
            time.sleep(0.01)
        time.sleep(dice.random())
        if process.poll() is not None:
            break
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        kills += 1
        time.sleep(2)  # Ray's processes follow their driver; what they still finish counts as made
        now = {name: (store / name).stat().st_mtime_ns for name in stores.objects(str(store)).values()}
        assert stamps.items() <= now.items()
        stamps = now
    assert process.wait() == 0 and kills >= 4
    assert stamps.items() <= {n: (store / n).stat().st_mtime_ns for n in stores.objects(str(store)).values()}.items()
    ours, theirs = (
        {n: c.replace(str(place).encode(), b"") for n, c in files(place).items() if "/." not in f"/{n}"}
        for place in (store, tmp_path / "undisturbed")
    )
    assert ours == theirs
