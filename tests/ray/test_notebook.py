"""The Python API as notebooks use it: docs/notebooks/first_run.ipynb in a real kernel, an interrupt. For the nightly
campaign."""

import json
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import pytest

from raytrain_brats import api
from raytrain_brats.synthetic.phantom import write_set
from tests.support import ROOT
from tests.support.commands import environment

NOTEBOOK = ROOT / "docs/notebooks/first_run.ipynb"
INTERRUPTED = """
import os, signal, threading, time
from raytrain_brats.api import UserError, load_run, train

def interrupt():
    while True:
        time.sleep(0.2)
        try:
            if load_run("run").samples_seen >= 16:
                break
        except UserError:
            pass
    os.kill(os.getpid(), signal.SIGINT)

threading.Thread(target=interrupt, daemon=True).start()
settings = {"train.epochs": 20, "checkpoint.every_s": 600, "validate.every_samples": 10000, "run.cpus_per_task": 0.5}
def go(settings):
    return train(data="data", run_dir="run", recipe="demo", workers=1, set=settings)
try:
    go(settings)
except KeyboardInterrupt:
    seen = load_run("run").samples_seen
    print("interrupted", seen < 320, not load_run("run").finished)
run = go(settings)
print("finished", run.finished, run.samples_seen, [e["samples_seen"] for e in run.events if e["event"] == "group"])
"""


@pytest.mark.campaign
def test_the_first_notebook_runs(tmp_path: Path) -> None:
    """Every cell ends well; what it leaves is a finished run, scores and masks, and its last cell a one-line error."""
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbclient.NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(tmp_path)}}).execute()

    run = api.load_run(tmp_path / "first_run/run")
    assert run.finished and run.best and run.evaluation and len(run.evaluation.rows) >= 1
    masks = sorted((tmp_path / "first_run/predictions").glob("*.nii.gz"))
    assert len(masks) == 2 and all(nib.load(mask).ndim == 3 for mask in masks)
    record = json.loads((tmp_path / "first_run/predictions/made-by.json").read_text())
    (maker,) = record["makers"].values()
    assert maker["members"][0]["seed"] == 0 and maker["members"][0]["data"] == run.dataset_identity
    last = "".join(output.get("text", "") for output in notebook.cells[-1].outputs)
    assert "train.epoch is not known" in last and last.count("\n") == 1


@pytest.mark.campaign
def test_an_interrupt_saves_and_the_same_call_goes_on(place: Path) -> None:
    """KeyboardInterrupt reaches the caller, after a checkpoint; the next call starts another Ray and goes on there."""
    write_set(str(place / "data"), 5, 0, 40, "procedural")
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED], cwd=place, env=environment(RAY_TMPDIR=str(place)), capture_output=True,
        text=True, timeout=600, check=False,
    )  # fmt: skip
    told = done.stdout.splitlines()
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "saving a checkpoint ..." in told and "interrupted True True" in told
    finished, *groups = told[-1].removeprefix("finished ").replace("[", "").replace("]", "").replace(",", "").split()
    seen, first, second = map(int, groups)
    assert finished == "True" and first == 0 and 16 <= second < seen
