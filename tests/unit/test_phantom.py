"""Digital phantoms: the same bytes for the same arguments, MSD's layout, and tumours a network can see."""

import gzip
import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from raytrain_brats import phantom as command
from raytrain_brats.ray_ext import cluster
from raytrain_brats.synthetic import phantom
from tests.support import ROOT

GRID, SEED = 48, 11
FLAIR, T1GD, T2W = (phantom.MODALITIES.index(name) for name in ("FLAIR", "T1gd", "T2w"))


@pytest.fixture(scope="module")
def cases() -> list[phantom.PhantomCase]:
    return [phantom.make_case(seed, GRID) for seed in range(8)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Cases 1 and 2 of a set, and its dataset.json."""
    folder = tmp_path_factory.mktemp("phantoms")
    for number in (2, 1):
        phantom.write_case(str(folder), number, SEED, GRID, "procedural")
    phantom.write_dataset_json(str(folder), (2, 1), SEED, GRID, "procedural")
    return folder


def digest(folder: Path, number: int) -> str:
    files = [folder / part / f"BRATS_{number:03d}.nii.gz" for part in ("imagesTr", "labelsTr")]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def test_same_arguments_same_bytes_in_another_process(folder: Path, tmp_path: Path) -> None:
    """A case's files depend on seed and number alone: not on the process, its neighbours or the number of threads."""
    call = f"phantom.write_case({str(tmp_path)!r}, 2, {SEED}, {GRID}, 'procedural')"
    threads = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    subprocess.run(
        [sys.executable, "-c", f"from raytrain_brats.synthetic import phantom; {call}"],
        check=True,
        env=threads,
        timeout=60,
    )

    assert digest(tmp_path, 2) == digest(folder, 2)


def test_numbers_and_seeds_give_different_cases(folder: Path, tmp_path: Path) -> None:
    """Neighbouring numbers and seeds share nothing."""
    phantom.write_case(str(tmp_path), 1, SEED + 1, GRID, "procedural")

    assert len({digest(folder, 1), digest(folder, 2), digest(tmp_path, 1)}) == 3


def test_files_are_laid_out_as_in_msd(folder: Path) -> None:
    """Images are float32 (x, y, z, 4), labels uint8, both RAS with the spacing as a diagonal affine in mm."""
    image: Any = nib.load(folder / "imagesTr" / "BRATS_001.nii.gz")
    label: Any = nib.load(folder / "labelsTr" / "BRATS_001.nii.gz")

    assert (image.shape, image.get_data_dtype()) == ((48, 48, 31, 4), np.float32)
    assert (label.shape, label.get_data_dtype()) == ((48, 48, 31), np.uint8)
    for nifti in (image, label):
        assert np.array_equal(nifti.affine, np.diag([5, 5, 5, 1]))
        assert nib.aff2axcodes(nifti.affine) == ("R", "A", "S")  # type: ignore[no-untyped-call]
        assert nifti.header.get_xyzt_units()[0] == "mm"


def test_gzip_header_is_anonymous_and_nothing_is_left_over(folder: Path) -> None:
    """The gzip header has no time and no name, and no hidden temporary file stays behind."""
    for file in folder.rglob("*.nii.gz"):
        head = file.read_bytes()[:10]
        assert head[3] == 0 and head[4:8] == bytes(4)
        assert gzip.decompress(file.read_bytes())[344:347] == b"n+1"
    assert not [file for file in folder.rglob(".*") if file.is_file()]


def test_record_names_the_files_and_their_size(tmp_path: Path) -> None:
    """The record of a case holds its file name, what was drawn, and the bytes on disk."""
    record = phantom.write_case(str(tmp_path), 12, SEED, 32, "procedural")

    assert record["file"] == "BRATS_012.nii.gz" and record["anatomy"] == "procedural" and record["rim"] in phantom.RIMS
    assert record["image_bytes"] == (tmp_path / "imagesTr" / "BRATS_012.nii.gz").stat().st_size
    assert record["label_bytes"] == (tmp_path / "labelsTr" / "BRATS_012.nii.gz").stat().st_size


def test_voxels_may_be_stored_as_int16(tmp_path: Path, folder: Path) -> None:
    """The same values, as BraTS's own files have them."""
    phantom.write_case(str(tmp_path), 1, SEED, GRID, "procedural", "int16")
    short, usual = (nib.load(where / "imagesTr" / "BRATS_001.nii.gz") for where in (tmp_path, folder))
    assert short.get_data_dtype() == np.int16
    assert np.array_equal(short.dataobj, usual.dataobj)


def test_dataset_json_says_synthetic_and_lists_the_cases(folder: Path) -> None:
    """dataset.json has MSD's keys in case order, says the data are no patient data, and how to make them again."""
    content = json.loads((folder / "dataset.json").read_text())

    assert "SYNTHETIC" in content["description"] and "not patient data" in content["description"]
    assert content["synthetic"] == {"seed": SEED, "grid": GRID, "anatomy": "procedural"}
    assert content["modality"] == {"0": "FLAIR", "1": "T1w", "2": "T1gd", "3": "T2w"}
    assert list(content["labels"]) == ["0", "1", "2", "3"]
    assert content["numTraining"] == 2
    assert [entry["label"] for entry in content["training"]] == [f"./labelsTr/BRATS_00{n}.nii.gz" for n in (1, 2)]
    assert all((folder / path).is_file() for entry in content["training"] for path in entry.values())


def test_background_is_zero_and_the_tumour_is_in_the_brain(cases: list[phantom.PhantomCase]) -> None:
    """Outside one connected brain of human size all modalities are exactly 0; inside all are whole numbers above 0."""
    for case in cases:
        brain = case.image_xyzc[..., 0] > 0
        parts, _ = ndimage.label(brain)
        assert ((case.image_xyzc > 0) == brain[..., None]).all()
        assert np.array_equal(case.image_xyzc, np.rint(case.image_xyzc))
        assert not brain[[0, -1]].any() and not brain[:, [0, -1]].any()
        assert np.bincount(parts.ravel())[1] > 0.99 * brain.sum()
        assert 1000 < brain.sum() * case.spacing_mm**3 / 1e3 < 1800
        assert (case.label_xyz[~brain] == 0).all()


def test_every_case_has_every_label_in_a_sensible_volume(cases: list[phantom.PhantomCase]) -> None:
    """Each case can train each class, also where a voxel is thicker than a rim, and the facts state the volumes."""
    for case in cases:
        volumes_ml = np.bincount(case.label_xyz.ravel(), minlength=4)[1:] * case.spacing_mm**3 / 1e3
        assert volumes_ml.min() >= phantom.MIN_LABEL_ML
        assert 5 <= volumes_ml.sum() <= 350
        stated = [case.facts[name] for name in ("oedema_ml", "core_ml", "enhancing_ml")]
        assert stated == pytest.approx(volumes_ml.tolist(), abs=0.051)


def test_a_head_without_a_proper_tumour_is_drawn_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tumour that is too small is replaced, always by the same one; the search ends with an error, not never."""
    small = phantom.make_case(2, 32)
    monkeypatch.setattr(phantom, "MIN_WHOLE_ML", np.count_nonzero(small.label_xyz) * small.spacing_mm**3 / 1e3 + 1)
    larger, again = (phantom.make_case(2, 32) for _ in range(2))

    assert np.count_nonzero(larger.label_xyz) > np.count_nonzero(small.label_xyz)
    assert np.array_equal(larger.image_xyzc, again.image_xyzc)
    monkeypatch.setattr(phantom, "MIN_WHOLE_ML", 1e6)
    with pytest.raises(RuntimeError, match="32 draws"):
        phantom.make_case(2, 32)


def test_contrast_shows_the_tumour(cases: list[phantom.PhantomCase]) -> None:
    """Oedema is bright on FLAIR and T2, the enhancing part on T1 with gadolinium, the core dark beside it."""
    for case in cases:
        brain = (case.label_xyz == 0) & (case.image_xyzc[..., 0] > 0)
        regions = [brain, *(case.label_xyz == value for value in (1, 2, 3))]
        mean_lc = np.array([case.image_xyzc[region].mean(0) for region in regions])
        assert mean_lc[1, FLAIR] > 1.15 * mean_lc[0, FLAIR]
        assert mean_lc[1, T2W] > 1.15 * np.median(case.image_xyzc[brain, T2W])  # the mean has the bright CSF in it
        assert mean_lc[3, T1GD] > 1.2 * mean_lc[0, T1GD]
        assert mean_lc[3, T1GD] > 1.3 * mean_lc[2, T1GD]


def test_the_tumour_is_one_piece(cases: list[phantom.PhantomCase]) -> None:
    """Nine tenths of the tumour hang together: labels are an object, not speckle."""
    for case in cases:
        whole = case.label_xyz > 0
        parts, _ = ndimage.label(whole, np.ones((3, 3, 3)))
        assert np.bincount(parts.ravel())[1:].max() > 0.9 * whole.sum()


def test_a_seed_gives_one_head_at_every_grid_size() -> None:
    """The grid changes the resolution and not the patient, and its height follows MSD's 240 : 155."""
    coarse, fine = (phantom.make_case(3, grid) for grid in (40, 80))

    assert fine.label_xyz.shape == (80, 80, 52) and coarse.label_xyz.shape == (40, 40, 26)
    assert fine.spacing_mm == 3.0 and coarse.spacing_mm == 6.0
    nested = fine.label_xyz.reshape(40, 2, 40, 2, 26, 2).max((1, 3, 5)) > 0
    agreement = 2 * (nested & (coarse.label_xyz > 0)).sum() / (nested.sum() + (coarse.label_xyz > 0).sum())
    assert agreement > 0.75


@pytest.mark.parametrize("arguments", [(0, 31), (0, 513), (-1, 48), (0, 48, "colin"), (0, 48, "")])
def test_bad_arguments_are_refused_with_a_remedy(arguments: tuple[Any, ...]) -> None:
    """Impossible grids, seeds and anatomies are named in the message, with what to give instead."""
    with pytest.raises(ValueError, match="give"):
        phantom.make_case(*arguments)


def test_case_numbers_count_from_one(tmp_path: Path) -> None:
    """Case 0 and negative seeds are refused before anything is written."""
    for number, seed in ((0, 0), (1, -1)):
        with pytest.raises(ValueError, match="count from 1"):
            phantom.write_case(str(tmp_path), number, seed, GRID, "procedural")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("installed", [False, True])
def test_what_is_installed_changes_no_phantom(
    installed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command draws the procedural head, with nilearn or without; "mni" without it says what to install."""
    maps = [tmp_path / "t1", tmp_path / "gm", tmp_path / "wm"]
    monkeypatch.setattr(phantom, "_mni_files", lambda: maps if installed else [])
    monkeypatch.setattr(cluster, "connect", lambda: None)
    monkeypatch.setattr(cluster, "check_shared", lambda places: None)
    monkeypatch.setattr(cluster, "parallel_map", map)
    assert command.main(["--out", str(tmp_path / "set"), "--cases", "1", "--grid", "32"]) == 0
    usual = phantom.write_case(str(tmp_path / "usual"), 1, 0, 32, "procedural")
    assert usual["anatomy"] == "procedural" and digest(tmp_path / "set", 1) == digest(tmp_path / "usual", 1)
    if not installed:
        assert command.main(["--out", str(tmp_path / "other"), "--cases", "1", "--anatomy", "mni"]) == 2
        assert "pip install nilearn" in capsys.readouterr().err and not (tmp_path / "other").exists()


@pytest.mark.skipif(not phantom._mni_files(), reason="nilearn is not installed")
def test_mni_anatomy_gives_whole_cases() -> None:
    """The ICBM152 maps go through the same steps as the procedural head."""
    case = phantom.make_case(0, GRID, "mni")

    assert case.facts["anatomy"] == "mni"
    assert np.bincount(case.label_xyz.ravel(), minlength=4).min() > 0
