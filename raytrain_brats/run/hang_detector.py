"""Find a rank that hangs, by the ranks' heartbeats. Runs in the driver.

In: the heartbeats of all ranks.
Out: a `hang` event that names the rank, every rank's stack in `stacks/`, and the rank killed, so that the group starts
again from the newest checkpoint. Without this all others wait for a hung rank in their collective for half an hour.
"""

import contextlib
import json
import logging
import math
import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raytrain_brats import storage
from raytrain_brats.errors import UserError
from raytrain_brats.ray_ext.internals import core
from raytrain_brats.run import journal
from raytrain_brats.run.heartbeat import PREFIX
from raytrain_brats.run.phase_timer import PHASES
from raytrain_brats.run.repeated import Repeated
from raytrain_brats.run.run_dir import RunDir

_logger = logging.getLogger(__name__)
PATIENCE_S = {"start": 300.0, "load": 300.0, "ready": 300.0, "data": 300.0, "save": 420.0}
PATIENCE_S |= dict.fromkeys(("validate", "gather", "close"), 900.0)
"""Longest stay of a rank in a phase without computation: longer than storage that is away is waited for in it (S3 three
minutes a request, the last checkpoint of a run five)."""
FIRST_STEP_S = 300.0
GONE = "the process is gone"
SLOWER = 5.0
"""A computing phase may last this many times as long as the longest one so far."""


@dataclass(frozen=True)
class RankStatus:
    """A rank as the driver sees it; times are of the driver's monotonic clock, never of another host's."""

    report: dict[str, Any]
    """Its newest heartbeat."""
    beat_s: float
    """When a new heartbeat was last seen."""
    moved_s: float
    """When it was last seen to have entered another phase."""

    @property
    def rank(self) -> int:
        return int(self.report["rank"])

    @property
    def progress(self) -> tuple[int, int, float]:
        """(samples seen, number of the phase, step that its GPU is at): the others wait for the rank whose progress is
        least. Where all hosts wait in `reduce`, it is the one whose GPU has its own work still to do."""
        device_at = self.report.get("device_at")
        at = math.inf if device_at is None else device_at
        return self.report["samples_seen"], PHASES.index(self.report["phase"]), at


def updated(status: RankStatus | None, report: dict[str, Any], now_s: float) -> RankStatus:
    """A rank's status after its heartbeat was read again."""
    if status is None or any(status.report[key] != report[key] for key in ("pid", "generation")):
        return RankStatus(report, now_s, now_s)
    beat_s = now_s if report["beats"] != status.report["beats"] else status.beat_s
    moved_s = now_s if report["entries"] != status.report["entries"] else status.moved_s
    return RankStatus(report, beat_s, moved_s)


def find_hung(ranks: Sequence[RankStatus], now_s: float, timeout_s: float, longest_s: float) -> list[RankStatus]:
    """The ranks that block the group; empty while it is healthy.

    First the silent ones, in which not even the heartbeat's thread runs (stopped, swapped out, or the interpreter's
    lock is held). Else the ranks with the least progress, once they have been in their phase for too long: ranks that
    wait for them are ahead of them.
    """
    if silent := [rank for rank in ranks if now_s - rank.beat_s > timeout_s and rank.report["phase"] != "end"]:
        return silent
    if not ranks or len(ranks) < ranks[0].report["world_size"]:
        return []
    least = min(rank.progress for rank in ranks)
    last = [rank for rank in ranks if rank.progress == least]
    phase = PHASES[least[1]]
    if phase == "end":
        return []
    first_step = any(rank.report["updates"] == 0 for rank in ranks)
    limit_s = PATIENCE_S.get(phase, FIRST_STEP_S if first_step else max(timeout_s, SLOWER * longest_s))
    return last if all(now_s - rank.moved_s > limit_s for rank in last) else []


