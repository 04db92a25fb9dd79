"""SIGKILL workers and the controller, over and over, and look at what is left after each kill and each run.

In: a folder, a seed, how many kills.
Out: kills by phase, steps done again, everything that was not as promised.

One kill is one moment: one rank is struck, or all. It counts for the phase its (first) victim died in, as the
victim's memory says after its death: that of its training thread, and that of its writer thread if that was writing.
"""

import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from raytrain_brats import books
from raytrain_brats.errors import RunFailed
from raytrain_brats.run import checkpoint, control
from raytrain_brats.run.spec import RunSpec
from scripts.chaos_campaign.board import MAIN, WRITER, WRITING, Board
from scripts.chaos_campaign.groups import POLL_S, Group, Process, Twist, begin
from scripts.chaos_campaign.setting import Setting, faults_at_end

COVERED = {
    "load": "load", "data": "fetch", "forward": "forward", "reduce": "reduce",
    "checkpoint write": "checkpoint write", "commit": "commit",
}  # fmt: skip
"""Phases that need their share of the kills, and what the report calls them."""
SHARE, ENOUGH = 0.05, 200
"""Of fewer kills the shares say nothing."""
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Fault:
    """What is done to a group: when, to whom, and what becomes of the others."""

    target: str
    """Phase to wait for; '' for a moment after training began, whatever is done then."""
    visit: int
    delay_s: float
    rank: int
    everyone: bool
    rest: str
    """`end`: the others are killed too, as Ray does; `linger`: only once the next group trains; `pause`: rank 0 is
    stopped instead of killed, goes on beside the next group, and is killed then: a zombie, not counted as a kill."""


def draw(rng: random.Random, world_size: int) -> Fault:
    targets = ("load", "data", "forward", "reduce", "checkpoint write", "commit", "")
    target = rng.choices(targets, (10, 11, 10, 9, 16, 20, 24))[0]
    rest = rng.choices(("end", "linger", "pause"), (78, 12, 10))[0]
    late = rng.random() < 0.5 or not target
    return Fault(
        target,
        visit=1 if target == "load" else rng.randint(1, 2 if target in WRITING else 6),
        delay_s=rng.uniform(0, 0.003 if target else 0.6) if late else 0.0,
        rank=0 if target in WRITING or rest == "pause" else rng.randrange(world_size),
        everyone=rng.random() < 0.3,
        rest=rest,
    )


@dataclass
class Figures:
    kills: int = 0
    processes: int = 0
    pauses: int = 0
    lingered: int = 0
    runs: int = 0
    groups: int = 0
    controller_kills: int = 0
    main: Counter[str] = field(default_factory=Counter)
    writer: Counter[str] = field(default_factory=Counter)
    worlds: Counter[int] = field(default_factory=Counter)
    redone: list[int] = field(default_factory=list)
    violations: list[str] = field(default_factory=list)

    def share(self, phase: str) -> float:
        return (self.main[phase] + self.writer[phase]) / max(1, self.kills)

    def shortfalls(self) -> list[str]:
        """Why the campaign proved nothing, if so."""
        low = [phase for phase in COVERED if self.kills >= ENOUGH and self.share(phase) < SHARE]
        short = [f"{COVERED[p]}: {self.share(p):.1%} of the kills, {SHARE:.0%} wanted" for p in low]
        return short + ([] if sum(self.redone) else ["no step was ever done again: the kills hit nothing"])


