"""Report when the object store spills to disk, which slows training to the disk's speed. Runs in the driver.

In: the connected cluster, the run folder. Out: a warning and a `spilling` event each time more was spilled.
"""

import logging
import threading
from collections.abc import Callable
from typing import Any

from raytrain_brats.ray_ext.internals import core
from raytrain_brats.run import journal

_logger = logging.getLogger(__name__)
EVERY_S = 15.0
_REMEDY = (
    "give Ray a larger object store (`ray start --object-store-memory`), or lower train.global_batch, run.prefetch or "
    "run.data_tasks"
)


class Spilling:
    """Checks every 15 s, in a thread of the driver, for the time of a `with` block."""

    def __init__(self, run_dir: str, spilled: Callable[[], int] = core.spilled_bytes, every_s: float = EVERY_S) -> None:
        self._run_dir, self._spilled, self._every_s = run_dir, spilled, every_s
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._check_all, name="spilling", daemon=True)

    def __enter__(self) -> "Spilling":
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._done.set()
        self._thread.join(timeout=10)

    def _check_all(self) -> None:
        known: int | None = None
        while True:
            try:
                now = self._spilled()
            except Exception:  # noqa: BLE001 - others report a cluster that is gone
                now = known or 0
            if known is not None and now > known:
                grown = f"{(now - known) / 1e9:.2f} GB"
                _logger.warning("Ray's object store wrote %s to disk, which is slow; %s", grown, _REMEDY)
                journal.event(self._run_dir, "spilling", bytes=now - known, remedy=_REMEDY)
            known = now  # the first value, of before the run, is not reported
            if self._done.wait(self._every_s):
                return
