"""Processes that stand ready for the next worker group: started and with all imports done while this one trains.

In: Ray Train's controller, the nodes its workers run on or are about to run on.
Out: as many idle processes on each node as it has workers; Ray gives them to the next group by itself, for
they have the same job and runtime environment. A node that joins is warmed before the group is stopped for its sake.

Starting a group of two costs some 40 CPU seconds, nearly all of it imports: on two cores that is what one waits for.
A spare is only ever a gain: when none fits, Ray starts a process as always.
"""

import importlib
import logging
import math
import threading
import time
from collections import Counter
from typing import Any

import ray
from ray._private.grpc_utils import init_grpc_channel
from ray.core.generated import common_pb2, node_manager_pb2, node_manager_pb2_grpc, runtime_environment_pb2
from ray.experimental import internal_kv
from ray.train.v2._internal.execution.callback import WorkerGroupCallback

from raytrain_brats.run import control, journal
from raytrain_brats.run.heartbeat import NAMESPACE

KEEP_S = 24 * 3600
WARM_S = 60.0
"""A node that joins is used after this long at the latest, spare or none."""
WORKER = {"__RAY_WORKER_PROCESS_SETUP_HOOK_ENV_VAR": f"{__name__}.warm_worker"}
"""Environment of a worker's process: what it imports before it takes work (Ray's worker_process_setup_hook)."""

_logger = logging.getLogger("ray.train")


imported = (0.0, 0.0)
"""When this process began and ended its imports, if it was started for a worker."""


def warm_worker() -> None:
    global imported
    began = time.time()
    _warm("raytrain_brats.run.worker", "ray.train.v2._internal.execution.worker_group.worker", "ray.train.torch.config")
    _warm("torch._dynamo")  # 2 CPU seconds that torch would spend with the first optimiser
    imported = (began, time.time())
    try:
        internal_kv._internal_kv_put(_mark(ray.get_runtime_context().get_node_id()), b"", namespace=NAMESPACE)
    except Exception as error:  # noqa: BLE001 - likewise
        print(f"cannot tell that this process is ready: {error!r}")


def _warm(*modules: str) -> None:
    for module in modules:
        try:
            importlib.import_module(module)
        except Exception as error:  # noqa: BLE001 - whoever needs the module will say so; here it would end the process
            print(f"cannot import {module} ahead: {error!r}")


class WarmPool(WorkerGroupCallback):
    """Lives in Ray Train's controller: orders spares once a group has applied its first step."""

    def __init__(self, run_dir: str) -> None:
        self._run_dir = run_dir
        self._ready: Counter[str] = Counter()
        """WarmPool on each node, as far as known."""
        self._group, self._env = 0, ""
        self._joined: dict[str, float] = {}
        """When spares were ordered on nodes that no group has used yet."""

    def warm(self, node: dict[str, Any], number: int) -> bool:
        """Whether a node that joined has a process ready, or was given the time; the first call orders `number`."""
        name, now = node["NodeID"], time.monotonic()
        if name not in self._joined and self._env:
            self._joined[name] = now
            threading.Thread(target=self._order_on, args=(node, number), daemon=True).start()
        ready = internal_kv._internal_kv_exists(_mark(name), namespace=NAMESPACE)
        return ready or now - self._joined.get(name, -math.inf) > WARM_S

    def after_worker_group_training_start(self, worker_group: Any) -> None:
        self._group += 1
        threading.Thread(target=self._order, args=(worker_group.get_workers(), self._group), daemon=True).start()

    def _order(self, workers: list[Any], group: int) -> None:
        try:
            self._env = ray.get(workers[0].actor.execute.remote(_environment))
            generation = journal.current(self._run_dir)
            assert generation is not None, "it is written before workers start"
            while group == self._group and not control.status(self._run_dir, generation.number).trains:
                time.sleep(1)
            if group != self._group:
                return
            needs = Counter(w.metadata.node_id for w in workers)
            for node in ray.nodes():
                if node["Alive"] and needs[node["NodeID"]]:
                    self._fill(node, needs[node["NodeID"]])
        except Exception as error:  # noqa: BLE001 - a lost convenience
            _logger.warning("no spare processes: %r", error)

    def _order_on(self, node: dict[str, Any], number: int) -> None:
        try:
            _prestart(node, number, self._env)
            self._ready[node["NodeID"]] = number
        except Exception as error:  # noqa: BLE001 - likewise
            _logger.warning("no spare processes: %r", error)

    def _fill(self, node: dict[str, Any], number: int) -> None:
        left = max(0, self._ready[node["NodeID"]] - number)  # the group that has just started took that many
        _prestart(node, number - left, self._env)
        self._ready[node["NodeID"]] = max(left, number)


def _mark(node: str) -> bytes:
    """Says in Ray's key-value store that a process of this job is ready there."""
    return f"warm/{ray.get_runtime_context().get_job_id()}/{node}".encode()


def _environment() -> str:
    return str(ray.get_runtime_context().get_runtime_env_string())


def _prestart(node: dict[str, Any], number: int, env: str) -> None:
    """Ask a raylet for idle processes. Ray's own C++ does the same for `num_prestart_python_workers`."""
    calls, common, environments = (vars(m) for m in (node_manager_pb2, common_pb2, runtime_environment_pb2))
    request = calls["PrestartWorkersRequest"](
        language=common["PYTHON"],
        job_id=bytes.fromhex(ray.get_runtime_context().get_job_id()),
        runtime_env_info=environments["RuntimeEnvInfo"](serialized_runtime_env=env),
        keep_alive_duration_secs=KEEP_S,
        num_workers=max(0, number),
    )
    channel = init_grpc_channel(f"{node['NodeManagerAddress']}:{node['NodeManagerPort']}")
    try:
        node_manager_pb2_grpc.NodeManagerServiceStub(channel).PrestartWorkers(request, timeout=10)
    finally:
        channel.close()
