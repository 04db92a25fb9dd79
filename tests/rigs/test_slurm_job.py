"""cluster/slurm/train.sh with a real Ray and a real run: two nodes that stand-ins of Slurm make of this machine.

Three to five minutes. A turn that is warned saves and is queued again; the next one goes on to the end, on both nodes.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from raytrain_brats import books, verify
from raytrain_brats.synthetic.phantom import write_set
from tests.support import ROOT

pytestmark = pytest.mark.campaign
SCRIPT = ROOT / "cluster" / "slurm" / "train.sh"


def test_a_run_over_two_turns_and_two_nodes(tmp_path: Path) -> None:
    """Each turn brings up Ray on both nodes; the first saves on SIGTERM and asks for another, which ends the run; every
    sample was applied once."""
    write_set(str(tmp_path / "data"), cases=6, seed=3, grid=32, anatomy="procedural")
    recipe = yaml.safe_load((ROOT / "raytrain_brats/recipes/demo.yaml").read_text())
    recipe["preprocess"]["spacing_mm"], recipe["data"]["patch_xyz"] = 7.5, [16, 16, 16]
    recipe["train"]["epochs"], recipe["run"] = 60, {"workers": "2", "cpus_per_task": 0.5, "cpus_per_worker": 1}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(recipe))
    run = tmp_path / "run"
    environment = os.environ | {
        "PATH": f"{ROOT / 'tests/support/slurm'}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT), "HOME": str(tmp_path), "RAY_HEAD_IP": "127.0.0.1", "CPUS": "2", "MEMORY_MB": "1200",
        "SLURM_LOG": str(tmp_path / "asked"), "SLURM_JOB_ID": str(os.getpid()), "RAYTRAIN_BRATS_RUN_DIR": str(run),
        "RAYTRAIN_BRATS_DATA": str(tmp_path / "data"), "RAYTRAIN_BRATS_RECIPE": str(tmp_path / "tiny.yaml"),
    }  # fmt: skip
    environment.pop("RAY_ADDRESS", None)

    def turn() -> subprocess.Popen[bytes]:
        with (tmp_path / "job.log").open("ab") as log:
            return subprocess.Popen(["sbatch", SCRIPT], env=environment, cwd=tmp_path, stdout=log, stderr=log)

    job, until, steps = turn(), time.monotonic() + 180, 0
    while steps < 8 and time.monotonic() < until and job.poll() is None:
        steps = len(books.read_rows(str(run))) if (run / "metrics").exists() else 0
        time.sleep(0.5)
    trained = steps >= 8
    job.send_signal(signal.SIGTERM)
    assert job.wait(timeout=120) == 130, (tmp_path / "job.log").read_text()[-3000:]
    assert f"scontrol requeue {os.getpid()}" in (tmp_path / "asked").read_text()
    first = (tmp_path / "job.log").read_text()
    assert trained, f"no 8 steps within three minutes, so there was nothing to save\n{first[-3000:]}"
    assert first.index("saved: the same command goes on") < first.index("\ninterrupted\n") < first.index("queued again")
    saved = books.read_rows(str(run))[-1]["samples_seen"]
    assert turn().wait(timeout=300) == 0, (tmp_path / "job.log").read_text()[-3000:]
    starts = [event for event in books.read_events(str(run)) if event["event"] == "group"]
    assert starts[-1]["samples_seen"] == saved > 0
    assert verify.main(["--run-dir", str(run)]) == 0
    log = (tmp_path / "job.log").read_text()
    assert "2 CPU workers" in log
