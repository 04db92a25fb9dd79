"""Report once a second in which phase of its step a rank is, and its stack on request. Runs in a worker.

In: the rank's `PhaseTimer`; SIGUSR2.
Out: a line per rank in the cluster's key-value store, which the driver's hang detector reads; a file of stacks.
"""

import contextlib
import faulthandler
import itertools
import json
import os
import signal
import tempfile
from collections.abc import Iterator
from typing import Any

import ray

from raytrain_brats.ray_ext.internals import core
from raytrain_brats.run.phase_timer import PhaseTimer
from raytrain_brats.run.rank import Rank
from raytrain_brats.run.repeated import Repeated

PREFIX = "heartbeat/"
"""Keys in the cluster's key-value store are `heartbeat/<run id>/<rank>`."""
BEAT_S = 1.0


@contextlib.contextmanager
def heartbeat(timer: PhaseTimer, run_id: str, generation: int, rank: Rank, run_dir: str = "") -> Iterator[None]:
    """Report within a `with` block, by a thread: so a blocked rank still reports, and a stopped process does not."""
    beats = itertools.count()
    about: dict[str, Any] = {"generation": generation, "rank": rank.number, "world_size": rank.world_size}
    about |= {"pid": os.getpid(), "run_dir": run_dir, "node": ray.get_runtime_context().get_node_id()}

    def beat() -> None:
        now = about | {"beats": next(beats), "entries": timer.entries, "updates": timer.updates}
        now |= {"phase": timer.phase, "samples_seen": timer.samples_seen, "device_at": timer.device_at()}
        with contextlib.suppress(Exception):  # the head may not answer for a while; the next beat tries again
            core.kv_put(f"{PREFIX}{run_id}/{rank.number}", json.dumps(now).encode())

    with tempfile.TemporaryFile("w") as stacks:  # it has no name, so a killed rank leaves no file
        about["stacks"] = f"/proc/{os.getpid()}/fd/{stacks.fileno()}"
        faulthandler.register(signal.SIGUSR2, stacks, all_threads=True)
        try:
            with Repeated("heartbeat", beat, BEAT_S, 2 * BEAT_S):
                try:
                    yield
                finally:
                    timer.enter("end")
        finally:
            faulthandler.unregister(signal.SIGUSR2)
