"""Measure where a rank's time goes; heartbeat, rows, time breakdown and recovery all read it. Runs in a worker.

In: each phase of the training loop as it begins.
Out: the current phase; seconds by cause, which add up to the time since the first batch; when each phase first began.
"""

import time
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

_STEP = ("data", "forward", "backward", "reduce", "update", "save")
PHASES = ("start", "load", "ready", *_STEP, "validate", "gather", "close", "end")
"""In the order of a step: the others wait for the rank that is in the earliest phase. Those who have loaded wait for it
in `ready`, those who have scored their cases in `gather`."""
_CAUSES = {
    "data": "data_wait_s",
    "forward": "productive_s",
    "backward": "productive_s",
    "reduce": "productive_s",
    "update": "productive_s",
    "save": "checkpoint_s",
    "validate": "validation_s",
    "gather": "validation_s",
}
STALLS = ("data_wait_s", "checkpoint_s", "validation_s")
"""Causes for which training stands still."""


class DeviceEvent(Protocol):
    """What a device reaches in its own time, such as torch.cuda.Event."""

    def query(self) -> bool:
        """Whether it is reached; without waiting."""


class PhaseTimer:
    """Entering a phase takes a microsecond; reading is safe from another thread."""

    def __init__(self, on_enter: Callable[[str], None] = lambda phase: None) -> None:
        self.phase, self.samples_seen = "start", 0
        self.entries, self.updates = 0, 0
        """Phases entered so far, and updates among them: a rank whose `entries` do not change is stuck."""
        self.first_entered = {"start": time.time()}
        self.first_batch = 0.0
        """When the first batch was there; the time before is start-up and charged to no cause."""
        self._on_enter = on_enter
        self._own_work: deque[tuple[int, DeviceEvent]] = deque(maxlen=8)
        self._since = time.perf_counter()
        self._of_step: dict[str, float] = {}
        self._spent: dict[str, float] = {}

    def enter(self, phase: str, samples_seen: int | None = None) -> None:
        self._charge()
        self.first_entered.setdefault(phase, time.time())
        self.samples_seen = self.samples_seen if samples_seen is None else samples_seen
        self.phase, self.entries, self.updates = phase, self.entries + 1, self.updates + (phase == "update")
        self._on_enter(phase)

    def own_work_until(self, event: DeviceEvent) -> None:
        """`event` (a new one each time) ends this rank's own work of the step on the device: it was recorded before
        anything that waits for other ranks. On a GPU the host runs ahead, and its phase says little: all are in
        `reduce` when one rank's kernels hang."""
        while self._own_work and self._own_work[0][1].query():
            self._own_work.popleft()
        self._own_work.append((self.samples_seen, event))

    def device_at(self) -> int | None:
        """The first sample of the earliest step whose own work the device has not done; None when all is, or there is
        no device to ask."""
        try:
            return next((seen for seen, event in list(self._own_work) if not event.query()), None)
        except RuntimeError:  # the device has failed, which the training thread will hear itself
            return None

    def _charge(self) -> None:
        now = time.perf_counter()
        seconds, self._since = now - self._since, now
        cause = _CAUSES.get(self.phase, "other_s")
        self._of_step[cause] = self._of_step.get(cause, 0.0) + seconds
        if self.first_batch:
            self._spent[cause] = self._spent.get(cause, 0.0) + seconds
        elif self.phase == "data":
            self.first_batch = time.time()

    def step_times(self) -> tuple[float, float]:
        """(seconds waited for data, seconds waited and computed) since the last call."""
        self._charge()
        times, self._of_step = self._of_step, {}
        wait_s = times.get("data_wait_s", 0.0)
        return wait_s, wait_s + times.get("productive_s", 0.0)

    def cut(self) -> dict[str, Any]:
        """The seconds by cause since the last call, and the shares for which training stood still, in the form that
        events have."""
        self._charge()
        spent, self._spent = self._spent, {}
        total = sum(spent.values()) or 1.0
        stall = {cause.removesuffix("_s"): round(spent.get(cause, 0.0) / total, 4) for cause in STALLS}
        seconds = {cause: round(seconds, 4) for cause, seconds in spent.items()}
        return {"mark": time.time(), "spent": seconds, "stall": stall}
