"""`expand`: no leak between folds, the source's labels, nobody else's files taken in."""

import json
from pathlib import Path

import numpy as np
import pytest

from raytrain_brats.cases.scan import open_manifest
from raytrain_brats.data.store import Source
from tests.support.cases import write_brats_folder, write_msd_folder
from tests.support.without_ray import Expand, expand_here, volumes


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Expand:
    return expand_here(monkeypatch)


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
