"""`prepare`: what is there is not made again, what is damaged is, and a kill at any point costs nothing but time.

Ray Data is left out here but for the campaign: a plain map does its work in this process. The whole command on Ray is
tested in test_pipeline.py.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from raytrain_brats import prepare, storage
from raytrain_brats.cases import scan
from raytrain_brats.data import manifest as manifests
from raytrain_brats.data import store as stores
from raytrain_brats.ray_ext import cluster
from tests.support.cases import write_msd_folder
from tests.support.crashes import Disk, die_before_request, in_child

SPACING = "--set=preprocess.spacing_mm=1.0"
Prepare = Callable[..., tuple[int, list[str]]]


def files(store: Path) -> dict[str, bytes]:
    return {str(p.relative_to(store)): p.read_bytes() for p in sorted(store.rglob("*")) if p.is_file()}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Five cases: BRATS_003 is cut off, BRATS_005 a copy of BRATS_002."""
    folder = write_msd_folder(tmp_path / "data", 5, shape=(10, 9, 8))
    cut = folder / "imagesTr/BRATS_003.nii.gz"
    cut.write_bytes(cut.read_bytes()[:-20])
    for part in ("imagesTr", "labelsTr"):
        shutil.copy(folder / part / "BRATS_002.nii.gz", folder / part / "BRATS_005.nii.gz")
    return folder


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Prepare:
    """Run `prepare` here; (exit code, ids of the cases that were worked on)."""
    worked: list[str] = []

    def here(function: Any, rows: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        for row in reversed(rows):  # Ray Data gives results in no order
            worked.append(json.loads(row["case"])["id"])
            yield function(row)

    monkeypatch.setattr(cluster, "connect", lambda: None)
    monkeypatch.setattr(cluster, "check_shared", lambda *_: None)
    monkeypatch.setattr(cluster, "data_map", here)

    def call(data: Any, store: Any, *options: str) -> tuple[int, list[str]]:
        worked.clear()
        code = prepare.main(["--data", str(data), "--store", str(store), SPACING, *options])
        return code, sorted(worked)

    return call


def test_a_second_run_reads_and_makes_nothing(
    run: Prepare, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Equal content is prepared once; a second run looks at names alone, and tries again what was refused."""
    store = tmp_path / "store"
    assert run(data, store) == (0, ["BRATS_001", "BRATS_002", "BRATS_003", "BRATS_004"])
    first, stamps = files(store), {p: p.stat().st_mtime_ns for p in (store / "objects").iterdir()}
    index = stores.open_index(str(store), {"spacing_mm": 1.0})
    assert [case.id for case in index.cases] == ["BRATS_001", "BRATS_002", "BRATS_004", "BRATS_005"]
    assert index.cases[1].object == index.cases[3].object and len(stamps) == 3

    read: list[str] = []
    real = storage.read_bytes
    monkeypatch.setattr(storage, "read_bytes", lambda uri: (read.append(uri), real(uri))[1])
    assert run(data, store) == (0, ["BRATS_003"])
    assert [uri for uri in read if uri.endswith((".parquet", ".gz")) and "_003" not in uri] == []
    assert files(store) == first
    assert {p: p.stat().st_mtime_ns for p in (store / "objects").iterdir()} == stamps


def test_damage_is_found_by_length_at_once_and_by_verify_to_the_bit(run: Prepare, data: Path, tmp_path: Path) -> None:
    """A lost or shortened object is made again; a flipped bit by --verify, which leaves the sound ones alone."""
    store = tmp_path / "store"
    run(data, store)
    sound = files(store)
    first, second, third = (store / name for name in sound if name.startswith("objects/"))
    first.unlink()
    second.write_bytes(second.read_bytes()[:-1])
    stamp = third.stat().st_mtime_ns
    code, worked = run(data, store)
    assert code == 0 and len(worked) == 3 and files(store) == sound

    flipped = bytearray(second.read_bytes())
    flipped[len(flipped) // 2] ^= 1
    second.write_bytes(flipped)
    assert run(data, store) == (0, ["BRATS_003"]) and files(store) != sound
    code, worked = run(data, store, "--verify")
    assert code == 0 and len(worked) == 4 and files(store) == sound
    assert third.stat().st_mtime_ns == stamp
    (data / "imagesTr/BRATS_003.nii.gz").write_bytes((data / "imagesTr/BRATS_001.nii.gz").read_bytes())
    assert run(data, store)[0] == 0
    assert len(stores.open_index(str(store), {"spacing_mm": 1.0}).cases) == 5


def test_another_codec_counts_for_new_objects_alone(run: Prepare, data: Path, tmp_path: Path) -> None:
    """The key is that of the voxels: a run with lz4 keeps what zstd packed, and packs what is missing its own way."""
    store, packed = tmp_path / "store", tmp_path / "packed"
    run(data, store)
    run(data, packed, "--codec", "lz4")
    before = files(store)
    assert stores.objects(str(packed)).keys() == stores.objects(str(store)).keys()
    assert not set(stores.objects(str(packed)).values()) & set(stores.objects(str(store)).values())
    gone = next(name for name in before if name.startswith("objects/"))
    (store / gone).unlink()
    assert run(data, store, "--codec", "lz4")[0] == 0
    assert set(files(store)) - set(before) == set(files(packed)) - set(before) & set(files(store))


def test_refused_cases_are_listed_and_strict_stops_at_the_first(
    run: Prepare, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """quarantine.json and a table name case, file, reason, detail; exit 0 with good cases, 1 with none or --strict."""
    store = tmp_path / "store"
    assert run(data, store)[0] == 0
    (row,) = json.loads((store / "quarantine.json").read_text())
    assert list(row) == ["case", "uri", "reason", "detail"]
    assert (row["case"], row["reason"]) == ("BRATS_003", "gzip_damaged") and row["uri"].endswith("BRATS_003.nii.gz")
    printed = capsys.readouterr().out
    assert "1 cases set aside" in printed and "BRATS_003" in printed and "4 cases prepared, 1 set aside" in printed

    strict = tmp_path / "strict"
    code, worked = run(data, strict, "--strict")
    assert code == 1 and worked == ["BRATS_003", "BRATS_004"]  # the fixture goes backwards
    said = capsys.readouterr().err
    assert said.startswith("failed: case BRATS_003 (") and "gzip_damaged" in said and len(said.splitlines()) == 1
    assert len(stores.objects(str(strict))) == 1 and not (strict / "index.jsonl").exists()
    assert json.loads((strict / "quarantine.json").read_text()) == [row]
    assert run(data, strict) == (0, ["BRATS_001", "BRATS_002", "BRATS_003"])
    assert {n: c for n, c in files(strict).items() if "objects" in n} == {
        n: c for n, c in files(store).items() if "objects" in n
    }

    for image in (data / "imagesTr").glob("BRATS*"):
        image.write_bytes(image.read_bytes()[:-30])
    assert run(data, tmp_path / "none")[0] == 1
    assert "none of 5 cases" in capsys.readouterr().err
    assert len(json.loads((tmp_path / "none/quarantine.json").read_text())) == 5


def test_a_store_on_s3_is_the_same_byte_for_byte(run: Prepare, data: Path, tmp_path: Path, s3_server: str) -> None:
    """Objects, quarantine and index on S3 are those of a local store, but for the place; a second run makes nothing."""
    local, remote = tmp_path / "store", f"{s3_server}/store"
    run(data, local)
    assert run(data, remote)[0] == 0
    assert run(data, remote) == (0, ["BRATS_003"])
    there = {name: storage.read_bytes(storage.join(remote, name)) for name in storage.list_files(remote)}
    index = there.pop("index.jsonl").replace(remote.encode(), str(local).encode())
    assert there | {"index.jsonl": index} == files(local)


def check_every_point(data: Path, store: Callable[[int], str], arm: Callable[[int], Any], run: Prepare) -> int:
    """Die before every call; the same command again ends as if nothing had been, and makes no object twice."""
    undisturbed = None
    for last in range(400):
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


def test_a_kill_at_any_point_costs_nothing_but_time(run: Prepare, tmp_path: Path) -> None:
    """On a local disk, before every call that touches it."""
    data = write_msd_folder(tmp_path / "data", 2, shape=(10, 9, 8))
    manifests.write(scan.open_manifest(str(data)), str(tmp_path / "m.jsonl"))
    deaths = check_every_point(
        tmp_path / "m.jsonl", lambda n: str(tmp_path / f"{n}"), lambda n: Disk(n, power_loss=False), run
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
