"""No case vanishes: whatever a scan does not take is counted, named with its cause, and stands in the manifest."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from raytrain_brats import index, prepare
from raytrain_brats.cases import layouts, scan
from raytrain_brats.data import manifest as manifests
from raytrain_brats.data.manifest import Skipped
from raytrain_brats.errors import UserError
from raytrain_brats.ray_ext import cluster
from tests.support.cases import save, write_brats_folder, write_msd_folder

SHAPE = (10, 9, 8)
CASE = "BraTS2021_00001"


@pytest.fixture
def brats(tmp_path: Path) -> Path:
    """Three sound cases, BraTS2021_00000 to _00002."""
    return write_brats_folder(tmp_path / "data", 3, shape=SHAPE)


def skipped(folder: Path) -> list[Skipped]:
    """Of a scan that takes the cases 0 and 2."""
    found = scan.scan(str(folder))
    assert [case.id for case in found.cases] == ["BraTS2021_00000", "BraTS2021_00002"]
    return list(found.skipped)


def test_a_missing_modality_costs_its_case_alone(brats: Path) -> None:
    """And is told by the file's name."""
    (brats / CASE / f"{CASE}_t1ce.nii.gz").unlink()
    (row,) = skipped(brats)
    assert (row.cause, row.case, row.detail) == (layouts.MODALITY, CASE, f"lacks {CASE}_t1ce.nii.gz")


def test_a_missing_label_and_the_file_that_may_be_it(brats: Path) -> None:
    """BraTS20 case 355 has its label under another name: it is named beside the case that lacks one."""
    (brats / CASE / f"{CASE}_seg.nii.gz").rename(brats / CASE / "W39_1998.09.19_Segm.nii.gz")
    case, file = skipped(brats)
    assert (case.cause, case.case) == (layouts.LABEL, CASE)
    assert case.detail == f"lacks {CASE}_seg.nii.gz; if {CASE}/W39_1998.09.19_Segm.nii.gz is it, rename it so"
    assert (file.cause, file.path) == (layouts.UNUSED, f"{CASE}/W39_1998.09.19_Segm.nii.gz")


def test_links_that_lead_nowhere(brats: Path) -> None:
    """DataLad's files that were not fetched: one case, told with the remedy."""
    for path in (brats / CASE).iterdir():
        path.unlink()
        path.symlink_to(f"../.git/annex/objects/xx/{path.name}")
    (row,) = skipped(brats)
    assert (row.cause, row.case) == (layouts.UNREADABLE, CASE)
    assert "is a link that leads nowhere, as 4 more of its files; fetch it" in row.detail


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can take the right to enter away from others")
@pytest.mark.parametrize("closed", ["", f"{CASE}_t1.nii.gz"])
def test_a_folder_or_a_file_without_rights(brats: Path, closed: str) -> None:
    """As another user than its owner: the others are taken, and `index` does not end at the first."""
    (brats / CASE / closed).chmod(0o700)
    for folder in [brats, *brats.parents]:
        if str(folder).startswith("/tmp/"):
            folder.chmod(0o755)
    code = os.fork()
    if code == 0:
        os.setgid(65534)
        os.setuid(65534)
        try:
            (row,) = skipped(brats)
            assert (row.cause, row.path) == (layouts.UNREADABLE, f"{CASE}/{closed}".rstrip("/"))
            assert "Permission denied" in row.detail
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitpid(code, 0)[1] == 0


def test_a_name_that_is_no_utf8(brats: Path) -> None:
    """A file that nothing else could name is told with its bytes."""
    with open(os.path.join(os.fsencode(brats), b"F\xfcrth_flair.nii.gz"), "wb") as file:
        file.write(b"x")
    found = scan.scan(str(brats))
    assert len(found.cases) == 3
    assert [(row.path, row.cause) for row in found.skipped] == [("F\\xfcrth_flair.nii.gz", layouts.UNREADABLE)]
    assert "no UTF-8" in found.skipped[0].detail


def test_a_case_that_is_there_twice(brats: Path) -> None:
    """Nobody can say which one is meant: neither is taken, both are named."""
    shutil.copytree(brats / CASE, brats / "old" / CASE)
    (row,) = skipped(brats)
    assert (row.cause, row.case) == (layouts.TWICE, CASE)
    assert f"{CASE}/{CASE}_flair.nii.gz and old/{CASE}/{CASE}_flair.nii.gz" in row.detail


def test_a_stray_image_hides_nobody(brats: Path) -> None:
    """Neither for training nor for `predict`, which once took a stray file for the whole folder."""
    save(brats / "atlas.nii.gz", np.ones(SHAPE, np.int16))
    assert [(row.cause, row.path) for row in scan.scan(str(brats)).skipped] == [(layouts.UNKNOWN, "atlas.nii.gz")]
    found, left = scan.scan_images([str(brats)])
    assert len(found) == 3 and [(row.cause, row.path) for row in left] == [(layouts.UNKNOWN, "atlas.nii.gz")]


@pytest.mark.parametrize(
    ("what", "cause", "case"),
    [
        ("imagesTr/BRATS_002.nii.gz", layouts.MODALITY, "BRATS_002"),
        ("labelsTr/BRATS_002.nii.gz", layouts.LABEL, "BRATS_002"),
    ],
)
@pytest.mark.parametrize("link", [False, True])
def test_a_listed_file_that_is_not_there(tmp_path: Path, what: str, cause: str, case: str, link: bool) -> None:
    """Of an MSD folder: gone, or a link that leads nowhere; the other cases are taken."""
    folder = write_msd_folder(tmp_path, 3, shape=SHAPE)
    (folder / what).unlink()
    if link:
        (folder / what).symlink_to("nowhere")
    found = scan.scan(str(folder))
    assert [c.id for c in found.cases] == ["BRATS_001", "BRATS_003"]
    rows = [row for row in found.skipped if row.case]
    assert [(row.cause, row.case, row.path) for row in rows] == [(layouts.UNREADABLE if link else cause, case, what)]


