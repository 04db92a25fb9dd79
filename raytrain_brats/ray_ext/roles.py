"""Node roles: data tasks run on nodes labelled `role: data`, training workers on `role: train`.

In: the nodes that are up; on the head of a cluster by `ray up`, its file of the node types that may be added.
Out: label selectors, empty where no node has or may have the role: then one machine does everything. Runs in the driver
and in Ray Train's controller.

Tasks that wait for a labelled node make the autoscaler add nodes: it considers each task by itself, and no task waits
when the stream is full. Its other source is turned off in `connect`: Ray Data asks for one more node of each kind it
sees, so it would order GPUs for want of CPUs, and a request that cannot be met makes the trainer's own request fail.
"""

import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import ray
import yaml

from raytrain_brats.ray_ext.internals import data as ray_data

_logger = logging.getLogger(__name__)
LABEL = "role"
BOOTSTRAP = Path("~/ray_bootstrap_config.yaml")
"""Where `ray up` leaves the cluster's YAML on the head."""


@dataclass(frozen=True)
class Part:
    """Where one kind of work runs."""

    selector: dict[str, str]
    nodes: list[dict[str, float]]
    """{resource: amount} of each node that has the role or may get it; of all nodes when none does."""
    grows: bool
    """Whether an autoscaler adds nodes: then `nodes` are all that it may add."""

    @property
    def largest_cpus(self) -> float:
        return max((node.get("CPU", 0.0) for node in self.nodes), default=0.0)


def part(role: Literal["data", "train"]) -> Part:
    """Where the work of a role runs, given the nodes of this moment."""
    up = alive()
    kinds = _kinds() if any(LABEL in (node["Labels"] or {}) for node in up) else []
    coming = [resources for label, resources in kinds if label == role]
    there = [node["Resources"] for node in up if has(node, {LABEL: role})]
    if coming or there:
        return Part({LABEL: role}, coming or there, bool(coming))
    return Part({}, [node["Resources"] for node in up] + [resources for _, resources in kinds], bool(kinds))


def alive() -> list[dict[str, Any]]:
    """Ray's rows of the nodes that are up."""
    return [node for node in ray.nodes() if node["Alive"]]


def has(node: dict[str, Any], selector: dict[str, str]) -> bool:
    labels = node.get("Labels") or {}
    return all(labels.get(key) == value for key, value in selector.items())


def _kinds() -> list[tuple[str, dict[str, float]]]:
    """(role, resources) of each node that the autoscaler may add; none where there is no autoscaler."""
    try:
        given = yaml.safe_load(BOOTSTRAP.expanduser().read_bytes())
        return [
            ((kind.get("labels") or {}).get(LABEL, ""), {key: float(value) for key, value in kind["resources"].items()})
            for kind in given["available_node_types"].values()
            if kind["resources"]  # none: on-premises machines, which are up already
            for _ in range(min(kind.get("max_workers") or 0, given.get("max_workers", math.inf)))
        ]
    except (OSError, yaml.YAMLError, LookupError, TypeError, ValueError, AttributeError):
        return []  # not a head by `ray up`: no node will be added


def keep_apart(data: Part) -> None:
    """Make Ray Data count the data nodes alone, and one more where an autoscaler adds nodes: waiting tasks add it.

    Ray's reservations ignore labels: idle CPUs of training nodes would count for data tasks, which may not run there.
    """
    if not data.selector:
        return
    try:
        ray_data.reserve_labelled_nodes(data.selector, data.largest_cpus if data.grows else 0.0)
    except Exception as error:  # noqa: BLE001 - slower, but the run works
        _logger.warning("Ray Data counts the CPUs of training nodes as its own (%r)", error)
