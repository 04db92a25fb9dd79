"""Tell when the object store overflows to disk: training still works, at the disk's pace.

In: the connected cluster, the run folder. Out: a line on the terminal and a `spilling` event each time there is more.
"""

import threading
from collections.abc import Callable
from typing import Any

from raytrain_brats.ray_ext.internals import core
from raytrain_brats.run import journal

EVERY_S = 15.0
_REMEDY = (
    "give Ray a larger object store (`ray start --object-store-memory`), or lower data.window_cases, run.prefetch or "
    "run.data_tasks"
)


class Spilling:
    """Watches from the driver, in a thread, for the time of a `with` block."""

    def __init__(self, run_dir: str, spilled: Callable[[], int] = core.spilled_bytes, every_s: float = EVERY_S) -> None:
        self._run_dir, self._spilled, self._every_s = run_dir, spilled, every_s
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="spilling", daemon=True)

    def __enter__(self) -> "Spilling":
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._done.set()
        self._thread.join(timeout=10)

    def _watch(self) -> None:
        known: int | None = None
        while True:
            try:
                now = self._spilled()
            except Exception:  # noqa: BLE001 - a cluster that goes away is told of elsewhere
                now = known or 0
            if known is not None and now > known:
                grown = f"{(now - known) / 1e9:.2f} GB"
                print(f"warning: Ray's object store wrote {grown} to disk, which is slow; {_REMEDY}", flush=True)
                journal.event(self._run_dir, "spilling", bytes=now - known, remedy=_REMEDY)
            known = now  # what was spilled before the run is not its doing
            if self._done.wait(self._every_s):
                return
