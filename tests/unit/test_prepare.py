"""`prepare`: what is there is not made again, what is damaged is.

Ray Data is left out here: a plain map does its work in this process. The whole command on Ray is tested in tests/ray.
"""

import json
import shutil
from pathlib import Path

import pytest

from raytrain_brats import storage
from raytrain_brats.data import store as stores
from tests.support.cases import write_msd_folder
from tests.support.without_ray import Prepare, files, prepare_here


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Prepare:
    return prepare_here(monkeypatch)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Five cases: BRATS_003 is cut off, BRATS_005 a copy of BRATS_002."""
    folder = write_msd_folder(tmp_path / "data", 5, shape=(10, 9, 8))
    cut = folder / "imagesTr/BRATS_003.nii.gz"
    cut.write_bytes(cut.read_bytes()[:-20])
    for part in ("imagesTr", "labelsTr"):
        shutil.copy(folder / part / "BRATS_002.nii.gz", folder / part / "BRATS_005.nii.gz")
    return folder


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
