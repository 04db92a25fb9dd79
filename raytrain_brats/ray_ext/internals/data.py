"""Private names of Ray Data: which execution this is, its scheduling loop, its reservations.

In: a context, a dataset's executor, Ray's actor that holds the reservations. Out: numbers; reservations that fit. Runs
in the driver, Ray Train's controller and Ray's own actors.
"""

import os
import time
from typing import Any

import ray
from ray.data import DataContext
from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import (
    _AutoscalingCoordinatorActor,
    get_or_create_autoscaling_coordinator,
)
from ray.data._internal.execution import streaming_executor_state
from ray.data._internal.execution.execution_callback import ExecutionCallback
from ray.data._internal.stats import _StatsManager

__all__ = ["ExecutionCallback"]
_ACTOR = "AutoscalingCoordinator"
"""Name and namespace of Ray's actor."""
_COORDINATOR = _AutoscalingCoordinatorActor  # only for the contract test: our closures use its members in the actor

ATTRIBUTES = {
    "ray.data:DataContext.get_current()": ("_execution_idx", "custom_execution_callback_classes"),
    "ray.data._internal.execution.execution_callback:ExecutionCallback": ("on_execution_step",),
    "ray.data._internal.execution.streaming_executor_state": ("time",),
    "ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator:_AutoscalingCoordinatorActor": (
        "cancel_request",
        "get_reserved_resources",
        "_refresh_resource_reservations",
    ),
    "ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator:_AutoscalingCoordinatorActor()": (
        "_get_cluster_nodes",
        "_ongoing_reqs",
        "_subcluster_selectors",
    ),
}

_NO_STATISTICS = "RAYTRAIN_BRATS_NO_DATASET_STATISTICS"
_STATISTICS = ("register_dataset_to_stats_actor", "update_execution_metrics", "update_iteration_metrics")
ATTRIBUTES["ray.data._internal.stats:_StatsManager"] = _STATISTICS


def count_nothing() -> None:
    """Let Ray Data count nothing for a dashboard, here and in the processes of a cluster that this one starts next.

    Whoever counts first starts an actor of 0.11 GB. Those processes inherit an environment variable, and import this
    module before they execute one of our datasets. It lasts as long as this process, also on a cluster that it joins
    later: only figures of Ray's dashboard depend on it.
    """
    os.environ[_NO_STATISTICS] = "1"
    for name in _STATISTICS:
        setattr(_StatsManager, name, staticmethod(lambda *_, **__: None))


if os.environ.get(_NO_STATISTICS):
    count_nothing()


def execution_index(context: DataContext | None) -> int:
    """How often the dataset was executed before. If Ray changed its meaning, the position guard would stop the run."""
    return int(context._execution_idx) if context is not None else 0


class _Clock:
    """The module `time`, but for its `sleep`."""

    def __init__(self, period_s: float) -> None:
        self.sleep = lambda _: time.sleep(period_s)

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)


def poll_rarely(period_s: float) -> None:
    """Let consumers that wait for a row look again after `period_s`; called in a coordinator's process.

    Ray Data has each of them look a hundred times a second, which takes a fifth of a core for 32.
    """
    streaming_executor_state.time = _Clock(period_s)  # type: ignore[assignment, attr-defined]


def cancel_reservations(last: str, prefix: str) -> None:
    """Release what requesters named `last`, or whose name begins with `prefix`, have reserved.

    Ray would wait 180 s for a killed requester to renew. Raises what Ray raises.
    """
    try:
        coordinator = ray.get_actor(_ACTOR, namespace=_ACTOR)
    except ValueError:
        return  # nothing is reserved

    def drop(holder: Any, last: str, prefix: str) -> None:  # runs in Ray's actor, where our package may be missing
        for requester in [r for r in holder._ongoing_reqs if r == last or r.startswith(prefix)]:
            holder.cancel_request(requester)

    ray.get(coordinator.__ray_call__.remote(drop, last, prefix), timeout=10)


def refresh_reservations(requester: str) -> None:
    """Make Ray recompute its reservations now: it notices a dead node up to 20 s late. Raises what Ray raises."""
    coordinator: Any = get_or_create_autoscaling_coordinator()
    ray.get(coordinator.get_reserved_resources.remote(requester, recompute=True), timeout=10)


def reserve_labelled_nodes(
    requested: dict[str, str],
    whole: dict[str, str],
    ahead_cpus: float,
    shared: dict[str, str],
    workers: tuple[int, float, int],
) -> None:
    """Make Ray Data's requests with the label selector `requested` share the nodes with the labels `whole`,
    `ahead_cpus` of a node that may be added, and of nodes labelled `shared` ({}: none) the CPUs that `workers` leave.

    `workers` is (most, CPUs of each, GPUs of each). Ray's reservations ignore labels: idle CPUs of other nodes would
    count for tasks that may not run there. Raises what Ray raises.
    """

    def install(coordinator: Any, ahead: float) -> None:  # runs in Ray's actor, as above
        most, cpus, gpus = workers

        def part(node: Any) -> dict[str, float]:
            labels, there = node["Labels"] or {}, dict(node["Resources"])
            if whole.items() <= labels.items():
                return there
            if not shared or not shared.items() <= labels.items():
                return {}
            fitting = min(most, int(there.get("CPU", 0.0) // cpus), int(there.get("GPU", 0)) if gpus else most)
            there["CPU"] = there.get("CPU", 0.0) - fitting * cpus
            there.pop("GPU", None)
            return there

        def refresh() -> None:
            type(coordinator)._refresh_resource_reservations(coordinator)
            asking = [
                request
                for name, request in coordinator._ongoing_reqs.items()
                if (coordinator._subcluster_selectors.get(name) or {}) == requested
            ]
            for request in asking:
                request.reserved_resources = {"": {"CPU": ahead}} if ahead else {}
                for node in coordinator._get_cluster_nodes():
                    if node["Alive"] and (there := part(node)):
                        share = {key: amount / len(asking) for key, amount in there.items()}
                        request.reserved_resources[node["NodeID"]] = share

        coordinator._refresh_resource_reservations = refresh

    coordinator: Any = get_or_create_autoscaling_coordinator()
    ray.get(coordinator.__ray_call__.remote(install, ahead_cpus), timeout=60)
