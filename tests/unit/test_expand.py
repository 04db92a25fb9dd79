"""`expand`: the same bytes by any way, no leak between folds, the source's labels; a kill costs nothing but time."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from raytrain_brats import expand, storage
from raytrain_brats.cases.scan import open_manifest, scan
from raytrain_brats.data.store import Source
from raytrain_brats.ray_ext import cluster
from tests.support.cases import write_brats_folder, write_msd_folder
from tests.support.crashes import Disk, die_before_request, in_child

Expand = Callable[..., int]


def volumes(out: Path) -> dict[str, bytes]:
    return {str(p.relative_to(out)): p.read_bytes() for p in sorted(out.rglob("*.nii.gz"))}


def books(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.glob("*.json"))}


def command(data: Path, out: Path, copies: int, *options: str) -> list[str]:
    return ["--data", str(data), "--out", str(out), "--copies", str(copies), *options]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Expand:
    """Run `expand` in this process, a plain map in place of Ray Data; its exit code."""

    def here(function: Any, rows: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        return (function(row) for row in reversed(rows))

    monkeypatch.setattr(cluster, "connect", lambda: None)
    monkeypatch.setattr(cluster, "check_shared", lambda *_: None)
    monkeypatch.setattr(cluster, "data_map", here)
    return lambda *arguments: expand.main(command(*arguments))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_msd_folder(tmp_path / "data", 3, shape=(14, 12, 10))


def test_a_set_goes_on_where_it_stands_and_takes_no_other_in(
    run: Expand, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """More copies are added and lost ones made again, the rest untouched; another seed, source or folder is refused."""
    out = tmp_path / "out"
    assert run(data, out, 2) == 0
    assert "6 volumes of 3 cases" in capsys.readouterr().out
    first, stamps = volumes(out), {p: p.stat().st_mtime_ns for p in out.rglob("*.nii.gz")}
    assert len(set(first.values())) == len(first) == 12
    gone = out / "labelsTr/BRATS_002_c001.nii.gz"
    gone.unlink()
    stamps.pop(gone), stamps.pop(out / "imagesTr/BRATS_002_c001.nii.gz")
    assert run(data, out, 10) == 0  # more than are made of one decoded case
    assert len(volumes(out)) == 60 and len(set(volumes(out).values())) == 60
    assert volumes(out).items() >= first.items()
    assert stamps.items() <= {p: p.stat().st_mtime_ns for p in out.rglob("*.nii.gz")}.items()
    assert len(open_manifest(str(out)).cases) == 30
    capsys.readouterr()

    other = write_msd_folder(tmp_path / "other", 3, shape=(14, 12, 11))
    for arguments, said in (
        ((data, out, 2, "--seed", "1"), "begun with --seed 0"),
        ((other, out, 2), "copies of another BRATS_001"),
        ((data, data, 2), "holds other files"),
        ((data, tmp_path / "new", 0), "--copies 0"),
    ):
        assert run(*arguments) == 2
        assert said in capsys.readouterr().err
    (data / "below").mkdir()  # within the data, and the data within it: neither is a place
    for place in (data / "below", data / "../data/below"):
        assert run(data, place, 2) == 2
        assert "lie within each other" in capsys.readouterr().err
    for name in ("imagesTr/mine_c001.nii.gz", "labelsTr/BRATS_009.nii.gz", "dataset.json"):  # put there in between
        kept = (out / name).read_bytes() if (out / name).exists() else None
        (out / name).write_bytes(b"{}")
        assert run(data, out, 2) == 2
        assert name in capsys.readouterr().err and (out / name).read_bytes() == b"{}"
        (out / name).unlink() if kept is None else (out / name).write_bytes(kept)
    (out / "expand.json").write_text("[]")
    assert run(data, out, 2) == 2
    assert "expand.json is damaged" in capsys.readouterr().err


def test_a_copy_is_in_the_fold_of_its_original(run: Expand, data: Path, tmp_path: Path) -> None:
    """Also where an original was refused, and for two originals of equal content; scanned again, nothing changes."""
    folder = write_msd_folder(tmp_path / "many", 11, shape=(14, 12, 10))
    for part in ("imagesTr", "labelsTr"):
        (folder / part / "BRATS_009.nii.gz").write_bytes((folder / part / "BRATS_002.nii.gz").read_bytes())
    cut = folder / "imagesTr/BRATS_004.nii.gz"
    cut.write_bytes(cut.read_bytes()[:-20])
    out, originals = tmp_path / "out", {c.id: c for c in open_manifest(str(folder)).cases}
    assert run(folder, out, 3) == 0
    (refused,) = json.loads((out / "quarantine.json").read_text())
    assert list(refused) == ["case", "uri", "reason", "detail"]
    assert (refused["case"], refused["reason"]) == ("BRATS_004", "gzip_damaged")

    made = open_manifest(str(out))
    assert len(made.cases) == 30 and len({c.sha256 for c in made.cases}) == 30
    for case in made.cases:
        original = originals[case.id.rpartition("_c")[0]]
        assert case.fold == original.fold
        assert case.subject == ("BRATS_002" if original.id == "BRATS_009" else original.id)
    assert len({c.fold for c in made.cases}) == 5
    about = json.loads((out / "dataset.json").read_text())
    for row in about["training"]:
        del row["fold"]  # folds dealt anew keep a subject together, too
    (out / "dataset.json").write_text(json.dumps(about))
    folds = {(c.subject, c.fold) for c in open_manifest(str(out)).cases}
    assert len(folds) == len({subject for subject, _ in folds}) == 9


def test_the_label_convention_is_the_sources(run: Expand, tmp_path: Path) -> None:
    """Copies of BraTS 2021 cases hold 1, 2 and 4, and are read as such by our own strict decoder, each in one file."""
    out = tmp_path / "out"
    assert run(write_brats_folder(tmp_path / "brats", 2), out, 2) == 0
    made = open_manifest(str(out))
    assert (made.layout, made.convention) == ("MSD", "brats2017_2021")
    found = Source(made.root, made.convention, 1.0)
    for case in made.cases:
        prepared = found.load(case)
        assert set(np.unique(prepared.truth_xyz())) == {0, 1, 2, 4}
        assert prepared.image_czyx.dtype == np.int16
    assert json.loads((out / "dataset.json").read_text())["labels"]["4"] == "ET"


def test_nothing_to_expand_is_a_failure(run: Expand, data: Path, tmp_path: Path) -> None:
    """No readable case: exit 1, all named, and no dataset.json that could be trained on."""
    for image in (data / "imagesTr").glob("BRATS*"):
        image.write_bytes(image.read_bytes()[:-30])
    assert run(data, tmp_path / "out", 2) == 1
    assert len(json.loads((tmp_path / "out/quarantine.json").read_text())) == 3
    assert not (tmp_path / "out/dataset.json").exists()


def test_a_kill_at_any_point_costs_nothing_but_time(run: Expand, tmp_path: Path) -> None:
    """Before every call that touches the disk: what was whole stays, and the end is that of an undisturbed run."""
    data, undisturbed = write_msd_folder(tmp_path / "data", 1, shape=(14, 12, 10)), tmp_path / "undisturbed"
    assert run(data, undisturbed, 1) == 0
    for last in range(400):
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


def start(data: Path, out: Path, copies: int) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "raytrain_brats", "expand", *command(data, out, copies)],
        env=os.environ | {"RAY_ADDRESS": "local"},
        stdout=subprocess.PIPE,
        text=True,
    )


def test_ray_makes_the_same_bytes(run: Expand, data: Path, tmp_path: Path) -> None:
    """On Ray Data, over all CPUs, the files are those of one process that goes through the cases one by one."""
    assert run(data, tmp_path / "one", 3) == 0
    process = start(data, tmp_path / "many", 3)
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0 and "9 volumes of 3 cases" in said
    assert volumes(tmp_path / "many") == volumes(tmp_path / "one")
    assert books(tmp_path / "many") == books(tmp_path / "one")


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
