"""Decide after which steps to save and to validate. Runs in a worker (rank 0).

In: settings, positions, the clock, the validations that are done.
Out: bits that travel with a step's sums, so that all ranks do the same after the same step; the reasons, for events.

One rank must decide: clocks differ, and ranks that look at files may see different ones; a collective that some ranks
enter and others do not never ends.
"""

import time
from collections.abc import Callable, Iterable
from typing import Any

from raytrain_brats.config import Config
from raytrain_brats.data.sampler import Sampler

CHECKPOINT, VALIDATE, END, SCORED = 4, 8, 16, 32
"""Beside what a request asks for (`checkpoint_request.SAVE`, `HOLD`). Each rank whose part of a validation is scored
adds `SCORED`: so all hear at the same step that all are."""
RARER = 19.0
"""After a validation that took t seconds the next may come RARER t later: then it takes 5 % of the time."""
FIRST_S = 10.0
"""A group's first save comes no later: one that is killed again and again makes progress."""


class Cadence:
    """When to save and to validate, in one worker group."""

    def __init__(
        self,
        config: Config,
        sampler: Sampler,
        validates: bool,
        done: Iterable[int],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`validates`: whether there are held-out cases; `done`: the samples at which a validation was written."""
        self._config, self._sampler, self._validates, self._clock = config, sampler, validates, clock
        self._done = set(done)
        self._saved_at = clock() - max(0.0, config.checkpoint.every_s - FIRST_S)
        self._validate_after = 0.0
        """No validation before this time, but the last."""
        self.reason = ""
        """Of the last validation that was due."""

    @property
    def validation_wait_s(self) -> float:
        """How long no validation may come yet; checkpoints carry it to the next group, whose clock is another."""
        return max(0.0, self._validate_after - self._clock())

    def resume(self, validation_wait_s: float) -> None:
        self._validate_after = self._clock() + validation_wait_s

    def after(self, before: int, seen: int) -> int:
        """What is due after the step from sample `before` to `seen`."""
        save = CHECKPOINT if self.owes(before, seen) or self.saves(before, seen) else 0
        return save | (VALIDATE if self.validates(before, seen) else 0)

    def was_validated(self, before: int, seen: int) -> bool:
        """Whether an earlier group validated here."""
        return seen in self._done and self._epoch_ends(before, seen)

    def owes(self, before: int, seen: int) -> bool:
        """Whether a checkpoint is due that an earlier group may have left out: what it validated may be the best."""
        return self._config.checkpoint.best and self.was_validated(before, seen)

    def saves(self, before: int, seen: int) -> bool:
        settings = self._config.checkpoint
        if settings.every_samples:
            return due(before, seen, settings.every_samples)
        return self._clock() >= self._saved_at + settings.every_s

    def saved(self) -> str:
        """A save begins; the cadence in words."""
        self._saved_at, settings = self._clock(), self._config.checkpoint
        return f"every {settings.every_samples} samples" if settings.every_samples else f"every {settings.every_s:g} s"

    def validates(self, before: int, seen: int) -> bool:
        """Whether to validate at `seen`, also when a group starts there: the last one may have been killed before."""
        wanted, end = self._config.validate_.every_samples, seen == self._sampler.total
        if not self._validates or seen == 0 or seen in self._done:
            return False
        if not end and not self._epoch_ends(before, seen):
            return False
        self.reason = "the end" if end else f"every {wanted} samples" if wanted else "an epoch"
        return end or bool(wanted) or self.validation_wait_s == 0

    def _epoch_ends(self, before: int, seen: int) -> bool:
        """Or so many samples as the config says. The last epoch's validation is that of the end, some steps later."""
        if wanted := self._config.validate_.every_samples:
            return due(before, seen, wanted)
        epoch = self._sampler.epoch_samples
        return due(before, seen, epoch) and self._sampler.total - seen >= epoch

    def left_out(self, before: int, seen: int) -> dict[str, Any]:
        """Facts of the validation of an epoch that does not take place now; empty when there is none."""
        epoch = not self._config.validate_.every_samples and self._epoch_ends(before, seen)
        wait_s = self.validation_wait_s
        if not epoch or not self._validates or seen in self._done or seen == self._sampler.total or wait_s <= 0:
            return {}
        return {
            "samples_seen": seen,
            "reason": "validation would take over 5 % of the time",
            "due_in_s": round(wait_s, 1),
        }

    def validated(self, seen: int, seconds: float) -> None:
        """A validation that took so long has ended."""
        self._done.add(seen)
        self._validate_after = self._clock() + RARER * seconds


def due(before: int, seen: int, every: int) -> bool:
    """Whether (before, seen] holds a multiple of `every`."""
    return before // every != seen // every


def may_be_due(config: Config, sampler: Sampler, before: int, seen: int) -> bool:
    """Whether the number of samples alone may make something due after this step: any rank can tell. Rank 0 decides."""
    steps = config.run.compare_weights_steps * sampler.global_batch
    asked = (config.checkpoint.every_samples, config.validate_.every_samples or sampler.epoch_samples, steps)
    return seen == sampler.total or any(due(before, seen, every) for every in asked if every)
