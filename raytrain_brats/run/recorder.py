"""Record what a rank trains: rows, events, checkpoints; decide when it must stop. Runs in a worker.

In: results of steps, checkpoints, validations.
Out: rows, events and checkpoints in the run folder (rank 0), quarantined cases (every rank).
"""

import contextlib
import logging
import os
import socket
import time
from typing import Any

import ray.util
import torch
from torch import distributed

from raytrain_brats import books, storage
from raytrain_brats.data import manifest as manifests
from raytrain_brats.data.patch import Patch
from raytrain_brats.errors import UserError
from raytrain_brats.learn.step import Launched, StepResult, TrainStep, differing
from raytrain_brats.ray_ext import warm_pool
from raytrain_brats.reporting import goodput
from raytrain_brats.run import events, gains, hardware, journal
from raytrain_brats.run.cadence import CHECKPOINT, END, SCORED, VALIDATE, Cadence, due, may_be_due
from raytrain_brats.run.checkpoint_request import HOLD, HOLD_S, SAVE, RequestPoller
from raytrain_brats.run.control import Generation, StatusWriter
from raytrain_brats.run.gauges import StepGauges
from raytrain_brats.run.phase_timer import PhaseTimer
from raytrain_brats.run.rank import Rank
from raytrain_brats.run.rows import MetricsLog
from raytrain_brats.run.run_dir import RunDir
from raytrain_brats.run.saver import Save, Saver
from raytrain_brats.run.spec import RunSpec
from raytrain_brats.run.stragglers import Stragglers
from raytrain_brats.run.validate import Validation

_log = logging.getLogger(__name__)

ROLL_BACK_AFTER = 10
"""Steps in a row without a finite loss and gradient."""
ROLL_BACKS = 2
"""Roll-backs from one position; after that the cause is the data or the settings, not a device."""
BUSY_S = 10.0
"""A validation waits so long at most for the save before, to save what it scores, or what an earlier group scored."""


