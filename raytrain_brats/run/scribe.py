"""What a rank writes down while it trains.

In: results of steps, checkpoints, validations.
Out: rows, events and checkpoints in the run folder (rank 0), quarantined cases (every rank).
"""

import time
from typing import Any

import ray.util
import torch

from raytrain_brats.data.patch import Patch
from raytrain_brats.run import checkpoint, ledger
from raytrain_brats.run.checkpoint import Writer
from raytrain_brats.run.job import Job
from raytrain_brats.run.ledger import Generation, MetricsLog
from raytrain_brats.run.recovery import Stopwatch
from raytrain_brats.run.saving import HOLD, HOLD_S, Ear
from raytrain_brats.run.step import Learner, StepResult

MAX_SKIPPED_STEPS = 50


class Scribe:
    """Bookkeeping of one rank, for the time of one worker group. `stopped` is the same on all ranks."""

    def __init__(self, job: Job, generation: Generation, rank: int, world_size: int, device: torch.device) -> None:
        self.job, self.generation, self.rank, self.world_size = job, generation, rank, world_size
        self.stopped = False
        self._log = MetricsLog(job.run_dir, generation)
        self._writer = Writer()
        self._bad_in_epoch = generation.bad_in_epoch
        self._skipped = 0
        self._ear = Ear(job.run_dir, generation.number)
        self._quarantined: set[str] = set()
        self._stopwatch = Stopwatch(job.run_dir)
        self._device = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type

    def __enter__(self) -> "Scribe":
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        try:
            if kind is None and self.rank == 0:
                self._writer.wait()
                self._log.flush()
        finally:
            self._writer.close()

    def event(self, kind: str, **facts: Any) -> None:
        ledger.event(self.job.run_dir, kind, generation=self.generation.number, **facts)

    def heard(self) -> int:
        """What the controller or the driver asks for just now; all ranks learn it with the next step."""
        return self._ear.heard() if self.rank == 0 else 0

    def ready(self) -> None:
        """This rank is about to take its first patch."""
        self._stopwatch.ready()
        node = ray.util.get_node_ip_address()
        self.event("worker", rank=self.rank, world_size=self.world_size, node=node, device=self._device)

    def step(self, before: int, seen: int, result: StepResult, mine: list[Patch], wait_s: float, step_s: float) -> None:
        """Write the row of an applied step; name unreadable cases; stop when there are too many of them."""
        for patch in mine:
            if patch.reason and patch.case_id not in self._quarantined:
                self._quarantined.add(patch.case_id)
                reason, _, detail = patch.reason.partition(": ")
                self.event("quarantine", case=patch.case_id, reason=reason, detail=detail, position=patch.position)
        plan = self.job.plan
        if before % plan.epoch_length == 0:
            self._bad_in_epoch = 0
        self._bad_in_epoch += result.bad
        self._skipped = 0 if result.finite else self._skipped + 1
        reason = ""
        if self._bad_in_epoch > self.job.config.data.max_bad_share * plan.epoch_samples:
            share = f"{self.job.config.data.max_bad_share:.0%}"
            reason = f"more than {share} of an epoch's samples cannot be read (data.max_bad_share)"
        elif self._skipped >= MAX_SKIPPED_STEPS:
            reason = f"{self._skipped} steps in a row had no finite loss or gradient; lower the learning rate"
        self.stopped = bool(reason)
        if self.rank != 0:
            return
        self._log.add(
            {
                "step": before // plan.global_batch,
                "samples_seen": seen,
                "positions": [before, seen],
                "samples": result.samples,
                "world_size": self.world_size,
                "generation": self.generation.number,
                "loss": result.loss,
                "lr": result.learning_rate,
                "bad": result.bad,
                "finite": result.finite,
                "wait_s": round(wait_s, 4),
                "step_s": round(step_s, 4),
                "time": time.time(),
            }
        )
        self._stopwatch.stepped(self.generation.number, self.world_size, wait_s, step_s)
        if reason:
            self.event("stop", reason=reason)

    def checkpoint(self, seen: int, learner: Learner, asked: int = 0) -> None:
        """Save beside the training (rank 0). Ray's own registry is not told: it would be a barrier for nothing."""
        if self.rank == 0:
            self._save(seen, learner, self._ear.answered if asked else None)
        if asked == HOLD:
            until = time.monotonic() + HOLD_S
            while time.monotonic() < until:  # whoever asked ends this process; every step from here would be lost
                time.sleep(0.1)

    def _save(self, seen: int, learner: Learner, request: float | None) -> None:
        began = time.perf_counter()
        self._writer.wait()
        tensors, values = learner.state()
        tensors = checkpoint.snapshot(tensors)
        state = {"samples_seen": seen, "identity": self.job.identity, "learner": values}
        state |= {"metrics_bytes": self._log.bytes, "bad_in_epoch": self._bad_in_epoch}
        stall_s = round(time.perf_counter() - began, 4)

        def write() -> None:
            began = time.perf_counter()
            self._log.flush()
            number = self.generation.number
            made = checkpoint.save(self.job.run_dir, seen, number, tensors, state, fence=self._log.check)
            checkpoint.prune(self.job.run_dir, self.job.config.checkpoint.keep, number)
            facts: dict[str, Any] = {"samples_seen": seen, "name": made.name, "bytes": made.bytes, "stall_s": stall_s}
            if request is not None:
                facts["request"] = request
            self.event("checkpoint", seconds=round(time.perf_counter() - began, 3), **facts)

        self._writer.start(write)

    def validated(self, seen: int, seconds: float, means: Any) -> None:
        """Record a validation; `means` is None on all ranks but 0."""
        if means:
            self.event("validation", samples_seen=seen, seconds=round(seconds, 3), **means)
