"""Keep idle processes with all imports done for the next worker group. Runs in Ray Train's controller and in workers.

In: the nodes that the group's workers run on or will run on.
Out: as many idle processes on each node as it has workers. Ray uses them for the next group by itself, because they
have the same job and runtime environment. A node that joins is warmed before the group is stopped to use it.

Starting a group of two costs some 40 CPU seconds, nearly all of it imports: on two cores they dominate a recovery.
When no warm process fits, Ray starts one as usual.
"""

import gc
import importlib
import logging
import math
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import ray

from raytrain_brats.ray_ext.internals import core
from raytrain_brats.ray_ext.internals.train import WorkerGroupCallback

KEEP_S = 24 * 3600
WARM_S = 60.0
"""A node that joins is used after this time even if it is not warm."""
WORKER = {core.SETUP_HOOK: f"{__name__}.warm_worker"}
"""Environment of a worker's process: what it calls before it accepts work (Ray's worker_process_setup_hook)."""

_logger = logging.getLogger(__name__)

imported = (0.0, 0.0)
"""When this process began and ended its imports, if it was started for a worker."""


def warm_worker() -> None:
    """Do a worker's imports. Runs in its process, before Ray gives it work."""
    global imported
    began = time.time()
    gc.disable()  # a fifth of the time of imports goes to collections, which find nothing
    _warm("raytrain_brats.run.worker", core.WORKER_MODULE, "ray.train.torch.config")
    _warm("torch._dynamo")  # torch imports it with the first optimiser: 2 CPU seconds
    gc.freeze()  # nor has a later collection to look at what was imported
    gc.enable()
    imported = (began, time.time())
    try:
        core.kv_put(_key(ray.get_runtime_context().get_node_id()), b"ready")
    except Exception as error:  # noqa: BLE001 - it would end the process
        _logger.warning("cannot report that this process is ready: %r", error)


def _warm(*modules: str) -> None:
    for module in modules:
        try:
            importlib.import_module(module)
        except Exception as error:  # noqa: BLE001 - it would end the process; the worker's own import raises it again
            _logger.warning("cannot import %s ahead: %r", module, error)


class WarmPool(WorkerGroupCallback):
    """Requests idle processes once a group has applied its first step (`trains` returns something true)."""

    def __init__(self, trains: Callable[[], object]) -> None:
        self._trains = trains
        self._ready: Counter[str] = Counter()
        """Warm processes on each node, as far as known."""
        self._group, self._env = 0, ""
        self._joined: dict[str, float] = {}
        """When processes were requested on nodes that no group has used yet."""

    def is_warm(self, node: dict[str, Any], number: int) -> bool:
        """Whether a joined node has a ready process or WARM_S have passed; the first call requests `number`."""
        name, now = node["NodeID"], time.monotonic()
        if name not in self._joined and self._env:
            self._joined[name] = now
            threading.Thread(target=self._order_on, args=(node, number), daemon=True).start()
        ready = core.kv_get(_key(name)) is not None
        return ready or now - self._joined.get(name, -math.inf) > WARM_S

    def after_worker_group_training_start(self, worker_group: Any) -> None:
        self._group += 1
        threading.Thread(target=self._order, args=(worker_group.get_workers(), self._group), daemon=True).start()

    def _order(self, workers: list[Any], group: int) -> None:
        try:
            self._env = ray.get(workers[0].actor.execute.remote(_environment))
            while group == self._group and not self._trains():
                time.sleep(1)
            if group != self._group:
                return
            needs = Counter(w.metadata.node_id for w in workers)
            for node in ray.nodes():
                if node["Alive"] and needs[node["NodeID"]]:
                    self._fill(node, needs[node["NodeID"]])
        except Exception as error:  # noqa: BLE001 - only the next recovery is slower
            _logger.warning("no warm processes: %r", error)

    def _order_on(self, node: dict[str, Any], number: int) -> None:
        try:
            core.prestart(node, number, self._env, KEEP_S)
            self._ready[node["NodeID"]] = number
        except Exception as error:  # noqa: BLE001 - likewise
            _logger.warning("no warm processes: %r", error)

    def _fill(self, node: dict[str, Any], number: int) -> None:
        left = max(0, self._ready[node["NodeID"]] - number)  # the group that has just started used `number` of them
        core.prestart(node, number - left, self._env, KEEP_S)
        self._ready[node["NodeID"]] = max(left, number)


def _key(node: str) -> str:
    """Key in Ray's key-value store that a warm process of this job sets for its node."""
    return f"warm/{ray.get_runtime_context().get_job_id()}/{node}"


def _environment() -> str:
    return str(ray.get_runtime_context().get_runtime_env_string())