class RunRecorder:
    """The records of one rank in one worker group. `stopped` is the same on all ranks."""

    def __init__(self, spec: RunSpec, generation: Generation, rank: Rank, timer: PhaseTimer) -> None:
        self.spec, self.generation, self.rank, self.timer = spec, generation, rank, timer
        self.stopped = False
        self._first = rank.number == 0
        self._log = MetricsLog(spec.run_dir, generation)
        self._saver = Saver(spec, generation, self._log, self._note, self._stop)
        self._bad_in_epoch = generation.bad_in_epoch
        self._skipped: list[int] = []
        self._requests = RequestPoller(spec.run_dir, generation.number) if self._first else None
        self._cadence = _cadence(spec) if self._first else None
        self._validation = Validation(spec, rank, timer.enter)
        self._validated: dict[str, Any] = {}
        self._ends = ""
        """Why the run ends before its last position; rank 0 knows it first."""
        self._late = False
        """A checkpoint is due by time, and the one before is still being written, or a validation scored."""
        self._status = StatusWriter(spec.run_dir, generation.number) if self._first else None
        self._stragglers = Stragglers(rank.world_size)
        self._quarantined: set[str] = set()
        self._unread: list[tuple[int, int, Launched, tuple[float, float]]] = []
        self._gauges = StepGauges(spec.run_dir)
        self._ready_at = 0.0
        self._threads = contextlib.ExitStack()
        on_gpu = rank.device.type == "cuda"
        self._device = torch.cuda.get_device_name(rank.device) if on_gpu else rank.device.type

    def __enter__(self) -> "RunRecorder":
        self._threads.enter_context(events.in_background(self.spec.run_dir))
        if self._requests and self._status:
            self._threads.enter_context(self._status)
            self._threads.enter_context(self._requests)
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        self.timer.enter("close")
        try:
            if kind is None and self._first:
                self._saver.wait()
                self._log.flush()
                self.event("closed", **self.timer.cut(), **hardware.peak(self.rank.device))
        finally:
            self._validation.close()
            self._saver.close()
            self._threads.close()

    def event(self, kind: str, **facts: Any) -> None:
        journal.event(self.spec.run_dir, kind, generation=self.generation.number, **facts)

    def chosen(self, kind: str, facts: dict[str, Any]) -> None:
        """Tell what `auto` became, which is the same on all ranks."""
        if self._first:
            self.event(kind, **facts)
            _log.info("%s: %s", kind, facts)

    def _note(self, **changes: Any) -> None:
        if self._status:
            self._status.note(**changes)

    def poll(self, before: int) -> int:
        """What is to follow the step from the sample `before` on: requests of the controller or the driver, and what
        is due. The step gives it to all ranks. Other ranks say only whether their part of a validation is scored."""
        scored = SCORED * self._validation.scored
        if not self._requests or not self._cadence:
            return scored
        seen = before + self.spec.sampler.global_batch
        asked = self._requests.poll() | self._cadence.after(before, seen)
        if self._cadence.was_validated(before, seen):  # by a group that was killed: these steps are done again
            self._look_for_gain(seen)
        if self._ends and not self._validation.pending and seen < self.spec.sampler.total:
            asked |= END
        if facts := self._cadence.left_out(before, seen):
            self.event("validation_left_out", **facts)
        waits = self._validation.pending or self._saver.busy()
        by_time = not self.spec.config.checkpoint.every_samples and not self._cadence.owes(before, seen)
        if asked & CHECKPOINT and by_time and waits:
            asked &= ~CHECKPOINT  # by time: as soon as the save before has ended, and the scores are there
            if not self._late:
                self.event("checkpoint_left_out", samples_seen=seen)
            self._late = True
        return asked | scored

    def resume(self, state: dict[str, Any]) -> None:
        """Go on with what a checkpoint's state says."""
        if self._cadence:
            self._cadence.resume(state.get("validation_wait_s", 0.0))
            self._look_for_gain(self.generation.samples_seen)

    def ready(self) -> bool:
        """Record that the ranks are about to wait for their first patches; whether to validate first: the last group
        may have been killed before it did.

        A collective. Rank 0 decides and writes for all: with a hundred ranks each start would leave a hundred files.
        """
        self.timer.enter("ready")
        seen, sampler = self.generation.samples_seen, self.spec.sampler
        validate = bool(self._cadence and self._cadence.validates(seen - sampler.global_batch, seen))
        self._ready_at = time.time()
        mine = {"rank": self.rank.number, "node": ray.util.get_node_ip_address(), "device": self._device}
        mine |= {"time": self._ready_at, "host": socket.gethostname(), "pid": os.getpid()}
        mine |= hardware.facts(self.rank.device)
        ranks = [(mine, validate)] * self.rank.world_size
        if self.rank.world_size > 1:
            distributed.all_gather_object(ranks, (mine, validate))
        for about, _ in ranks if self._first else ():
            self.event("worker", world_size=self.rank.world_size, **about)
        return ranks[0][1]

    def step(self, before: int, seen: int, launched: Launched, mine: list[Patch]) -> int:
        """Record the steps whose numbers are there: on a GPU usually the one before, since reading those of the newest
        would make the host wait for it. Returns what rank 0 asked for; then, and where something may be due by the
        number of samples, all steps are recorded, so that it happens after a step of which all is known.

        All ranks read the same numbers at the same step, so they do the same.
        """
        for patch in mine:
            if patch.reason and patch.case_id not in self._quarantined:
                self._quarantined.add(patch.case_id)
                reason, _, detail = patch.reason.partition(": ")
                self.event("quarantine", case=patch.case_id, reason=reason, detail=detail, position=patch.position)
        there = before == self.generation.samples_seen or self.rank.device.type == "cpu"
        self._unread.append((before, seen, launched, self.timer.step_times()))
        asked = self._read(0 if there or may_be_due(self.spec.config, self.spec.sampler, before, seen) else 1)
        return asked | self.drain() if asked else 0

    def drain(self) -> int:
        """Record all steps so far; what rank 0 asked for in them."""
        return self._read(0)

    def _read(self, left: int) -> int:
        """Record steps until only so many are unread; what rank 0 asked for in them."""
        asked = 0
        while len(self._unread) > left and not self.stopped:
            before, seen, launched, times_s = self._unread.pop(0)
            self.timer.enter("reduce")  # the device still works, or waits for the other ranks
            result = launched.result()
            self.timer.enter("save")
            self._record(before, seen, result, times_s)
            asked |= result.asked % SCORED
            if result.asked // SCORED == self.rank.world_size:
                self.gather_scores()
        return asked

    def _record(self, before: int, seen: int, result: StepResult, times_s: tuple[float, float]) -> None:
        """Write the row of an applied step; report stragglers; stop or roll back where needed."""
        sampler, (wait_s, step_s) = self.spec.sampler, times_s
        if before // sampler.epoch_samples != (before - sampler.global_batch) // sampler.epoch_samples:
            self._bad_in_epoch = 0
        self._bad_in_epoch += result.bad
        self._skipped = [] if result.finite or result.overflow else [*self._skipped, before]
        slow, world_size = self._stragglers.add(result.forward_s), self.rank.world_size
        if self._first:
            about = {"step": before // sampler.global_batch, "samples_seen": seen, "positions": [before, seen]}
            about |= {"samples": result.samples, "world_size": world_size, "generation": self.generation.number}
            about |= {"loss": result.loss, "lr": result.learning_rate, "bad": result.bad, "finite": result.finite}
            self._log.add(about | {"wait_s": round(wait_s, 4), "step_s": round(step_s, 4), "time": time.time()})
            if before == self.generation.samples_seen:
                self._note(trains=True, step_s=round(step_s - wait_s, 1))
                self._recovered()
            self._gauges.set_step(seen - before, seen, world_size, result.loss, wait_s, step_s)
            for rank, times in slow:
                self.event("straggler", rank=rank, times_slower=times, samples_seen=seen)
        if self._bad_in_epoch > self.spec.config.data.max_bad_share * sampler.epoch_samples:
            share = f"{self.spec.config.data.max_bad_share:.0%}"
            self._stop(f"more than {share} of an epoch's samples cannot be read (data.max_bad_share)")
        elif len(self._skipped) >= ROLL_BACK_AFTER:
            self._roll_back(seen)

    def _recovered(self) -> None:
        """Record where the time from the failure, resize or launch to this first step went."""
        first, now = self.timer.first_entered, time.time()
        reached = [first["start"], self._ready_at or now, first.get("forward", now), now]

        def parts() -> dict[str, Any]:
            told = []
            with contextlib.suppress(OSError, UserError):  # telemetry must not end a rank while the storage is away
                told = books.recent(self.spec.run_dir)[1]
            return goodput.recovery_parts(told, warm_pool.imported, reached)

        about = {"generation": self.generation.number, "world_size": self.rank.world_size}
        events.event_from(self.spec.run_dir, "recovered", parts, **about, began=self.timer.first_batch)

    def _stop(self, reason: str) -> None:
        self.stopped = True
        if self._first:
            self._note(stopped=reason)
            self.event("stop", reason=reason)

    def _roll_back(self, seen: int) -> None:
        """End this group so that the next starts from the newest checkpoint; stop the run if that did not help before.

        Raises FloatingPointError on all ranks.
        """
        first = self._skipped[0]
        where = f"positions {first} to {seen - 1}: no finite loss or gradient in {len(self._skipped)} steps"
        if self.generation.rolled_back_from == first and self.generation.roll_backs >= ROLL_BACKS:
            self._stop(f"{where}, also after {ROLL_BACKS} roll-backs; lower the learning rate, look at these samples")
            return
        if self._first:
            self._note(rolled_back_from=first)
            self.event("roll_back", first=first, positions=[first, seen])
        raise FloatingPointError(where)

    def checkpoint(self, seen: int, train_step: TrainStep, asked: int = 0) -> None:
        """Save in the background (rank 0), unless the last steps were not finite: a roll-back must go to before them.

        Without ray.train.report: it would be a barrier, and Ray's registry of checkpoints is not used.
        """
        last = bool(asked & END) or seen == self.spec.sampler.total
        requested = bool(asked & (SAVE | HOLD))
        needed = requested or last
        self.drain()
        if not requested:
            self.gather_scores()  # a group that goes on from here does not come past that validation again
        if self._skipped and not needed:
            return
        self._compare(seen, train_step)
        if self._first:
            if not (needed or self._saver.soon_free(BUSY_S if self._scores(seen, asked) else 0)):
                self.event("checkpoint_left_out", samples_seen=seen)  # the storage is slow, full or unreachable
            else:
                self._save(seen, train_step, asked, last)
        if requested:  # who asked waits some seconds only: what may be lost in between is a table, and steps weigh more
            self.gather_scores()
        if asked & HOLD:
            until = time.monotonic() + HOLD_S
            while time.monotonic() < until:  # the requester ends this process; a step after the save would be lost
                time.sleep(0.1)

    def _scores(self, seen: int, asked: int) -> bool:
        """Whether a checkpoint here is of a validation: this group's, or one that an earlier group did."""
        owes = self._cadence and self._cadence.owes(seen - self.spec.sampler.global_batch, seen)
        return bool(asked & VALIDATE or owes)

    def compare(self, before: int, seen: int, train_step: TrainStep) -> None:
        """Every `compare_weights_steps`, look for a rank whose weights differ: a flipped bit, a wrong sum."""
        if due(before, seen, self.spec.config.run.compare_weights_steps * self.spec.sampler.global_batch):
            self._compare(seen, train_step)

    def _compare(self, seen: int, train_step: TrainStep) -> None:
        if self.rank.world_size == 1:
            return
        for network in dict.fromkeys((train_step.network, train_step.averaged)):
            if ranks := differing(self._device, network):
                if self._first:
                    self.event("weights_differ", ranks=ranks, samples_seen=seen)
                raise ArithmeticError(f"the weights of ranks {ranks} differ from the others' at sample {seen}")

    def _save(self, seen: int, train_step: TrainStep, due: int, last: bool) -> None:
        began, asked = time.perf_counter(), due & (SAVE | HOLD)
        self._saver.wait()
        tensors, values = train_step.state()
        state = {"samples_seen": seen, "identity": self.spec.dataset_identity, "learner": values}
        state |= {"meaning": manifests.meaning(self.spec.source.convention)}
        state |= {"bad_in_epoch": self._bad_in_epoch}
        facts: dict[str, Any] = {"samples_seen": seen}
        if self._cadence:
            state |= {"validation_wait_s": self._cadence.validation_wait_s}
            facts |= {"reason": self._cadence.saved()}
        if asked or last or self._scores(seen, due):
            facts |= {"reason": "a request" if asked else "the end" if last else "a validation"}
        self._late = False
        answer: dict[str, float] = {}
        if asked and self._requests:
            facts |= {"request": self._requests.answered, "hold": asked == HOLD}
            answer = {"answered": self._requests.answered} | ({"holds_since": time.time()} if asked == HOLD else {})
        facts |= hardware.peak(self.rank.device)
        facts |= {"stall_s": round(time.perf_counter() - began, 4)} | self.timer.cut()
        self._saver.save(Save(seen, tensors, state, facts, answer, last))
        train_step.before_update = self._saver.copied

    def validate(self, seen: int, train_step: TrainStep) -> None:
        """Predict the held-out cases, over all ranks; their scores are gathered now, or a few steps later where another
        process makes them."""
        self.gather_scores()
        began = time.time(), time.perf_counter()
        self.timer.enter("validate")
        self._validation.predict(train_step, seen)
        if self._cadence:
            seconds = time.perf_counter() - began[1]
            self._cadence.validated(seen, seconds)
            self._validated = {"samples_seen": seen, "reason": self._cadence.reason}
            self._validated |= {"began": began[0], "seconds": round(seconds, 3)}
        if not self._validation.aside:
            self.gather_scores()

    def _look_for_gain(self, seen: int) -> None:
        if patience := self.spec.config.validate_.patience_samples:
            try:
                self._ends = gains.stalled(gains.history(self.spec.run_dir), seen, patience)
            except OSError:  # the next validation looks again
                pass
            except UserError as error:
                journal.warn(self.spec.run_dir, str(error))

    def end_early(self, seen: int) -> None:
        """Stop here, on all ranks: the checkpoint is the run's last."""
        self.stopped = True
        if self._first:
            self.event("early_stop", samples_seen=seen, reason=self._ends)

    def gather_scores(self) -> None:
        """Record the validation that is under way, if there is one; wait for what is still to be scored."""
        if not self._validation.pending:
            return
        if self._first:
            self._log.check()  # the table decides: a group that was replaced must not write it
        means = self._validation.gather()
        if means and self._cadence:
            self.event("validation", **self._validated, **means)
            self._look_for_gain(self._validated["samples_seen"])
        self.timer.enter("save")


def _cadence(spec: RunSpec) -> Cadence:
    folder = RunDir(spec.run_dir).file("validation")
    names = [name.removesuffix(".csv") for name in storage.list_files(folder)]
    return Cadence(spec.config, spec.sampler, bool(spec.held_out_cases), [int(n) for n in names if n.isdigit()])