def test_a_numbered_channel_that_is_not_there(tmp_path: Path) -> None:
    """Of nnU-Net's raw data: one line for the case, none for its other channels."""
    for name in ("P1", "P2"):
        for channel in range(4):
            save(tmp_path / f"imagesTr/{name}_{channel:04d}.nii.gz", np.ones(SHAPE, np.int16))
        save(tmp_path / f"labelsTr/{name}.nii.gz", np.ones(SHAPE, np.uint8))
    about = {"channel_names": dict(enumerate(("T1", "T1ce", "T2", "FLAIR"))), "labels": {"background": 0, "edema": 1}}
    about["labels"] |= {"core": 2, "ET": 3}
    (tmp_path / "dataset.json").write_text(json.dumps(about))
    (tmp_path / "imagesTr/P2_0002.nii.gz").unlink()
    found = scan.scan(str(tmp_path))
    assert [case.id for case in found.cases] == ["P1"]
    assert [(row.cause, row.case, row.path) for row in found.skipped] == [
        (layouts.MODALITY, "P2", "imagesTr/P2_0002.nii.gz")
    ]


def test_an_image_that_dataset_json_does_not_list(tmp_path: Path) -> None:
    """It may have been forgotten."""
    folder = write_msd_folder(tmp_path, 2, shape=SHAPE)
    shutil.copy(folder / "imagesTr/BRATS_001.nii.gz", folder / "imagesTr/BRATS_009.nii.gz")
    assert [(r.cause, r.path) for r in scan.scan(str(folder)).skipped] == [
        (layouts.UNLISTED, "imagesTr/BRATS_009.nii.gz")
    ]


def test_index_ends_with_what_it_did_not_take(brats: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Counted, up to ten by name, all in the manifest; --strict refuses, and writes nothing."""
    (brats / CASE / f"{CASE}_t1.nii.gz").unlink()
    for number in range(12):
        save(brats / f"stray{number:02d}.nii.gz", np.ones(SHAPE, np.int16))
    out = tmp_path / "m.jsonl"
    arguments = ["--data", str(brats), "--out", str(out)]
    assert index.main([*arguments, "--strict"]) == 2
    assert "--strict: 13 cases or files" in capsys.readouterr().err and not out.exists()
    assert index.main(arguments) == 0
    told = capsys.readouterr().err
    assert f"not taken, missing modality: 1\n  {CASE}: lacks {CASE}_t1.nii.gz\n" in told
    assert "not taken, name not known: 12\n  stray00.nii.gz: " in told and "stray09" in told and "and 2 more" in told
    assert len(manifests.read(str(out)).skipped) == 13


def test_prepare_quarantines_what_is_missing(
    brats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As docs/refusals.md promises; a damaged modality is reported under its own file's name."""
    monkeypatch.setattr(cluster, "connect", lambda: None)
    monkeypatch.setattr(cluster, "check_shared", lambda *_: None)
    monkeypatch.setattr(cluster, "data_map", lambda function, rows: map(function, rows))
    (brats / CASE / f"{CASE}_t1.nii.gz").unlink()
    damaged = brats / "BraTS2021_00002" / "BraTS2021_00002_t1.nii.gz"
    damaged.write_bytes(damaged.read_bytes()[:-5])
    store = tmp_path / "store"
    assert prepare.main(["--data", str(brats), "--store", str(store), "--set", "preprocess.spacing_mm=1"]) == 0
    rows = json.loads((store / "quarantine.json").read_text())
    assert [(row["case"], row["reason"]) for row in rows] == [
        ("BraTS2021_00002", "gzip_damaged"),
        (CASE, "missing"),
    ]
    assert rows[0]["uri"] == str(damaged) and "_t1.nii.gz" in rows[0]["detail"]
    assert "1 cases prepared, 2 set aside" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("names", "told"),
    [
        (
            ["scan1.nii.gz", "scan2.nii.gz"],
            "holds 2 NIfTI files, but no case: the names tell no modality, such as scan1",
        ),
        (["a/1.dcm", "a/2.dcm"], "2 of them DICOM: convert them with dcm2niix"),
        (["notes.txt"], r"no NIfTI file is among its 1 files \(such as notes.txt\)"),
        (
            [f"BraTS-GLI-{n:05d}-000-{kind}.nii.gz" for n in range(3) for kind in ("t2f", "t1n", "t1c", "seg")],
            "no case can be used of 3 found: missing modality in 3, .*BraTS-GLI-00000-000-t2w.nii.gz",
        ),
        ([f"BraTS20_Training_001_{kind}.nii" for kind in ("flair", "t1", "t1ce", "t2")], "no label in 1, such as"),
        (["sub-01_T1w.nii.gz"], "the names tell no modality|missing modality"),
    ],
)
def test_nothing_taken_names_the_nearest_layout(tmp_path: Path, names: list[str], told: str) -> None:
    """And what differs from it."""
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(UserError, match=told):
        scan.scan(str(tmp_path))


def test_a_dataset_json_that_lists_nothing_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The names of the files are not at fault then."""
    data = write_msd_folder(tmp_path / "data", 2, shape=SHAPE)
    about = json.loads((data / "dataset.json").read_text())
    (data / "dataset.json").write_text(json.dumps(about | {"training": []}))
    assert index.main(["--data", str(data), "--out", str(tmp_path / "m.jsonl")]) == 2
    assert "dataset.json lists no case, but 4 NIfTI files lie there" in capsys.readouterr().err
