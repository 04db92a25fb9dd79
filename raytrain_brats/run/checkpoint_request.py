"""Request a checkpoint of a running worker group: before a resize, on a preemption notice, on Ctrl-C.

In: `save-request.json`, put into the run folder by the driver, Ray Train's controller, or a node's spot watcher.
Out: all ranks save at the same step; the requester learns from the group's status when it is committed. `request` runs
in the driver and in Ray Train's controller, `RequestPoller` in a worker (rank 0). Runs in any of them.

For a resize Ray kills the workers in the middle of a step; without this all work since the last checkpoint is redone.
"""

import contextlib
import json
import time
from typing import Any

from raytrain_brats import storage
from raytrain_brats.errors import UserError
from raytrain_brats.run import control
from raytrain_brats.run.repeated import Repeated
from raytrain_brats.run.run_dir import RunDir

TIMEOUT_S = 30.0
"""At least; for slow steps, on CPUs, some steps' time (`patience_s`)."""
HOLD_S = 60.0
SAVE, HOLD = 1, 2
"""What can be requested: save and continue; save, then wait to be ended."""


def training(run_dir: str) -> control.Generation | None:
    """The current worker group if it has applied a step; else None."""
    generation = control.current(run_dir)
    return generation if generation and control.status(run_dir, generation.number).trains else None


def patience_s(run_dir: str) -> float:
    """How long a checkpoint may take from its request on: it is heard before the next step, and saved after that."""
    generation = control.current(run_dir)
    return max(TIMEOUT_S, 4 * control.status(run_dir, generation.number).step_s) if generation else TIMEOUT_S


def request(run_dir: str, what: int) -> bool:
    """Request a checkpoint and wait until it is committed; False when no group trains, or when none came in time.

    Controller and driver may both request one: the second request asks for no less than the first, and the answer to
    the later counts for both. A group that holds already is at its checkpoint.
    """
    if (generation := training(run_dir)) is None:
        return False
    asked, patience = time.time(), patience_s(run_dir)
    document = RunDir(run_dir).save_request
    for _ in range(20):  # another writer may win the compare-and-swap
        before = document.read()
        other = _parsed(before)
        if other.get("generation") == generation.number and other["time"] > asked - patience:
            what = max(what, other["what"])
        wanted = {"generation": generation.number, "what": what, "time": asked}
        if document.swap(before, json.dumps(wanted).encode()):
            break
    else:
        return False
    while time.time() < asked + patience and control.current(run_dir) == generation:
        now = control.status(run_dir, generation.number)
        if now.holds_since > asked - HOLD_S or (now.answered >= asked and what == SAVE):
            return True
        time.sleep(0.2)
    document.swap(json.dumps(wanted).encode(), json.dumps(wanted | {"what": 0}).encode())  # a late HOLD helps nobody
    return False


class RequestPoller(Repeated):
    """Rank 0 reads requests in a thread: slow or unreachable storage must not delay a step."""

    EVERY_S, EVERY_S3_S = 0.5, 5.0

    def __init__(self, run_dir: str, generation: int) -> None:
        super().__init__("requests", self._read, self.EVERY_S3_S if storage.is_s3(run_dir) else self.EVERY_S, 0.0)
        self._document, self._generation = RunDir(run_dir).save_request, generation
        self._request: dict[str, Any] = {}
        self.answered = 0.0
        """Time of the last request that `poll` returned, which identifies it."""

    def poll(self) -> int:
        """SAVE or HOLD when there is a new request to this worker group, else 0."""
        request = self._request
        if request.get("generation") != self._generation or request["time"] == self.answered:
            return 0
        self.answered = request["time"]
        return int(request["what"])

    def _read(self) -> None:
        with contextlib.suppress(OSError, UserError):  # storage may be unreachable for a while
            self._request = _parsed(self._document.read()) or self._request


def _parsed(content: bytes | None) -> dict[str, Any]:
    """A request; empty when there is none."""
    with contextlib.suppress(ValueError):
        found: dict[str, Any] = json.loads(content or b"{}")
        return found
    return {}
