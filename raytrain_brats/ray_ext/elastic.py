"""How fast a run comes back: no waiting for nodes that are gone, and a breakdown of where the time went.

In: Ray Train's controller at a failure or resize; what the books know, and what a worker measured.
Out: worker groups that fit the nodes that are left; one event `recovered` a worker group.
"""

import hashlib
import logging
import os
import socket
import time
from typing import Any

import ray
from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import get_or_create_autoscaling_coordinator
from ray.experimental import internal_kv
from ray.train.v2._internal.execution.callback import ControllerCallback
from ray.train.v2._internal.execution.preemption import _get_draining_nodes
from ray.train.v2._internal.execution.scaling_policy.elastic import ElasticScalingPolicy

from raytrain_brats import storage
from raytrain_brats.ray_ext import roles, warm_pool
from raytrain_brats.ray_ext.warm_pool import WarmPool
from raytrain_brats.run import journal
from raytrain_brats.run.heartbeat import NAMESPACE

DEATH_S = 20.0
"""Longest wait for Ray to declare a node dead that does not answer; its own default takes some 20 s."""

_logger = logging.getLogger("ray.train")
_reserved = ElasticScalingPolicy._get_reserved_resources
_decide = ElasticScalingPolicy.make_decision_for_running_worker_group


def tag(run_dir: str) -> str:
    """What names a run's reservations and its datasets in Ray: the same for every driver of the run."""
    return f"brats-{hashlib.sha256(os.fsencode(run_dir)).hexdigest()[:12]}"


def free_reservations(run_dir: str) -> None:
    """Give back what a driver or controller of this run held that was killed; Ray would wait 180 s for them to renew.

    Only for who has the run's lease: nobody else reserves for it any more.
    """
    try:
        book = ray.get_actor("AutoscalingCoordinator", namespace="AutoscalingCoordinator")
    except ValueError:
        return  # nobody has reserved anything
    last = (internal_kv._internal_kv_get(tag(run_dir).encode(), namespace=NAMESPACE) or b"").decode()

    def drop(holder: Any, last: str, data: str) -> None:
        for requester in [r for r in holder._ongoing_reqs if r == last or r.startswith(data)]:
            holder.cancel_request(requester)

    try:
        ray.get(book.__ray_call__.remote(drop, last, f"data-{tag(run_dir)}"), timeout=10)
    except Exception as error:  # noqa: BLE001 - then they expire, which takes longer
        _logger.warning("old reservations are left to expire: %r", error)