class Campaign:
    """Runs, one after the other, until enough kills were done (or, for a control, until a violation)."""

    def __init__(
        self,
        setting: Setting,
        seed: int,
        progress: Progress = lambda *_: None,
        twist: Twist = lambda: None,
        faults: Callable[[random.Random, int], Fault] = draw,
        controller_share: float = 0.08,
        stop_early: bool = False,
        minutes: float = 1e9,
    ) -> None:
        self.setting, self.seed, self.progress, self.twist, self.faults = setting, seed, progress, twist, faults
        self.controller_share, self.stop_early = controller_share, stop_early
        self.rng, self.figures, self._until = random.Random(seed), Figures(), time.monotonic() + 60 * minutes
        self._zombies: list[tuple[Process, float]] = []

    def run(self, kills: int) -> Figures:
        self._wanted, figures = kills, self.figures
        while figures.kills + (figures.pauses if self.stop_early else 0) < self._wanted and not self._stop():
            number = figures.runs
            seed = self.seed * 1000 + number
            run_spec = self.setting.spec(f"run-{seed}-{number}", seed)
            os.makedirs(run_spec.run_dir, exist_ok=True)
            found = len(figures.violations)
            try:
                self._one_run(run_spec)
            except (RunFailed, RuntimeError, ValueError, KeyError) as error:
                self._violation(run_spec, f"{type(error).__name__}: {error}")
            finally:
                self._end_zombies()
            figures.runs += 1
            if not self._stop() and len(figures.violations) == found:
                for why in faults_at_end(run_spec, self.setting.end(seed)):
                    self._violation(run_spec, why)
        return figures

    def _stop(self) -> bool:
        return self.stop_early and bool(self.figures.violations)

    def _violation(self, run_spec: RunSpec, why: str) -> None:
        self.figures.violations.append(f"{run_spec.run_dir}, kill {self.figures.kills}: {why}")

    def _one_run(self, run_spec: RunSpec) -> None:
        """From begin to the last position, in as many groups as it takes."""
        rows, seen, attempts = 0, 0, 0
        while not self._stop():
            attempts += 1
            if attempts > 400:
                raise RuntimeError("no end after 400 groups")
            if not self._begin(run_spec):
                self._look(run_spec)
                continue
            generation = control.current(run_spec.run_dir)
            assert generation is not None
            applied = generation.samples_seen // run_spec.sampler.global_batch
            if generation.samples_seen < seen:
                self._violation(run_spec, f"went back from {seen} to {generation.samples_seen}")
            elif len(books.read_rows(run_spec.run_dir)) != applied:
                self._violation(
                    run_spec, f"{len(books.read_rows(run_spec.run_dir))} rows at the start, {applied} applied"
                )
            seen = generation.samples_seen
            self.figures.redone.append(max(0, rows - applied))
            world_size = self.rng.randint(1, 4)
            self.figures.worlds[world_size] += 1
            group = Group(run_spec, generation, world_size, self.twist)
            self.figures.groups += 1
            finished = self._disturb(run_spec, group)
            if not finished:
                self._look(run_spec)
            rows = len(books.read_rows(run_spec.run_dir))
            if finished:
                return

    def _begin(self, run_spec: RunSpec) -> bool:
        if self.figures.kills >= self._wanted or self.rng.random() >= self.controller_share:
            return begin(run_spec, self.twist)
        delay = self.rng.uniform(0, 0.03)

        def strike(process: Process, board: Board) -> bool:
            while board.get(0, MAIN) == "" and not process.over():
                time.sleep(POLL_S)
            time.sleep(delay)
            process.kill()
            return process.code == -signal.SIGKILL and self._count(board, 0, 1, True)

        return begin(run_spec, self.twist, strike)

    def _count(self, board: Board, rank: int, processes: int, controller: bool = False) -> bool:
        figures = self.figures
        figures.kills += 1
        figures.processes += processes
        figures.controller_kills += controller
        figures.main[board.get(rank, MAIN)] += 1
        if writing := board.get(rank, WRITER):
            figures.writer[writing] += 1
        self.progress(figures.kills, self._wanted, f"{len(figures.violations)} violations")
        return True

    def _disturb(self, run_spec: RunSpec, group: Group) -> bool:
        """Strike the group; True when it came to the end of the run before that."""
        if time.monotonic() > self._until:
            self._wanted = self.figures.kills  # out of time: this run to its end, then no more
        fault = self.faults(self.rng, group.world_size)
        if self.figures.kills < self._wanted:
            self._wait_for(group, fault)
        elif self._zombies:
            time.sleep(0.3)
        if group.over() or self.figures.kills >= self._wanted:
            self._end_zombies()
            if not group.finish():
                self._violation(run_spec, f"a group that was not struck failed; see {run_spec.run_dir}/processes.log")
                return False
            return True
        self._end_zombies()  # of the group before: this one has trained beside them
        self._strike(group, fault)
        return False

    def _wait_for(self, group: Group, fault: Fault) -> None:
        """Until the fault's moment, or until a rank is gone; zombies wake up meanwhile."""
        board, lane = group.board, WRITER if fault.target in WRITING else MAIN
        until, woken = time.monotonic() + 20, 0.0
        while not group.over() and time.monotonic() < until:
            now = time.monotonic()
            if not woken and board.visits(0, "start"):
                woken = now
                for zombie, _ in self._zombies:
                    zombie.send(signal.SIGCONT)
            if fault.target:
                here = board.visits(fault.rank, fault.target) >= fault.visit
                if here and board.get(fault.rank, lane) == fault.target:
                    break
            elif board.visits(fault.rank, "load"):
                break
            time.sleep(POLL_S)
        if fault.delay_s:
            time.sleep(fault.delay_s)
        rest = max([end for _, end in self._zombies], default=0.0) - time.monotonic()
        if rest > 0 and not group.over():
            time.sleep(rest)

    def _strike(self, group: Group, fault: Fault) -> None:
        victim = group.processes[fault.rank]
        if fault.rest == "pause":
            victim.send(signal.SIGSTOP)
            others = [process for process in group.processes if process is not victim]
            for process in others:
                process.kill()
            self.figures.pauses += 1
            self._zombies.append((victim, time.monotonic() + 0.3))
            return
        everyone = fault.everyone or group.world_size == 1
        for process in group.processes if everyone else [victim]:
            process.send(signal.SIGKILL)
        if victim.wait() == -signal.SIGKILL:
            self._count(group.board, fault.rank, group.world_size if everyone else 1)
        if fault.rest == "linger" and not everyone:
            self.figures.lingered += 1
            self._zombies += [(p, time.monotonic() + 0.2) for p in group.processes if p is not victim]
            return
        time.sleep(self.rng.uniform(0, 0.02))
        group.kill()

    def _end_zombies(self) -> None:
        for process, _ in self._zombies:
            process.kill()
        self._zombies.clear()

    def _look(self, run_spec: RunSpec) -> None:
        """After each kill: what was committed once is there, whole."""
        found, damaged = checkpoint.newest_valid(run_spec.run_dir)
        for name, why in damaged:
            self._violation(run_spec, f"checkpoint {name} is damaged: {why}")
        done = any(e["event"] == "checkpoint" for e in books.read_events(run_spec.run_dir))
        if done and found is None:
            self._violation(run_spec, "no valid checkpoint is left")


