"""Private names of Ray Data: which execution this is, its scheduling loop, its book of reservations.

In: a context, a dataset's executor, Ray's actor that holds the reservations. Out: numbers; reservations that fit.
"""

from typing import Any

import ray
from ray.data import DataContext
from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import (
    _AutoscalingCoordinatorActor,
    get_or_create_autoscaling_coordinator,
)
from ray.data._internal.execution.execution_callback import ExecutionCallback

__all__ = ["ExecutionCallback"]
_ACTOR = "AutoscalingCoordinator"
"""Name and namespace of Ray's actor."""
_COORDINATOR = _AutoscalingCoordinatorActor  # named for the contract alone: what is touched runs inside the actor

ATTRIBUTES = {
    "ray.data:DataContext.get_current()": ("_execution_idx", "custom_execution_callback_classes"),
    "ray.data._internal.execution.execution_callback:ExecutionCallback": ("on_execution_step",),
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


def execution_index(context: DataContext | None) -> int:
    """How often the dataset was executed before. Were it to mean another thing, the position guard would stop us."""
    return int(context._execution_idx) if context is not None else 0


def cancel_reservations(last: str, prefix: str) -> None:
    """Give back what requesters named `last`, or by a name that begins with `prefix`, have reserved.

    Ray would wait 180 s for a requester that was killed to renew. Raises what Ray raises.
    """
    try:
        book = ray.get_actor(_ACTOR, namespace=_ACTOR)
    except ValueError:
        return  # nobody has reserved anything

    def drop(holder: Any, last: str, prefix: str) -> None:  # runs where our package may not be
        for requester in [r for r in holder._ongoing_reqs if r == last or r.startswith(prefix)]:
            holder.cancel_request(requester)

    ray.get(book.__ray_call__.remote(drop, last, prefix), timeout=10)


def refresh_reservations(requester: str) -> None:
    """Have the book look at the nodes now: it learns of a dead one up to 20 s late. Raises what Ray raises."""
    book: Any = get_or_create_autoscaling_coordinator()
    ray.get(book.get_reserved_resources.remote(requester, recompute=True), timeout=10)


def reserve_labelled_nodes(selector: dict[str, str], ahead_cpus: float) -> None:
    """Have Ray Data's requests share the nodes with these labels alone, and `ahead_cpus` of a node that may come.

    The book does not look at labels: idle CPUs of other nodes would count for tasks that may not run there. Raises what
    Ray raises.
    """

    def install(book: Any, selector: dict[str, str], ahead: float) -> None:  # runs where our package may not be
        def refresh() -> None:
            type(book)._refresh_resource_reservations(book)
            asking = [
                request
                for name, request in book._ongoing_reqs.items()
                if (book._subcluster_selectors.get(name) or {}) == selector
            ]
            for request in asking:
                request.reserved_resources = {"": {"CPU": ahead}} if ahead else {}
                for node in book._get_cluster_nodes():
                    if node["Alive"] and selector.items() <= (node["Labels"] or {}).items():
                        share = {key: amount / len(asking) for key, amount in node["Resources"].items()}
                        request.reserved_resources[node["NodeID"]] = share

        book._refresh_resource_reservations = refresh

    book: Any = get_or_create_autoscaling_coordinator()
    ray.get(book.__ray_call__.remote(install, selector, ahead_cpus), timeout=60)
