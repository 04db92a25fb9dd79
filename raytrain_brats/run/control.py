"""How each worker group fares, as far as it decides anything: `groups/NNNN.json`, changed by compare-and-swap.

In: rank 0 of the group (it trains, has saved, answers a request, rolls back, stops), the controller (it failed).
Out: a `GroupStatus` for whoever decides: driver, controller, the next group. Events tell of the same, decide nothing.

Each group has a document of its own, so that what is left of a replaced group cannot keep others from writing theirs.
"""

import json
import threading
import time
from dataclasses import asdict, dataclass, replace
from typing import Any

from raytrain_brats.errors import RunFailed
from raytrain_brats.run.run_dir import Document, RunDir

_TRIES = 20
"""Rank 0 and the controller are the only writers of a document; each loses a few times at most."""


@dataclass(frozen=True)
class GroupStatus:
    trains: bool = False
    """It has applied a step."""
    committed: bool = False
    """It has committed a checkpoint."""
    answered: float = 0.0
    """Name (time) of the newest request for a checkpoint whose checkpoint is committed."""
    holds_since: float = 0.0
    """When it began to wait to be ended, after such a checkpoint."""
    failure: str = ""
    """Why its workers failed."""
    rolled_back_from: int = -1
    """First position of the steps without a finite loss that it gave up on."""
    stopped: str = ""
    """Why it must not be started again."""


def status(run_dir: str, generation: int) -> GroupStatus:
    """Of the group of that number; all defaults when it has not written any. Raises RunFailed when it is damaged."""
    document = RunDir(run_dir).group(generation)
    return _parsed(document, document.read())


def note(run_dir: str, generation: int, **changes: Any) -> None:
    """Change fields of a group's status and leave the others. Raises OSError when the storage fails."""
    document = RunDir(run_dir).group(generation)
    for _ in range(_TRIES):
        content = document.read()
        before = _parsed(document, content)
        after = replace(before, **changes)
        if after == before or document.swap(content, json.dumps(asdict(after)).encode()):
            return
    raise OSError(f"{document.uri}: others were quicker {_TRIES} times")


def _parsed(document: Document, content: bytes | None) -> GroupStatus:
    try:
        return GroupStatus(**json.loads(content or b"{}"))
    except (ValueError, TypeError) as error:
        raise RunFailed(
            f"{document.uri} is damaged ({error}); remove it: the checkpoints say where to go on"
        ) from error


class StatusWriter:
    """Writes rank 0's changes in a thread, in order: storage that is slow or away must not hold a step up."""

    def __init__(self, run_dir: str, generation: int) -> None:
        self._run_dir, self._generation = run_dir, generation
        self._waiting: dict[str, Any] = {}
        self._lock, self._wake, self._closed = threading.Lock(), threading.Event(), False
        self._thread = threading.Thread(target=self._write_all, name="group-status", daemon=True)
        self._thread.start()

    def note(self, **changes: Any) -> None:
        with self._lock:
            self._waiting |= changes
        self._wake.set()

    def close(self, patience_s: float = 5.0) -> None:
        """Returns when all is written, or after `patience_s`."""
        self._closed = True
        self._wake.set()
        self._thread.join(patience_s)

    def _write_all(self) -> None:
        while True:
            self._wake.wait()
            self._wake.clear()
            with self._lock:
                changes, self._waiting = self._waiting, {}
            while changes:
                try:
                    note(self._run_dir, self._generation, **changes)
                    changes = {}
                except OSError as error:
                    print(f"the status of worker group {self._generation} is not written yet: {error}", flush=True)
                    time.sleep(1)
                    with self._lock:
                        changes, self._waiting = changes | self._waiting, {}
            if self._closed and not self._waiting:
                return