def section(folder: Path, seed: int, kills: int, minutes: float, progress: Progress) -> dict[str, Any]:
    """The report's entry for `kills` kills."""
    setting = Setting(folder)
    setting.warm()
    began = time.monotonic()
    found = Campaign(setting, seed, progress, minutes=minutes).run(kills)
    spent = time.monotonic() - began
    redone = found.redone
    figures = {
        "kills": found.kills,
        "violations": len(found.violations),
        "processes killed by them": found.processes,
        "kills of the controller amid its decision": found.controller_kills,
        "worker groups": found.groups,
        "runs finished and compared with one worker undisturbed": found.runs,
        "zombies: groups whose ranks lived on beside the next one": found.lingered,
        "zombies: rank 0 stopped, woken beside the next group (no kill)": found.pauses,
        "steps done again per kill, mean": round(sum(redone) / max(1, found.kills), 2),
        "steps done again per kill, most": max(redone, default=0),
        "world sizes (groups)": ", ".join(f"{w} ({n})" for w, n in sorted(found.worlds.items())),
        "kills a minute, checks included": round(found.kills / spent * 60, 1),
    }
    phases = [
        {"phase": COVERED.get(phase, phase), "thread": thread, "kills": number, "share": f"{number / found.kills:.1%}"}
        for thread, counts in (("training", found.main), ("writer", found.writer))
        for phase, number in counts.most_common()
    ]
    short = [] if found.kills >= kills else [f"{found.kills} of {kills} kills in {minutes:g} minutes"]
    tables = {"Where the kills landed (a kill amid a save counts in both threads):": phases}
    return {"figures": figures, "tables": tables, "failures": found.violations + found.shortfalls() + short}
