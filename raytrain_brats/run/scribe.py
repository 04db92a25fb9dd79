"""What a rank writes down while it trains.

In: results of steps, checkpoints, validations.
Out: rows and events in the run folder (rank 0), quarantined cases (every rank), word to Ray Train.
"""

import json
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray.train
import torch

from raytrain_brats.data.patch import Patch
from raytrain_brats.run import ledger
from raytrain_brats.run.checkpoint import Checkpoint, Writer
from raytrain_brats.run.job import Job
from raytrain_brats.run.ledger import Generation, MetricsLog
from raytrain_brats.run.step import Learner, StepResult


class Scribe:
    """Bookkeeping of one rank, for the time of one worker group. `stopped` is the same on all ranks."""

    def __init__(self, job: Job, generation: Generation, rank: int, world_size: int, device: torch.device) -> None:
        self.job, self.generation, self.rank, self.world_size = job, generation, rank, world_size
        self.stopped = False
        self._log = MetricsLog(job.run_dir, generation)
        self._writer = Writer(job.run_dir, job.config.checkpoint.keep, self._committed)
        self._bad_in_epoch = 0
        self._quarantined: set[str] = set()
        self._device = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type

    def __enter__(self) -> "Scribe":
        return self

    def __exit__(self, kind: Any, error: Any, *_: Any) -> None:
        if kind is not None:
            self.event("failure", rank=self.rank, error=f"{kind.__name__}: {error}"[:500])
        elif self.rank == 0:
            self._writer.wait()
            self._log.flush()
        self._writer.close()

    def event(self, kind: str, **facts: Any) -> None:
        ledger.event(self.job.run_dir, kind, generation=self.generation.number, **facts)

    def ready(self) -> None:
        """This rank is about to take its first patch."""
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
        if self._bad_in_epoch > self.job.config.data.max_bad_share * plan.epoch_samples:
            self.stopped = True
        if self.rank != 0:
            return
        self._log.add(
            {
                "step": before // plan.global_batch,
                "samples_seen": seen,
                "positions": [before, seen],
                "world_size": self.world_size,
                "generation": self.generation.number,
                "loss": result.loss,
                "lr": result.learning_rate,
                "bad": result.bad,
                "wait_s": round(wait_s, 4),
                "step_s": round(step_s, 4),
                "time": time.time(),
            }
        )
        if self.stopped:
            share = f"{self.job.config.data.max_bad_share:.0%}"
            self.event("stop", reason=f"more than {share} of an epoch's samples cannot be read (data.max_bad_share)")

    def checkpoint(self, seen: int, learner: Learner) -> None:
        """Save beside the training (rank 0), and let Ray Train know (all ranks: its report is a barrier)."""
        began, metrics = time.perf_counter(), {"samples_seen": seen}
        if self.rank == 0:
            with tempfile.TemporaryDirectory() as folder:
                pointer = {"run_dir": self.job.run_dir, "samples_seen": seen}
                (Path(folder) / "pointer.json").write_text(json.dumps(pointer))
                ray.train.report(metrics, checkpoint=ray.train.Checkpoint.from_directory(folder))
            tensors, values = learner.state()
            state = {"samples_seen": seen, "identity": self.job.identity, "learner": values}
            self._writer.start(seen, self.generation.number, tensors, state, self._log.flush, began)
        else:
            ray.train.report(metrics)

    def _committed(self, made: Checkpoint, seconds: float, stall_s: float) -> None:
        self.event(
            "checkpoint",
            samples_seen=made.samples_seen,
            name=made.name,
            bytes=made.bytes,
            seconds=round(seconds, 3),
            stall_s=round(stall_s, 3),
        )

    @contextmanager
    def validation(self, seen: int) -> Iterator[Callable[[Any], None]]:
        """Time a validation; call what is yielded with its means (rank 0) or None."""
        began = time.perf_counter()
        found: list[Any] = []
        yield found.append
        if found and found[0]:
            self.event("validation", samples_seen=seen, seconds=round(time.perf_counter() - began, 3), **found[0])