class LiveNodesPolicy(ControllerCallback):
    """Lives in Ray Train's controller: workers are counted only on nodes that are up and stay.

    Ray's book of reservations learns of a dead node up to 20 s late, and of a drained one not at all; Ray would ask for
    a group that cannot start, and wait for it as long as RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S.
    """

    def __init__(self, run_dir: str, warm_pool: WarmPool) -> None:
        self._run_dir, self._spares = run_dir, warm_pool

    def after_controller_start(self, train_run_context: Any) -> None:
        self._requester = f"train-{train_run_context.run_id}"
        try:
            internal_kv._internal_kv_put(tag(self._run_dir).encode(), self._requester.encode(), namespace=NAMESPACE)
        except Exception as error:  # noqa: BLE001 - Ray would end the run for an error here; this is a convenience
            _logger.warning("reservations are not on record: %r", error)
        ElasticScalingPolicy._get_reserved_resources = _reserved_where_nodes_stay  # type: ignore

        def decide(policy: Any, worker_group_state: Any, worker_group_status: Any) -> Any:
            """While a group trains, a node that joined counts once processes stand ready there."""
            policy.reserved_in_use = lambda reserved: self._in_use_or_warm(policy, worker_group_state, reserved)
            try:
                return _decide(policy, worker_group_state, worker_group_status)
            finally:
                del policy.reserved_in_use

        ElasticScalingPolicy.make_decision_for_running_worker_group = decide  # type: ignore

    def _in_use_or_warm(self, policy: Any, group: Any, reserved: Any) -> Any:
        """`reserved` without cold nodes, unless the group would shrink for that.

        Ray may reserve a node that joined in place of one in use.
        """
        try:
            kept = self._in_use_or_warm_nodes(policy, group, reserved)
        except Exception as error:  # noqa: BLE001 - likewise
            _logger.warning("cold nodes are not known: %r", error)
            return reserved
        return kept if policy._count_possible_workers(kept) >= group.num_workers else reserved

    def _in_use_or_warm_nodes(self, policy: Any, group: Any, reserved: Any) -> Any:
        used = {worker.metadata.node_id for worker in group.workers}
        nodes = {node["NodeID"]: node for node in ray.nodes()}
        wanted = policy.scaling_config._resources_per_worker_not_none

        def counts(node: str, there: dict[str, float]) -> bool:
            workers = int(min(there.get(name, 0.0) // amount for name, amount in wanted.items() if amount))
            return node in used or workers == 0 or self._spares.warm(nodes[node], workers)

        return {node: there for node, there in reserved.items() if counts(node, there)}

    def before_controller_execute_failure_decision(self, failure_decision: Any) -> None:
        deadline = time.monotonic() + DEATH_S
        while silent := [node for node in ray.nodes() if node["Alive"] and not _answers(node)]:
            if time.monotonic() > deadline:
                _logger.warning("nodes do not answer, Ray holds them for alive: %s", [n["NodeID"] for n in silent])
                break
            time.sleep(0.3)
        try:
            book = get_or_create_autoscaling_coordinator()
            ray.get(book.get_reserved_resources.remote(self._requester, recompute=True), timeout=10)
        except Exception as error:  # noqa: BLE001 - then Ray's own, slower way
            _logger.warning("reservations are not fresh: %r", error)


def _answers(node: dict[str, Any]) -> bool:
    """Whether a node's raylet takes connections: a plain worker kill waits for nobody."""
    try:
        socket.create_connection((node["NodeManagerAddress"], node["NodeManagerPort"]), timeout=1).close()
    except OSError:
        return False
    return True


def _reserved_where_nodes_stay(policy: ElasticScalingPolicy) -> Any:
    reserved = _reserved(policy)
    if reserved is None:
        return None
    leaving = set(_get_draining_nodes() or {})
    staying = {node["NodeID"]: node for node in roles.alive() if node["NodeID"] not in leaving}
    labels: Any = policy.scaling_config.label_selector
    if labels:  # the book does not look at them; these nodes are for us alone
        there = {name: node["Resources"] for name, node in staying.items() if roles.has(node, labels)}
    else:
        there = {node: resources for node, resources in reserved.items() if node in staying}
    return getattr(policy, "reserved_in_use", lambda reserved: reserved)(there)


class Stopwatch:
    """One rank's times from process start to its first step; rank 0 writes them down."""

    def __init__(self, run_dir: str) -> None:
        self._run_dir = run_dir
        self._entered, self._ready, self._done = time.time(), 0.0, False

    def ready(self) -> None:
        self._ready = time.time()

    def stepped(self, generation: int, world_size: int, began: float, wait_s: float, step_s: float) -> None:
        """The group's first step, whose clock `began` with its batch, was applied just now; later calls do nothing."""
        if self._done:
            return
        self._done = True
        now = time.time()
        marks = [self._entered, self._ready, now - step_s + wait_s, now]
        parts = breakdown(journal.recent(self._run_dir)[1], warm_pool.imported, marks)
        journal.event(self._run_dir, "recovered", generation=generation, world_size=world_size, began=began, **parts)


def breakdown(
    events: list[dict[str, Any]], imported: tuple[float, float], marks: list[float]
) -> dict[str, str | float]:
    """Where the time from a failure, resize or launch to the first applied step went; the parts add up to `total_s`.

    `imported` is when the worker's process began and ended its imports (long before, when it was a spare); `marks` are
    when it entered the training function, was ready, had its first batch, had applied its first step.
    """
    last = max((n for n, e in enumerate(events) if e["event"] == "recovered"), default=-1)
    causes = [e for e in events[last + 1 :] if e["event"] in ("launch", "failure", "resize", "preemption")]
    launches = [e for e in causes if e["event"] == "launch"]  # the driver's end leaves no trace but the next start
    cause = (launches[-1:] or causes[:1] or [{"event": "unknown", "time": marks[0]}])[0]
    noticed, entered = cause["time"], max(marks[0], cause["time"])
    detect_s = max(0.0, cause.get("seconds", noticed - cause.get("last_row", noticed)))
    on_the_way = max(0.0, min(imported[1], entered) - max(imported[0], noticed))
    parts = {
        "detect_s": detect_s,
        "reschedule_s": entered - noticed - on_the_way,
        "import_s": on_the_way + marks[1] - entered,
        "first_batch_s": marks[2] - marks[1],
        "first_step_s": marks[3] - marks[2],
    }
    rounded = {name: round(seconds, 3) for name, seconds in parts.items()}
    return {"cause": cause["event"], **rounded, "total_s": round(sum(rounded.values()), 3)}


def last_row_time(run_dir: str) -> float | None:
    """When the last step on record was applied; None on S3, where rows come late."""
    rows = journal.recent(run_dir)[0]
    return float(rows[-1]["time"]) if rows and not storage.is_s3(run_dir) else None
