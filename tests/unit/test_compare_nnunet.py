"""`scripts/compare_nnunet` without nnU-Net: what it gives it, how it scores what comes back, what it refuses.

The whole, with nnU-Net 2.8, is run by hand (docs/benchmarks/nnunet.md).
"""

import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from raytrain_brats import config
from raytrain_brats.errors import RunFailed
from raytrain_brats.run import spec
from scripts import compare_nnunet
from scripts.compare_nnunet import Args, Job
from scripts.nnunet_parts import scoring
from scripts.nnunet_parts.runner import NAME
from tests.support.cases import save, write_brats_folder

SMALL = ("preprocess.spacing_mm=1.0", "data.patch_xyz=[16, 16, 8]", "train.epochs=3")


@pytest.fixture
def job(tmp_path: Path) -> Job:
    """Six BraTS cases, whose values nnU-Net does not take as they are."""
    settings = config.load("demo", SMALL)
    manifest, source = spec.open_cases(settings, str(write_brats_folder(tmp_path / "data", 6)))
    return Job(Args(seeds=(1,)), settings, tmp_path / "out", manifest, source, "python")


def test_nnunet_gets_the_same_cases_fold_and_budget(job: Job, tmp_path: Path) -> None:
    """A file a channel in the order of ours, labels without gaps, regions; samples, patch and batch of the recipe."""
    job._convert()
    raw = tmp_path / "out/nnunet/nnUNet_raw" / NAME
    about = json.loads((raw / "dataset.json").read_text())
    assert about["labels"] == {"background": 0, "WT": [1, 2, 3], "TC": [2, 3], "ET": [3]}
    assert about["regions_class_order"] == [1, 2, 3] and about["numTraining"] == 6
    case = job.held_out[0]
    volume = job.source.volume(case)
    assert volume.label_xyz is not None
    for channel in range(4):
        image = nib.load(raw / f"imagesTr/{case.id}_{channel:04d}.nii.gz")
        np.testing.assert_array_equal(np.asarray(image.dataobj), volume.image_cxyz[channel])
        np.testing.assert_allclose(image.affine, volume.affine)
    label = np.asarray(nib.load(raw / f"labelsTr/{case.id}.nii.gz").dataobj)
    np.testing.assert_array_equal(label, np.array([0, 2, 1, 0, 3])[volume.label_xyz])

    order = job._order("train", seed=7, optimiser="adamw")
    assert set(order.splits[0]["val"]) == {c.id for c in job.held_out} and len(order.splits[0]["train"]) == 4
    assert order.patch_zyx == [8, 16, 16] and order.batch == 4 and order.samples == job.samples > 0
    assert (order.seed, order.optimiser, order.features) == (7, "adamw", 32)


def test_both_are_scored_by_the_same_code(job: Job, tmp_path: Path) -> None:
    """The truth in either convention's values scores one; a volume that is missing or of another shape is told."""
    for case in job.held_out:
        truth = job.source.volume(case).label_xyz
        assert truth is not None
        save(tmp_path / "ours" / f"{case.id}.nii.gz", truth)
        save(tmp_path / "theirs" / f"{case.id}.nii.gz", np.array([0, 2, 1, 0, 3], np.uint8)[truth])
    ours = scoring.scores(str(tmp_path / "ours"), job.source.convention, job.held_out, job.source)
    theirs = scoring.scores(str(tmp_path / "theirs"), compare_nnunet.WRITTEN, job.held_out, job.source)
    assert ours == theirs and set(ours["mean"]["dice"].values()) == {1.0}
    (tmp_path / "ours" / f"{job.held_out[0].id}.nii.gz").unlink()
    with pytest.raises(RunFailed, match="missing"):
        scoring.scores(str(tmp_path / "ours"), job.source.convention, job.held_out, job.source)
    save(tmp_path / "theirs" / f"{job.held_out[0].id}.nii.gz", np.zeros((3, 3, 3), np.uint8))
    with pytest.raises(RunFailed, match="shape"):
        scoring.scores(str(tmp_path / "theirs"), compare_nnunet.WRITTEN, job.held_out, job.source)


def result(program: str, seed: int, dice: float) -> dict[str, Any]:
    mean = {"dice": dict.fromkeys(("WT", "TC", "ET"), dice), "hd95_mm": dict.fromkeys(("WT", "TC", "ET"), 4.0)}
    views = {"plain": {"cpu_s": 20.0, "scores": {"mean": mean, "cases": {}}}}
    about = {"program": program, "optimiser": "sgd", "seed": seed, "parameters": 5_600_000, "samples": 3456}
    return about | {"train_cpu_s": 900.0 + seed, "views": views}


def test_the_table_has_means_and_spread_over_seeds() -> None:
    """A row for each program; one seed has no spread."""
    text = scoring.table([result("nnU-Net", 1, 0.9), result("nnU-Net", 2, 0.8), result("ours", 1, 0.95)])
    _, _, theirs, ours = text.splitlines()
    assert "| nnU-Net | sgd | plain | 1, 2 | 5.60 M | 3,456 | 0.850 ± 0.071 |" in theirs and "902 ± 1" in theirs
    assert "| ours | sgd | plain | 1 | 5.60 M | 3,456 | 0.950 | 0.950 |" in ours


def test_mistakes_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No nnU-Net, another comparison's folder, other files, a seed twice: before anything is made."""
    here = ["--out", str(tmp_path / "out"), "--programs", "ours"]
    for words, why in (
        (["--out", str(tmp_path / "out"), "--nnunet-python", "/no/python"], "--nnunet-python /no/python"),
        ([*here, "--seeds", "1", "1"], "give each once"),
        (["--out", "s3://bucket/x", "--programs", "ours"], "local folder"),
    ):
        assert compare_nnunet.main(words) == 2
        assert why in capsys.readouterr().err and not (tmp_path / "out").exists()
    compare_nnunet._begin(tmp_path / "out", Args())
    compare_nnunet._begin(tmp_path / "out", Args(seeds=(4,)))
    assert compare_nnunet.main([*here, "--features", "8"]) == 2
    assert "features 32 -> 8" in capsys.readouterr().err
    (tmp_path / "other").mkdir()
    (tmp_path / "other/mine.txt").write_text("mine")
    assert compare_nnunet.main(["--out", str(tmp_path / "other"), "--programs", "ours"]) == 2
    assert "mine.txt" in capsys.readouterr().err
