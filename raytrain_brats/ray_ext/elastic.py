"""Restart a worker group quickly: count workers only on nodes that are up and stay. Runs in Ray Train's controller.

In: Ray's nodes and reservations, at a failure, a resize, a node that joins.
Out: worker groups that fit the remaining nodes.
"""

import hashlib
import logging
import os
import socket
import time
from typing import Any

import ray

from raytrain_brats.ray_ext import roles
from raytrain_brats.ray_ext.internals import core
from raytrain_brats.ray_ext.internals import data as ray_data
from raytrain_brats.ray_ext.internals import train as ray_train
from raytrain_brats.ray_ext.internals.train import ControllerCallback
from raytrain_brats.ray_ext.warm_pool import WarmPool

DEATH_S = 20.0
"""Longest wait until Ray declares a node dead that does not answer; Ray's default takes some 20 s."""

_logger = logging.getLogger(__name__)


def tag(run_dir: str) -> str:
    """Name of a run's reservations and datasets in Ray: the same for every driver of the run."""
    return f"brats-{hashlib.sha256(os.fsencode(run_dir)).hexdigest()[:12]}"


def free_reservations(tag: str) -> None:
    """Release the reservations of a killed driver or controller of this run.

    Only the holder of the run's lease may call it: then no other driver reserves for this run.
    """
    last = (core.kv_get(_key(tag)) or b"").decode()
    try:
        ray_data.cancel_reservations(last, f"data-{tag}")
    except Exception as error:  # noqa: BLE001 - they expire by themselves, later
        _logger.warning("cannot release old reservations, they will expire: %r", error)


def _key(tag: str) -> str:
    return f"reservations/{tag}"


class LiveNodesPolicy(ControllerCallback):
    """Count workers only on nodes that are up and stay, and, while a group trains, on warm ones.

    Ray's reservations notice a dead node up to 20 s late, and a drained one not at all. Ray would request a group that
    cannot start, and wait for it as long as RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S.
    """

    def __init__(self, tag: str, warm_pool: WarmPool) -> None:
        self._tag, self._warm_pool = tag, warm_pool

    def after_controller_start(self, train_run_context: Any) -> None:
        self._requester = f"train-{train_run_context.run_id}"
        try:
            core.kv_put(_key(self._tag), self._requester.encode())
        except Exception as error:  # noqa: BLE001 - Ray would end the run for an error here; this is a convenience
            _logger.warning("cannot record reservations: %r", error)
        ray_train.count_on(nodes_that_stay, self.in_use_or_warm)

    def in_use_or_warm(self, policy: Any, group: Any, reserved: dict[str, Any]) -> dict[str, Any]:
        """`reserved` without cold nodes, unless the group would shrink.

        It could: Ray may reserve a node that joined instead of one in use.
        """
        try:
            kept = self._without_cold_nodes(policy, group, reserved)
        except Exception as error:  # noqa: BLE001 - likewise
            _logger.warning("cannot tell which nodes are warm: %r", error)
            return reserved
        return kept if ray_train.possible_workers(policy, kept) >= group.num_workers else reserved

    def _without_cold_nodes(self, policy: Any, group: Any, reserved: dict[str, Any]) -> dict[str, Any]:
        used = {worker.metadata.node_id for worker in group.workers}
        nodes = {node["NodeID"]: node for node in ray.nodes()}
        wanted = ray_train.per_worker(policy)

        def counts(node: str, there: dict[str, float]) -> bool:
            workers = _fitting(wanted, there)
            return node in used or workers == 0 or self._warm_pool.is_warm(nodes[node], workers)

        return {node: there for node, there in reserved.items() if counts(node, there)}

    def before_controller_execute_failure_decision(self, failure_decision: Any) -> None:
        deadline = time.monotonic() + DEATH_S
        while silent := [node for node in ray.nodes() if node["Alive"] and not _answers(node)]:
            if time.monotonic() > deadline:
                _logger.warning("nodes do not answer, but Ray counts them: %s", [n["NodeID"] for n in silent])
                break
            time.sleep(0.3)
        try:
            ray_data.refresh_reservations(self._requester)
        except Exception as error:  # noqa: BLE001 - Ray refreshes them later
            _logger.warning("cannot refresh reservations: %r", error)


def _answers(node: dict[str, Any]) -> bool:
    """Whether a node's raylet accepts connections; after the kill of a worker alone all do, and nothing waits."""
    try:
        socket.create_connection((node["NodeManagerAddress"], node["NodeManagerPort"]), timeout=1).close()
    except OSError:
        return False
    return True


def nodes_that_stay(policy: Any, reserved: dict[str, Any]) -> dict[str, Any]:
    """The reserved nodes that are up and not drained; with roles, all such nodes of the right role."""
    labels: Any = policy.scaling_config.label_selector
    if labels:  # reservations ignore labels; no one else uses these nodes
        return _staying(labels)
    staying = _staying({})
    return {node: resources for node, resources in reserved.items() if node in staying}


def room_for_workers(per_worker: dict[str, float], labels: dict[str, str]) -> int:
    """How many workers fit on the nodes with these labels that are up and not drained."""
    return sum(_fitting(per_worker, there) for there in _staying(labels).values())


def _staying(labels: dict[str, str]) -> dict[str, dict[str, float]]:
    """{node: its resources} of the nodes with these labels that are up and not drained."""
    leaving = ray_train.draining_nodes()
    nodes = [node for node in roles.alive() if roles.has(node, labels)]
    return {node["NodeID"]: node["Resources"] for node in nodes if node["NodeID"] not in leaving}


def _fitting(per_worker: dict[str, float], there: dict[str, float]) -> int:
    """How many workers fit into these resources."""
    return int(min(there.get(name, 0.0) // amount for name, amount in per_worker.items() if amount))
