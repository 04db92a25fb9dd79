"""One's own network, loss and augmentation through a whole run, by the API, on a Ray that the program has started
itself. For the nightly campaign."""

import subprocess
import sys
from pathlib import Path

import pytest

from raytrain_brats import api
from raytrain_brats.run import spec
from raytrain_brats.synthetic.phantom import write_set
from tests.support import ROOT
from tests.support.commands import environment

PROGRAM = """
import signal
import ray
from raytrain_brats.api import UserError, evaluate, predict, train

ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
handler = signal.getsignal(signal.SIGTERM)
settings = {
    "network": {"name": "my_parts:Small", "width": 8}, "train.loss": {"name": "my_parts:focal", "gamma": 1.0},
    "train.augment.own": "my_parts:drop_modality", "train.epochs": 1, "checkpoint.every_samples": 4,
    "train.reduction": "exact", "run.cpus_per_task": 0.5,
}
def go():
    return train(data="data", run_dir="run", recipe="demo", workers=2, set=settings)
run = go()
assert run.finished and run.rows[-1]["world_size"] == 2, run.rows[-1]
assert signal.getsignal(signal.SIGTERM) is handler
scores = evaluate(data="data", run_dir="run", mirror=False, overlays=0)
print("cases", len(scores.rows))
print("masks", *predict("data", run_dir="run", out="out", mirror=False))
try:
    train(data="data", run_dir="run", recipe="demo", workers=2, set=settings | {"train.loss": "my_parts:focal"})
except UserError as error:
    print("error:", error)
"""


@pytest.mark.campaign
def test_own_parts_train_evaluate_predict_and_are_missed_in_one_line(place: Path) -> None:
    """Two ranks import them from the driver's folder; config.yaml names file and checksum; elsewhere `predict` and
    `export` say what is missing, and a changed file is told."""
    write_set(str(place / "data"), 4, 0, 40, "procedural")
    parts = place / "my_parts.py"
    parts.write_text((ROOT / "docs/examples/my_parts.py").read_text())
    done = _run(place, "-c", PROGRAM)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "my_parts:Small: " in done.stdout and "my_parts:drop_modality: augmentation" in done.stdout
    (error,) = [line for line in done.stdout.splitlines() if line.startswith("error:")]
    assert "train.loss.gamma: 1.0 -> None" in error

    run = api.load_run(place / "run")
    launch = next(e for e in run.events if e["event"] == "launch")
    assert launch["seed"] == 0 and launch["versions"]["ray"]
    assert all(e["machine"]["cpus"] for e in run.events if e["event"] == "worker")
    kept = spec.open_run(run.path).own_parts
    assert Path(kept["my_parts:Small"]["file"]) == parts and len(kept) == 3

    export = ("-m", "raytrain_brats", "export", "--run-dir", "run", "--formats", "onnx", "--out", "exported")
    parts.write_text(parts.read_text() + "\n# changed\n")
    done = _run(place, *export)
    assert done.returncode == 0 and "my_parts.py (my_parts:Small) was changed since" in done.stderr, done.stderr
    parts.rename(place / "elsewhere.py")
    done = _run(place, *export)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "there is no module my_parts in" in done.stderr


def _run(place: Path, *words: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, *words], cwd=place, env=environment(RAY_TMPDIR=str(place)), capture_output=True, text=True,
        timeout=600, check=False,
    )  # fmt: skip
