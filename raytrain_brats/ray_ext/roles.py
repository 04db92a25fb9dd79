"""Which nodes do what: data tasks run on nodes labelled `role: data`, training workers on `role: train`.

In: the nodes that are up; on the head of a cluster by `ray up`, its file of the node types that may still come.
Out: label selectors, empty where no node has or may have the role: then one machine does everything.

What brings nodes up and down is tasks that wait for a labelled node: Ray's autoscaler looks at each by itself, and they
cease when the stream is full. Its other source, Ray Data asking for one more node of each kind it sees, would order
GPUs for want of CPUs, and what it asks in vain takes the trainer's own request down with it (`connect` turns it off).
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import ray
import yaml

from raytrain_brats.ray_ext.internals import data as ray_data

LABEL = "role"
BOOTSTRAP = Path("~/ray_bootstrap_config.yaml")
"""Where `ray up` leaves the cluster's YAML on the head."""


@dataclass(frozen=True)
class Part:
    """Where one kind of work goes."""

    selector: dict[str, str]
    nodes: list[dict[str, float]]
    """{resource: amount} of each node that has the role or may get it; of all nodes when none does."""
    grows: bool
    """Whether an autoscaler brings nodes: then `nodes` are all that it may bring."""

    @property
    def largest_cpus(self) -> float:
        return max((node.get("CPU", 0.0) for node in self.nodes), default=0.0)


def part(role: Literal["data", "train"]) -> Part:
    """Where the work of a role goes, as things stand."""
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
    """(role, resources) of each node that the autoscaler may bring; none where there is no autoscaler."""
    try:
        given = yaml.safe_load(BOOTSTRAP.expanduser().read_bytes())
        return [
            ((kind.get("labels") or {}).get(LABEL, ""), {key: float(value) for key, value in kind["resources"].items()})
            for kind in given["available_node_types"].values()
            if kind["resources"]  # none: machines of one's own, which are up already
            for _ in range(min(kind.get("max_workers") or 0, given.get("max_workers", math.inf)))
        ]
    except (OSError, yaml.YAMLError, LookupError, TypeError, ValueError, AttributeError):
        return []  # not a head by `ray up`; what is up is all there is


def keep_apart(data: Part) -> None:
    """Let Ray Data count on the data nodes alone, and where they grow on one more: what waits for it brings it.

    Ray's book of reservations does not look at labels: idle CPUs of training nodes would count for data tasks, which
    may not run there.
    """
    if not data.selector:
        return

    try:
        ray_data.reserve_labelled_nodes(data.selector, data.largest_cpus if data.grows else 0.0)
    except Exception as error:  # noqa: BLE001 - the work is done all the same
        print(f"warning: Ray Data counts the CPUs of training nodes as its own ({error!r})", flush=True)
