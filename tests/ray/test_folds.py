"""The folds of one data set, trained by real runs: side by side on one Ray, resumed, scored, and answering together."""

import csv
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from raytrain_brats.run import checkpoint
from raytrain_brats.synthetic.phantom import write_set
from tests.support.commands import environment, left

SMALL = ("train.epochs=2", "preprocess.spacing_mm=7.5", "data.patch_xyz=[16,16,16]", "checkpoint.every_samples=4")
SIDE_BY_SIDE = """
import sys
from raytrain_brats.ray_ext import cluster
from raytrain_brats.run import folds
import ray
cluster.connect(4)
plan = folds.Plan(("1", "1"), ray.get_runtime_context().gcs_address)

def command(fold, workers):
    return folds.command_line([*sys.argv[1:], "--workers", workers, "--fold", str(fold)])

folds.train((0, 1), command, plan)
"""


@pytest.mark.campaign
def test_folds_are_trained_resumed_and_answer_together(place: Path) -> None:
    """`train --fold all` is stopped by SIGTERM, saves, goes on and ends; folds that are finished end at once;
    `evaluate` scores each case once, `predict` takes all five."""
    write_set(str(place / "data"), cases=6, seed=2, grid=32, anatomy="procedural")
    sets = [word for value in SMALL for word in ("--set", value)]
    given = ["--data", str(place / "data"), "--run-dir", str(place / "run"), "--recipe", "demo", *sets]
    command = [sys.executable, "-m", "raytrain_brats", "train", *given, "--fold", "all"]
    mark = "folds"
    pipes = {"env": environment(MARK=mark), "cwd": place, "text": True}
    first = subprocess.Popen(
        [*command, "--set", "train.epochs=2"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **pipes
    )
    deadline = time.monotonic() + 300
    while not list((place / "run").glob("fold-1/checkpoints/*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    first.send_signal(signal.SIGTERM)
    said = first.communicate(timeout=120)[0]
    assert first.returncode == 130, said
    assert "5 folds into" in said and "1 at a time" in said and "fold 0: done" in said
    assert not left(mark)

    done = subprocess.run(command, capture_output=True, timeout=900, **pipes)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    lines = done.stdout.splitlines()
    assert any(line.startswith("fold 0: ") and "is finished" in line for line in lines)
    assert any(line.startswith("fold 4: done") for line in lines)
    for fold in range(5):
        found, _ = checkpoint.newest_valid(str(place / "run" / f"fold-{fold}"))
        assert found and found.samples_seen >= 4 * 4 * 2

    scored = [sys.executable, "-m", "raytrain_brats", "evaluate", *given[:4], "--no-mirror"]
    done = subprocess.run(scored, capture_output=True, timeout=600, **pipes)
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader((place / "run/evaluation/cases.csv").read_text().splitlines()))
    assert sorted(row["case"] for row in rows) == [f"BRATS_{n:03d}" for n in range(1, 7)]
    assert len(json.loads((place / "run/evaluation/summary.json").read_text())["folds"]) == 5
    out = ["--out", str(place / "out"), "--images", str(place / "data"), "--save-probabilities"]
    predict = [sys.executable, "-m", "raytrain_brats", "predict", *given[2:4], *out]
    done = subprocess.run(predict, capture_output=True, timeout=600, **pipes)
    assert done.returncode == 0 and "the mean of 5 networks" in done.stdout, done.stderr
    assert len(list((place / "out").glob("*.nii.gz"))) == 12


@pytest.mark.campaign
def test_two_folds_share_a_ray(place: Path) -> None:
    """As on one machine with several GPUs: the command's Ray is joined by each fold's driver."""
    write_set(str(place / "data"), cases=6, seed=2, grid=32, anatomy="procedural")
    sets = [word for value in SMALL for word in ("--set", value)]
    given = ["--data", str(place / "data"), "--run-dir", str(place / "run"), "--recipe", "demo", *sets]
    done = subprocess.run(
        [sys.executable, "-c", SIDE_BY_SIDE, *given], capture_output=True, text=True, timeout=900, cwd=place,
        env=environment() | {"RAY_ADDRESS": "local"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    lines = done.stdout.splitlines()
    began = [number for number, line in enumerate(lines) if "a new run" in line]
    ended = [number for number, line in enumerate(lines) if ": done: " in line]
    assert len(began) == len(ended) == 2 and max(began) < min(ended), done.stdout
