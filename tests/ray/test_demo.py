"""`scripts/demo` on a Ray of its own."""

import json
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from raytrain_brats import books
from tests.support import ROOT


def test_the_demo_survives_a_killed_worker_and_says_what_it_made(tmp_path: Path) -> None:
    """`scripts/demo --chaos` on few phantoms: one restart, every sample once, scores, predictions, report, summary.

    In a folder whose name is not ASCII, which Ray's metrics do not take.
    """
    out = tmp_path / "Läufe 训练"
    small = ["train.epochs=10", "checkpoint.every_samples=16", "validate.every_samples=100"]
    command = [sys.executable, "-m", "scripts.demo_story", "--chaos", "--out", str(out), "--cases", "6"]
    command += [f"--set={value}" for value in small]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1800, check=False)
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-2000:]}"

    summary = json.loads((out / "summary.json").read_text())
    rows = books.read_rows(str(out / "run"))
    assert summary["restarts"] == 1
    assert summary["samples_seen"] == 4 * 4 * 10 + 12  # places that are empty at begin and end
    assert [row["positions"] for row in rows] == [[p, p + 4] for p in range(0, 172, 4)]
    assert set(summary["dice"]) == {"WT", "TC", "ET"}
    assert len(list((out / "predictions").glob("*.nii.gz"))) == 6
    assert Path(summary["report"]).read_text().startswith("<!doctype html>")
    assert summary["seconds"]["train"] > 0
    scores = (out / "run/evaluation/cases.csv").read_text().splitlines()[1:]
    for name, *dice in (line.split(",")[:4] for line in scores):  # the scores are those of the files written
        made, truth = (
            np.asarray(nib.load(out / p / f"{name}.nii.gz").dataobj) for p in ("predictions", "data/labelsTr")
        )
        for values, found in zip(((1, 2, 3), (2, 3), (3,)), dice, strict=True):
            p, t = np.isin(made, values), np.isin(truth, values)
            assert 2 * (p & t).sum() / max(1, p.sum() + t.sum()) == pytest.approx(float(found), abs=1e-3)
