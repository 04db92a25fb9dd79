"""A rank's signs of life: where in its step it is, told once a second; its stack, when asked.

In: marks from the loop; SIGUSR2.
Out: a line per rank in the cluster's key-value store, which `watch` reads in the driver; a file of stacks.
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
from ray.experimental import internal_kv

PHASES = ("start", "load", "data", "forward", "backward", "reduce", "update", "save", "validate", "end")
"""In the order of a step: the rank that is behind the others keeps them waiting."""
NAMESPACE = b"raytrain_brats"
BEAT_S = 1.0


class Heartbeat:
    """Beats in a thread of its own, so a rank that waits still shows life, and one that is stopped does not."""

    def __init__(self, run_id: str, generation: int, rank: int, world_size: int, run_dir: str = "") -> None:
        self._key = f"{run_id}/{rank}".encode()
        self._about: dict[str, Any] = {
            "generation": generation,
            "rank": rank,
            "world_size": world_size,
            "pid": os.getpid(),
            "run_dir": run_dir,
            "node": ray.get_runtime_context().get_node_id(),
        }
        self._samples_seen, self._phase, self._marks, self._updates = 0, "start", 0, 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="pulse", daemon=True)

    def __enter__(self) -> "Heartbeat":
        self._stacks = tempfile.TemporaryFile("w")  # without a name: nothing is left of a rank that is killed
        self._about["stacks"] = f"/proc/{os.getpid()}/fd/{self._stacks.fileno()}"
        faulthandler.register(signal.SIGUSR2, self._stacks, all_threads=True)
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.mark("end")
        self._over.set()
        self._thread.join(2 * BEAT_S)
        faulthandler.unregister(signal.SIGUSR2)
        self._stacks.close()

    def mark(self, phase: str, samples_seen: int | None = None) -> None:
        """Enter a phase; costs nothing."""
        self._samples_seen = self._samples_seen if samples_seen is None else samples_seen
        self._phase, self._marks, self._updates = phase, self._marks + 1, self._updates + (phase == "update")

    def _beat(self) -> None:
        beats = 0
        while True:
            over = self._over.is_set()
            now = {"beats": beats, "marks": self._marks, "phase": self._phase, "samples_seen": self._samples_seen}
            now["updates"] = self._updates
            with contextlib.suppress(Exception):  # a head that does not answer just now is no reason to fall silent
                internal_kv._internal_kv_put(self._key, json.dumps(self._about | now).encode(), namespace=NAMESPACE)
            if over:
                return
            self._over.wait(BEAT_S)
            beats += 1
