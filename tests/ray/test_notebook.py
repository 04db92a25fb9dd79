"""The Python API in a real kernel: docs/notebooks/first_run.ipynb as a reader runs it. For the nightly campaign."""

import json
from pathlib import Path

import nibabel as nib
import pytest

from raytrain_brats import api
from tests.support import ROOT

NOTEBOOK = ROOT / "docs/notebooks/first_run.ipynb"


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