class HangDetector(Repeated):
    """Checks once a second, in a thread, for the time of a `with` block."""

    def __init__(self, run_dir: str, run_id: str, timeout_s: float) -> None:
        super().__init__("hang detector", self._check, 1.0)
        self._run_dir, self._run_id, self._timeout_s = run_dir, run_id, timeout_s
        self._ranks: dict[int, RankStatus] = {}
        self._generation, self._ended, self._longest_s = 0, 0, 0.0

    def _check(self) -> None:
        if not core.kv_ready():  # Ray shuts down
            return
        now_s = time.monotonic()
        read = [json.loads(core.kv_get(key) or b"null") for key in core.kv_list(f"{PREFIX}{self._run_id}/")]
        reports = [report for report in read if report]
        newest = max((report["generation"] for report in reports), default=0)
        if newest <= self._ended:  # this group's hung ranks are killed already
            return
        if newest > self._generation:
            self._generation, self._longest_s, self._ranks = newest, 0.0, {}
        for report in (report for report in reports if report["generation"] == newest):
            before = self._ranks.get(report["rank"])
            status = self._ranks[report["rank"]] = updated(before, report, now_s)
            if before and before.report["phase"] not in PATIENCE_S and status.moved_s > before.moved_s:
                self._longest_s = max(self._longest_s, status.moved_s - before.moved_s)
        hung = find_hung(list(self._ranks.values()), now_s, self._timeout_s, self._longest_s)
        if hung and self._end(hung, now_s):
            self._ended = newest

    def _end(self, hung: Sequence[RankStatus], now_s: float) -> bool:
        """Write the stacks of all ranks, the hung ones last; kill those: Ray Train then restarts the group.

        False when the death of a hung rank is not certain: then the next check does it again.
        """
        to_kill = {rank.rank for rank in hung}
        tasks, sure = {}, True
        for status in sorted(self._ranks.values(), key=lambda status: status.rank in to_kill):
            at = NodeAffinitySchedulingStrategy(status.report["node"], soft=False)
            task: Any = _stacks.options(scheduling_strategy=at)
            tasks[status.rank] = task.remote(status.report["pid"], status.report["stacks"], status.rank in to_kill)
        ray.wait(list(tasks.values()), num_returns=len(tasks), timeout=15)
        for rank, reference in tasks.items():
            try:
                text = ray.get(reference, timeout=0.1)
            except (ray.exceptions.RayError, TimeoutError) as error:
                text = f"no stack: {' '.join(str(error).split())[:200]}"
                sure = sure and rank not in to_kill
            status, report = self._ranks[rank], self._ranks[rank].report
            if text == GONE:  # it was killed, which Ray notices by itself: that is no hang
                continue
            file = RunDir(self._run_dir).stacks(report["generation"], rank)
            with contextlib.suppress(OSError, UserError):  # a full disk, storage that is away: it is told all the same
                storage.write_bytes(file, text.encode())
            if rank in to_kill:
                facts = {key: report[key] for key in ("generation", "rank", "phase", "samples_seen", "pid", "node")}
                silent = now_s - status.beat_s > self._timeout_s
                seconds = round(now_s - (status.beat_s if silent else status.moved_s), 1)
                journal.event(self._run_dir, "hang", **facts, silent=silent, for_s=seconds, stacks=file)
        return sure


@ray.remote(num_cpus=0, max_retries=0)
def _stacks(pid: int, file: str, kill: bool) -> str:
    """The stacks of a process of this machine, also of a stopped one; then kill it, if wanted."""
    cmdline = Path(f"/proc/{pid}/cmdline")
    if not cmdline.exists() or not cmdline.read_bytes().startswith(b"ray::"):
        return GONE
    text = ""
    try:
        os.kill(pid, signal.SIGUSR2)
        os.kill(pid, signal.SIGCONT)
        deadline = time.monotonic() + 2
        while time.monotonic() < deadline:
            time.sleep(0.1)
            if (now := Path(file).read_text()) and now == text:
                break
            text = now
    except OSError as error:
        text = text or f"no stack: {error}"
    finally:
        if kill:
            os.kill(pid, signal.SIGKILL)
    return text or "it did not answer"
