"""Report when the object store spills to disk, which slows training to the disk's speed. Runs in the driver.

In: the connected cluster, the run folder. Out: a warning and a `spilling` event each time more was spilled.
"""

import logging

from raytrain_brats.ray_ext.internals import core
from raytrain_brats.run import events
from raytrain_brats.run.repeated import Repeated

_logger = logging.getLogger(__name__)
EVERY_S = 15.0
_REMEDY = (
    "give Ray a larger object store (`ray start --object-store-memory`), or lower train.global_batch, run.prefetch or "
    "run.data_tasks"
)


class Spilling(Repeated):
    """Checks every 15 s, in a thread, for the time of a `with` block."""

    def __init__(self, run_dir: str, every_s: float = EVERY_S) -> None:
        super().__init__("spilling", self._check, every_s)
        self._run_dir = run_dir
        self._known: int | None = None
        """Bytes at the last check; the first, of before the run, are not reported."""

    def _check(self) -> None:
        try:
            now = core.spilled_bytes()
        except Exception:  # noqa: BLE001 - others report a cluster that is gone
            return
        if self._known is not None and now > self._known:
            grown = now - self._known
            _logger.warning("Ray's object store wrote %.2f GB to disk, which is slow; %s", grown / 1e9, _REMEDY)
            events.event(self._run_dir, "spilling", bytes=grown, remedy=_REMEDY)
        self._known = now
