"""Node roles: data tasks run on nodes labelled `role: data` and CPUs that training leaves, workers on `role: train`.

In: the nodes that are up; on the head of a cluster by `ray up`, its file of the node types that may be added.
Out: label selectors, empty where no node has or may have the role: then one machine does everything. Runs in the driver
and in Ray Train's controller.

A data task goes where a CPU is free: Ray tries the nodes of its label selector, then those of its `fallback_strategy`
(seen: all on the first while these have room, then both). Workers do not starve: their placement group holds their CPUs
before a stream begins, and Ray Train ends the stream before it places a group of another size, so that tasks leave a
node that joined within a second or so. How many tasks Ray Data starts is by the CPUs that the most workers would leave.

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


@dataclass(frozen=True)
class Workers:
    """The most training workers of a run, and what each of them needs."""

    most: int
    cpus: float
    gpus: int

    def on(self, node: dict[str, float]) -> int:
        """How many fit on a node of these resources, whatever `most` says."""
        by_cpu = math.floor(node.get("CPU", 0.0) / self.cpus)
        return min(by_cpu, int(node.get("GPU", 0))) if self.gpus else by_cpu

    def idle_cpus(self, node: dict[str, float]) -> float:
        """What they leave of a node, when as many as possible are on it."""
        return max(0.0, node.get("CPU", 0.0) - self.cpus * min(self.most, self.on(node)))


@dataclass(frozen=True)
class Readers:
    """Where data tasks run: on nodes with the labels `first` while these have free CPUs, then on those with `then`."""

    first: dict[str, str]
    """{}: on any node."""
    then: dict[str, str]
    """{}: on no others."""


def readers(on_train_nodes: bool, local: bool) -> Readers:
    """Where a run's data tasks run; `local`: its data lie in a mounted folder and not on S3.

    Training nodes come first with local data: what a data node read there would cross the network twice. Not where an
    autoscaler adds nodes: it would add GPUs for tasks that wait.
    """
    data, train = part("data"), part("train")
    if not (on_train_nodes and data.selector and train.selector):
        return Readers(data.selector, {})
    first, then = data.selector, train.selector
    return Readers(then, first) if local and not (data.grows or train.grows) else Readers(first, then)


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


def keep_apart(data: Part, where: Readers | None = None, workers: Workers | None = None) -> None:
    """Make Ray Data count the nodes that its tasks may run on, and one data node more where an autoscaler adds nodes:
    waiting tasks add it. `where` (by default on data nodes alone) goes with the `workers` that share training nodes.

    Ray's reservations ignore labels: all CPUs of training nodes would count for data tasks.
    """
    if not data.selector:
        return
    where = where or Readers(data.selector, {})
    shared = {LABEL: "train"} if workers and {LABEL: "train"} in (where.first, where.then) else {}
    try:
        ray_data.reserve_labelled_nodes(
            where.first,
            data.selector,
            data.largest_cpus if data.grows else 0.0,
            shared,
            (workers.most, workers.cpus, workers.gpus) if workers else (0, 1.0, 0),
        )
    except Exception as error:  # noqa: BLE001 - slower, but the run works
        _logger.warning("Ray Data counts the CPUs of training nodes as its own (%r)", error)
