"""Find a rank that hangs, by the ranks' heartbeats. Runs in the driver.

In: what each rank's heartbeat reports.
Out: a `hang` event that names the rank, every rank's stack in `stacks/`, and the rank killed, so that the group starts
again from the newest checkpoint. Without this a hung rank holds all others in their collective for half an hour.
"""

import json
import os
import signal
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raytrain_brats import storage
from raytrain_brats.ray_ext.internals import core
from raytrain_brats.run import journal
from raytrain_brats.run.heartbeat import PREFIX
from raytrain_brats.run.phase_timer import PHASES
from raytrain_brats.run.run_dir import RunDir

PATIENCE_S = {"start": 300.0, "load": 300.0, "data": 300.0, "save": 120.0, "validate": 900.0}
"""How long a rank may stay in a phase that is no computation; data come from elsewhere, which has its own retries."""
FIRST_STEP_S = 300.0
GONE = "the process is gone"
SLOWER = 5.0
"""A computing phase may last this many times as long as the longest so far."""


@dataclass(frozen=True)
class RankStatus:
    """A rank as the driver knows it; times are the driver's own monotonic clock, so hosts' clocks do not matter."""

    about: dict[str, Any]
    beaten_s: float
    moved_s: float

    @property
    def rank(self) -> int:
        return int(self.about["rank"])

    @property
    def place(self) -> tuple[int, int]:
        """How far it is: a rank that is behind keeps the others waiting."""
        return self.about["samples_seen"], PHASES.index(self.about["phase"])


def news(life: RankStatus | None, about: dict[str, Any], now_s: float) -> RankStatus:
    """`life` after another look at its rank."""
    if life is None or life.about["pid"] != about["pid"] or life.about["generation"] != about["generation"]:
        return RankStatus(about, now_s, now_s)
    beaten_s = now_s if about["beats"] != life.about["beats"] else life.beaten_s
    moved_s = now_s if about["entries"] != life.about["entries"] else life.moved_s
    return replace(life, about=about, beaten_s=beaten_s, moved_s=moved_s)


def find_hung(lives: Sequence[RankStatus], now_s: float, timeout_s: float, longest_s: float) -> list[RankStatus]:
    """The ranks that keep the group from going on; empty while it is healthy.

    A rank is silent when not even its beating thread runs (stopped, swapped out, stuck with the interpreter's lock).
    Else the rank that is behind all others is it, once it has been in its phase for too long. Ranks that wait for it
    are ahead of it.
    """
    if silent := [life for life in lives if now_s - life.beaten_s > timeout_s and life.about["phase"] != "end"]:
        return silent
    if not lives or len(lives) < lives[0].about["world_size"]:
        return []
    behind = min(life.place for life in lives)
    last = [life for life in lives if life.place == behind]
    phase = PHASES[behind[1]]
    if phase == "end":
        return []
    first_step = any(life.about["updates"] == 0 for life in lives)
    limit_s = PATIENCE_S.get(phase, FIRST_STEP_S if first_step else max(timeout_s, SLOWER * longest_s))
    return last if all(now_s - life.moved_s > limit_s for life in last) else []


class HangDetector:
    """Looks once a second, in a thread of the driver, for the time of a `with` block."""

    def __init__(self, run_dir: str, run_id: str, timeout_s: float) -> None:
        self._run_dir, self._run_id, self._timeout_s = run_dir, run_id, timeout_s
        self._lives: dict[int, RankStatus] = {}
        self._generation, self._judged, self._longest_s = 0, 0, 0.0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="watch", daemon=True)

    def __enter__(self) -> "HangDetector":
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._done.set()
        self._thread.join(timeout=5)

    def _follow(self) -> None:
        while not self._done.wait(1.0):
            try:
                self._look(time.monotonic())
            except Exception as error:  # noqa: BLE001 - whatever it was, it must look again
                print(f"watchdog: cannot look just now: {error}", flush=True)

    def _look(self, now_s: float) -> None:
        if not core.kv_ready():  # Ray is being left
            return
        told = [json.loads(core.kv_get(key) or b"null") for key in core.kv_list(f"{PREFIX}{self._run_id}/")]
        told = [about for about in told if about]
        newest = max((about["generation"] for about in told), default=0)
        if newest <= self._judged:  # a group that was found hanging is on its way out
            return
        if newest > self._generation:
            self._generation, self._longest_s, self._lives = newest, 0.0, {}
        for about in told:
            if about["generation"] != newest:
                continue
            before = self._lives.get(about["rank"])
            life = self._lives[about["rank"]] = news(before, about, now_s)
            if before and before.about["phase"] not in PATIENCE_S and life.moved_s > before.moved_s:
                self._longest_s = max(self._longest_s, life.moved_s - before.moved_s)
        culprits = find_hung(list(self._lives.values()), now_s, self._timeout_s, self._longest_s)
        if culprits and self._end(culprits, now_s):
            self._judged = newest

    def _end(self, culprits: Sequence[RankStatus], now_s: float) -> bool:
        """Stacks of all ranks, the culprits last; those are killed: Ray Train then starts the group again.

        False when it is not known of each culprit that it is gone: then look again.
        """
        guilty = {life.rank for life in culprits}
        asked, sure = {}, True
        for life in sorted(self._lives.values(), key=lambda life: life.rank in guilty):
            at = NodeAffinitySchedulingStrategy(life.about["node"], soft=False)
            task: Any = _stacks.options(scheduling_strategy=at)
            asked[life.rank] = task.remote(life.about["pid"], life.about["stacks"], life.rank in guilty)
        ray.wait(list(asked.values()), num_returns=len(asked), timeout=15)
        for rank, reference in asked.items():
            try:
                text = ray.get(reference, timeout=0.1)
            except (ray.exceptions.RayError, TimeoutError) as error:
                text = f"no stack: {' '.join(str(error).split())[:200]}"
                sure = sure and rank not in guilty
            about = self._lives[rank].about
            if text == GONE:  # Ray ended it, or will find out: a rank that was killed does not hang
                continue
            file = RunDir(self._run_dir).stacks(about["generation"], rank)
            storage.write_bytes(file, text.encode())
            if rank in guilty:
                facts = {key: about[key] for key in ("generation", "rank", "phase", "samples_seen", "pid", "node")}
                life = self._lives[rank]
                silent = now_s - life.beaten_s > self._timeout_s
                seconds = round(now_s - (life.beaten_s if silent else life.moved_s), 1)
                journal.event(self._run_dir, "hang", **facts, silent=silent, for_s=seconds, stacks=file)
        return sure


@ray.remote(num_cpus=0, max_retries=0)
def _stacks(pid: int, file: str, kill: bool) -> str:
    """The stacks of a process of this machine, also of one that was stopped; then its end, if wanted."""
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
