"""Report once a second in which phase of its step a rank is, and its stack on request. Runs in a worker.

In: the rank's `PhaseTimer`; SIGUSR2.
Out: a line per rank in the cluster's key-value store, which the driver's hang detector reads; a file of stacks.
"""

import contextlib
import faulthandler
import json
import os
import signal
import tempfile
import threading
from typing import Any

import ray

from raytrain_brats.ray_ext.internals import core
from raytrain_brats.run.phase_timer import PhaseTimer

PREFIX = "heartbeat/"
"""Keys in the cluster's key-value store are `heartbeat/<run id>/<rank>`."""
BEAT_S = 1.0


class Heartbeat:
    """Runs in its own thread, so a blocked rank still reports, and a stopped process does not."""

    def __init__(
        self, timer: PhaseTimer, run_id: str, generation: int, rank: int, world_size: int, run_dir: str = ""
    ) -> None:
        self._key = f"{PREFIX}{run_id}/{rank}"
        self._about: dict[str, Any] = {"generation": generation, "rank": rank, "world_size": world_size}
        self._about |= {"pid": os.getpid(), "run_dir": run_dir, "node": ray.get_runtime_context().get_node_id()}
        self._timer = timer
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

    def __enter__(self) -> "Heartbeat":
        self._stacks = tempfile.TemporaryFile("w")  # it has no name, so a killed rank leaves no file
        self._about["stacks"] = f"/proc/{os.getpid()}/fd/{self._stacks.fileno()}"
        faulthandler.register(signal.SIGUSR2, self._stacks, all_threads=True)
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._timer.enter("end")
        self._over.set()
        self._thread.join(2 * BEAT_S)
        faulthandler.unregister(signal.SIGUSR2)
        self._stacks.close()

    def _beat(self) -> None:
        beats = 0
        while True:
            over, timer = self._over.is_set(), self._timer
            now = {"beats": beats, "entries": timer.entries, "phase": timer.phase, "samples_seen": timer.samples_seen}
            now |= {"updates": timer.updates, "device_at": timer.device_at()}
            with contextlib.suppress(Exception):  # the head may not answer for a while; the next beat tries again
                core.kv_put(self._key, json.dumps(self._about | now).encode())
            if over:
                return
            self._over.wait(BEAT_S)
            beats += 1
