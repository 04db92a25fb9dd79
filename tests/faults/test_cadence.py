"""Ranks that save and validate by rank 0's clock: the same updates, each validation once, at any number of ranks.

The ranks run in a process of their own: they are forked there, which is unsafe beside the threads of other tests.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.support import ROOT

CODE = """
import dataclasses, json, sys, time
from pathlib import Path
from raytrain_brats import books
from raytrain_brats.run import control
from raytrain_brats import storage
from raytrain_brats.config import Checkpoint, Validate
from raytrain_brats.run import checkpoint, journal
from scripts.chaos_campaign.groups import Group, begin
from scripts.chaos_campaign.setting import Setting, faults_at_end

setting = Setting(Path(sys.argv[1]))
calm, run = setting.end(1), setting.spec("run", 1)
changes = {"checkpoint": Checkpoint(every_s=0.05), "validate_": Validate()}
held_out = run.manifest.split(run.config.data.fold)[1]
run = dataclasses.replace(run, config=run.config.model_copy(update=changes), held_out_cases=held_out)
Path(run.run_dir).mkdir()

def other_ranks_see_no_files():  # what rank 0 sees is what counts
    real = storage.list_files
    from torch import distributed
    storage.list_files = lambda uri: {} if distributed.is_initialized() and distributed.get_rank() else real(uri)

for world_size, until in ((3, run.sampler.total // 2), (2, run.sampler.total)):
    assert begin(run, lambda: None)
    group = Group(run, control.current(run.run_dir), world_size, other_ranks_see_no_files)
    if until == run.sampler.total:
        assert group.finish()
    while not group.over() and (checkpoint.committed(run.run_dir) or [(0, 0)])[-1][1] < until:
        time.sleep(0.002)
    group.kill()
tables = [int(Path(name).stem) for name in storage.list_files(run.run_dir + "/validation")]
print(json.dumps({
    "faults": faults_at_end(run, calm), "tables": tables, "events": books.read_events(run.run_dir),
    "epoch": run.sampler.epoch_samples, "total": run.sampler.total, "batch": run.sampler.global_batch,
}))
"""


def test_three_ranks_then_two_by_the_clock(tmp_path: Path) -> None:
    """Killed halfway: bit-equal to one undisturbed rank that saves by samples; every epoch is scored or left out."""
    done = subprocess.run(
        [sys.executable, "-c", CODE, str(tmp_path)],
        env=os.environ | {"PYTHONPATH": str(ROOT)}, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["faults"] == []
    events = found["events"]
    saved = [e for e in events if e["event"] == "checkpoint"]
    assert {e["reason"] for e in saved} <= {"every 0.05 s", "a validation", "the end"} and len(saved) > 3
    scored = [e["samples_seen"] for e in events if e["event"] == "validation"]
    left_out = {e["samples_seen"] for e in events if e["event"] == "validation_left_out"}
    assert sorted(set(scored)) == found["tables"] and found["total"] in scored
    assert len(scored) <= len(set(scored)) + 1, "only one that the kill cut off is scored again"
    batch, epoch = found["batch"], found["epoch"]
    ends = {-(-end // batch) * batch for end in range(epoch, found["total"] - epoch, epoch)}  # the last is the end's
    assert ends <= set(scored) | left_out
    assert {e["reason"] for e in events if e["event"] == "validation"} <= {"an epoch", "the end"}
