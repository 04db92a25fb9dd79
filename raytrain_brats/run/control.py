"""What decisions about worker groups depend on, in documents that change by compare-and-swap: `generation.json` and
`groups/NNNN.json`. Runs in workers, the controller and the driver.

In: changes of a group by rank 0 (trains, saved, answered a request, rolled back, stopped) and the controller (failed).
Out: the current `Generation`, and a `GroupStatus` for whoever decides: driver, controller, the next group. Events
report the same and decide nothing.

Each group has its own status, so that a replaced group that is still alive cannot keep others from writing theirs.
"""

import json
import logging
import threading
import time
from dataclasses import asdict, dataclass, replace
from typing import Any

from raytrain_brats import storage
from raytrain_brats.run.repeated import Repeated
from raytrain_brats.run.run_dir import RunDir

_logger = logging.getLogger(__name__)
_TRIES = 20
"""Rank 0 and the controller are the only writers of a document; each loses a few times at most."""


@dataclass(frozen=True)
class Generation:
    """One start of a worker group, and the state it starts from. Written by the controller, read by every rank."""

    number: int
    samples_seen: int = 0
    checkpoint: str | None = None
    failures_in_place: int = 0
    """Failures in a row without a new checkpoint in between; too many end the run. A resize is no failure."""
    bad_in_epoch: int = 0
    """Samples of the current epoch whose case is invalid."""
    fence: int = 0
    """Number of the newest group that was begun, even if its start is not decided yet: older ones may not write."""
    rolled_back_from: int = -1
    """Position from which steps were not finite."""
    roll_backs: int = 0
    """How often groups were rolled back from there."""
    driver: str = ""
    """Token of the driver's lease: no other driver may begin a group."""


def read_generation(run_dir: str) -> tuple[bytes | None, Generation | None]:
    """(content, parsed content) of generation.json; None when there is none. `journal` writes it."""
    document = RunDir(run_dir).generation
    content = document.read()
    return content, document.parsed(content, Generation)


def current(run_dir: str) -> Generation | None:
    return read_generation(run_dir)[1]


@dataclass(frozen=True)
class GroupStatus:
    trains: bool = False
    """It has applied a step."""
    step_s: float = 0.0
    """Seconds of its first step, without waiting for data."""
    committed: bool = False
    """It has committed a checkpoint."""
    answered: float = 0.0
    """Time, which identifies it, of the newest request whose checkpoint is committed."""
    holds_since: float = 0.0
    """When it began to wait to be ended, after such a checkpoint."""
    failure: str = ""
    """Why its workers failed."""
    rolled_back_from: int = -1
    """First position of the steps without a finite loss because of which it ended."""
    stopped: str = ""
    """Why it must not be started again."""


def status(run_dir: str, generation: int) -> GroupStatus:
    """The status of a group; defaults when none was written. Raises RunFailed when the document is damaged."""
    document = RunDir(run_dir).group(generation)
    return document.parsed(document.read(), GroupStatus) or GroupStatus()


def note(run_dir: str, generation: int, **changes: Any) -> None:
    """Change fields of a group's status and leave the others. Raises OSError when the storage fails."""
    document = RunDir(run_dir).group(generation)
    for _ in range(_TRIES):
        content = document.read()
        before = document.parsed(content, GroupStatus) or GroupStatus()
        after = replace(before, **changes)
        if after == before or document.swap(content, json.dumps(asdict(after)).encode()):
            return
    raise OSError(f"{document.uri}: others were quicker {_TRIES} times")


def newest(run_dir: str) -> int:
    """The greatest number of a group that has a document; 0 when none has."""
    names = storage.list_files(RunDir(run_dir).groups)
    return max((int(name[:-5]) for name in names if name.endswith(".json") and name[:-5].isdigit()), default=0)


class StatusWriter(Repeated):
    """Writes rank 0's changes in a thread, in order: slow or unreachable storage must not delay a step."""

    def __init__(self, run_dir: str, generation: int, patience_s: float = 5.0) -> None:
        super().__init__("group-status", self._write, 60.0, patience_s)
        self._run_dir, self._generation = run_dir, generation
        self._waiting: dict[str, Any] = {}
        self._lock = threading.Lock()

    def note(self, **changes: Any) -> None:
        with self._lock:
            self._waiting |= changes
        self.wake()

    def _write(self) -> None:
        """Returns when all is written."""
        while self._waiting:
            with self._lock:
                changes, self._waiting = self._waiting, {}
            try:
                note(self._run_dir, self._generation, **changes)
            except Exception as error:  # noqa: BLE001 - whatever it was, all later changes wait for this thread
                _logger.warning("the status of worker group %d is not written yet: %s", self._generation, error)
                with self._lock:
                    self._waiting = changes | self._waiting
                time.sleep(1)
