"""A rank that hangs in a real Ray is found, named, its stack kept, and ended."""

import subprocess
import sys
from pathlib import Path

from raytrain_brats import books

HANGING = """
import sys, time
import ray
from raytrain_brats.run.heartbeat import heartbeat
from raytrain_brats.run.phase_timer import PhaseTimer
from raytrain_brats.run.hang_detector import HangDetector
from raytrain_brats.run.rank import Rank

@ray.remote(num_cpus=0)
class Worker:
    def work(self, rank):
        timer = PhaseTimer()
        with heartbeat(timer, "run", 1, Rank(rank, 2, None)):
            for seen in range(0, 40, 4):
                for phase in ("data", "forward", "backward", "reduce", "update"):
                    timer.enter(phase, seen)
                    time.sleep(0.02)
            timer.enter("data", seen + 4)
            timer.enter("forward")
            self.stuck_here() if rank == 1 else timer.enter("reduce")
            time.sleep(300)

    def stuck_here(self):
        time.sleep(300)

ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
with HangDetector(sys.argv[1], "run", 6.0):
    ranks = [Worker.remote() for _ in range(2)]
    began = time.time()
    try:
        ray.get([actor.work.remote(rank) for rank, actor in enumerate(ranks)], timeout=300)
    except ray.exceptions.RayActorError:
        print("ended", time.time() - began)
        time.sleep(3)
"""


def test_a_stuck_rank_is_ended_and_its_stack_kept(tmp_path: Path) -> None:
    """Real processes: one is stuck in a function, the other waits for it. Named, dumped, killed; the other lives."""
    done = subprocess.run(
        [sys.executable, "-c", HANGING, str(tmp_path)], capture_output=True, text=True, timeout=400, check=False
    )
    assert "ended" in done.stdout, done.stdout + done.stderr
    (event,) = books.read_events(str(tmp_path))
    assert (event["event"], event["rank"], event["phase"], event["silent"]) == ("hang", 1, "forward", False)
    assert "stuck_here" in Path(event["stacks"]).read_text()
    assert "stuck_here" not in (tmp_path / "stacks" / "g0001-rank0.txt").read_text()
