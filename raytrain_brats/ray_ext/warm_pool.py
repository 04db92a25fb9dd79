"""Processes that stand ready for the next worker group, all imports done. Runs in Ray Train's controller.

In: the nodes that its workers run on or are about to run on.
Out: as many idle processes on each node as it has workers. Ray gives them to the next group by itself, as they have the
same job and runtime environment. A node that joins is warmed before the group is stopped for its sake.

Starting a group of two costs some 40 CPU seconds, nearly all of it imports: on two cores that is what one waits for.
When no warm process fits, Ray starts one as always.
"""

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
"""A node that joins is used after this long at the latest, warm or not."""
WORKER = {"__RAY_WORKER_PROCESS_SETUP_HOOK_ENV_VAR": f"{__name__}.warm_worker"}
"""Environment of a worker's process: what it imports before it takes work (Ray's worker_process_setup_hook)."""

_logger = logging.getLogger("ray.train")


imported = (0.0, 0.0)
"""When this process began and ended its imports, if it was started for a worker."""


def warm_worker() -> None:
    """Runs in a worker's process, before Ray gives it work."""
    global imported
    began = time.time()
    _warm("raytrain_brats.run.worker", core.WORKER_MODULE, "ray.train.torch.config")
    _warm("torch._dynamo")  # 2 CPU seconds that torch would spend with the first optimiser
    imported = (began, time.time())
    try:
        core.kv_put(_key(ray.get_runtime_context().get_node_id()), b"")
    except Exception as error:  # noqa: BLE001 - it would end the process
        _logger.warning("cannot tell that this process is ready: %r", error)


def _warm(*modules: str) -> None:
    for module in modules:
        try:
            importlib.import_module(module)
        except Exception as error:  # noqa: BLE001 - whoever needs the module will say so; here it would end the process
            _logger.warning("cannot import %s ahead: %r", module, error)


class WarmPool(WorkerGroupCallback):
    """Orders processes once a group has applied its first step, which `trains` tells."""

    def __init__(self, trains: Callable[[], bool]) -> None:
        self._trains = trains
        self._ready: Counter[str] = Counter()
        """Warm processes on each node, as far as known."""
        self._group, self._env = 0, ""
        self._joined: dict[str, float] = {}
        """When processes were ordered on nodes that no group has used yet."""

    def is_warm(self, node: dict[str, Any], number: int) -> bool:
        """Whether a node that joined has a process ready, or was given the time; the first call orders `number`."""
        name, now = node["NodeID"], time.monotonic()
        if name not in self._joined and self._env:
            self._joined[name] = now
            threading.Thread(target=self._order_on, args=(node, number), daemon=True).start()
        ready = core.kv_exists(_key(name))
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
        except Exception as error:  # noqa: BLE001 - a lost convenience
            _logger.warning("no warm processes: %r", error)

    def _order_on(self, node: dict[str, Any], number: int) -> None:
        try:
            core.prestart(node, number, self._env, KEEP_S)
            self._ready[node["NodeID"]] = number
        except Exception as error:  # noqa: BLE001 - likewise
            _logger.warning("no warm processes: %r", error)

    def _fill(self, node: dict[str, Any], number: int) -> None:
        left = max(0, self._ready[node["NodeID"]] - number)  # the group that has just started took that many
        core.prestart(node, number - left, self._env, KEEP_S)
        self._ready[node["NodeID"]] = max(left, number)


def _key(node: str) -> str:
    """Says in Ray's key-value store that a process of this job is ready there."""
    return f"warm/{ray.get_runtime_context().get_job_id()}/{node}"


def _environment() -> str:
    return str(ray.get_runtime_context().get_runtime_env_string())
