"""Resize storm: the number of workers changes every few steps, asked for or by force, over 1 to 8.

In: a folder, a seed, how many changes.
Out: how many steps each way cost, and whether the runs ended as with one worker undisturbed, bit for bit.

A graceful change asks through `checkpoint_request.request`, as Ray Train's controller does before it resizes: all
ranks save at the same step and wait; it must cost no step. A forced one kills all ranks.
"""

import os
import random
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from raytrain_brats import books
from raytrain_brats.run import checkpoint_request, control
from raytrain_brats.run.spec import RunSpec
from scripts.chaos_campaign.core import Progress
from scripts.chaos_campaign.groups import Group, begin
from scripts.chaos_campaign.setting import Setting, faults_at_end

SIZES = (1, 2, 3, 4, 5, 6, 7, 8)
GLOBAL_BATCH = 8


def schedule(rng: random.Random, changes: int, sizes: tuple[int, ...] = SIZES) -> list[tuple[int, bool]]:
    """(world size to leave, gracefully?): every size in turn, in an order drawn anew, each leg once each way."""
    half: list[int] = []
    while len(half) < -(-changes // 2):
        block = list(sizes)
        rng.shuffle(block)
        if half and block[0] == half[-1]:
            block.append(block.pop(0))
        half += block
    half = half[: -(-changes // 2)]
    legs = [(size, n % 2 == 0) for n, size in enumerate(half)] + [(size, n % 2 == 1) for n, size in enumerate(half)]
    return legs[:changes]


def poll_often() -> None:
    """Ranks hear a request within 0.05 s instead of 0.5 s, so that a leg is a few steps long."""
    checkpoint_request.RequestPoller.EVERY_S = 0.05


@dataclass
class Storm:
    """The runs of a storm."""

    setting: Setting
    seed: int
    legs: list[tuple[int, bool]]
    progress: Progress
    done: int = 0
    runs: int = 0
    changes: Counter[str] = field(default_factory=Counter)
    sizes: Counter[int] = field(default_factory=Counter)
    redone: dict[str, list[int]] = field(default_factory=lambda: {"graceful": [], "forced": []})
    failures: list[str] = field(default_factory=list)

    def run(self) -> None:
        rng = random.Random(self.seed)
        while self.done < len(self.legs) and not self.failures:
            seed = self.seed * 1000 + self.runs
            run_spec = self.setting.spec(f"storm-{seed}", seed)
            os.makedirs(run_spec.run_dir, exist_ok=True)
            self._one_run(run_spec, rng)
            self.runs += 1
            if not self.failures:
                self.failures += faults_at_end(run_spec, self.setting.end(seed))

    def _one_run(self, run_spec: RunSpec, rng: random.Random) -> None:
        how, rows = "", 0
        while True:
            begin(run_spec, lambda: None)
            generation = control.current(run_spec.run_dir)
            assert generation is not None
            if how:
                lost = rows - generation.samples_seen // GLOBAL_BATCH
                self.redone[how].append(lost)
                if how == "graceful" and lost:
                    self.failures.append(f"{run_spec.run_dir}: a graceful change cost {lost} steps")
            left = (run_spec.sampler.total - generation.samples_seen) // GLOBAL_BATCH
            last = self.done >= len(self.legs) or left < 25  # too short for a request to be heard in time
            size, graceful = self.legs[min(self.done, len(self.legs) - 1)]
            group = Group(run_spec, generation, size, poll_often)
            self.sizes[size] += 1
            if last:
                if not group.finish():
                    self.failures.append(f"{run_spec.run_dir}: the last group failed; see processes.log there")
                return
            if not self._leave(run_spec, group, graceful, rng.randint(2, 4)):
                return
            how, rows = "graceful" if graceful else "forced", len(books.read_rows(run_spec.run_dir))
            self.changes[how] += 1
            self.done += 1
            self.progress(self.done, len(self.legs), f"{len(self.failures)} violations")

    def _leave(self, run_spec: RunSpec, group: Group, graceful: bool, steps: int) -> bool:
        """End the group once it has trained a few steps."""
        until = time.monotonic() + 120
        while not group.over() and time.monotonic() < until:
            own = [r for r in books.recent(run_spec.run_dir)[0] if r["generation"] == group.generation.number]
            # a group whose status does not say yet that it trains cannot be asked: a thread writes it, rows come first
            if len(own) >= steps and checkpoint_request.training(run_spec.run_dir):
                break
            time.sleep(0.005)
        saved = not graceful or checkpoint_request.request(run_spec.run_dir, checkpoint_request.HOLD)
        alone = group.over()
        group.kill()
        if alone or not saved or time.monotonic() >= until:
            why = "a rank ended by itself" if alone else "no checkpoint on request" if not saved else "too slow"
            self.failures.append(f"{run_spec.run_dir}, {group.world_size} workers: {why}; see processes.log there")
        return not self.failures


def section(
    folder: Path, seed: int, changes: int, progress: Progress, sizes: tuple[int, ...] = SIZES
) -> dict[str, Any]:
    """The report's entry."""
    setting = Setting(folder, steps=160, global_batch=GLOBAL_BATCH)
    setting.warm()
    storm = Storm(setting, seed, schedule(random.Random(seed), changes, sizes), progress)
    storm.run()
    redone = storm.redone
    figures = {
        "changes of the world size": storm.done,
        "asked for, and saved first": storm.changes["graceful"],
        "by force": storm.changes["forced"],
        "world sizes (groups)": ", ".join(f"{w} ({n})" for w, n in sorted(storm.sizes.items())),
        "runs finished and compared with one worker undisturbed": storm.runs,
        "violations": len(storm.failures),
        "steps done again, all changes asked for": sum(redone["graceful"]),
        "steps done again per forced change, mean": round(sum(redone["forced"]) / max(1, len(redone["forced"])), 2),
    }
    missing = set(sizes) - set(storm.sizes)
    short = [f"sizes {sorted(missing)} were not used"] if missing and not storm.failures else []
    return {"figures": figures, "tables": {}, "failures": storm.failures + short}
