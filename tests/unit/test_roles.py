"""Data tasks on `data` nodes, workers on `train` nodes, everything on one node when it is alone."""

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from ray.autoscaler.v2.instance_manager.config import NodeTypeConfig
from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
from ray.core.generated.autoscaler_pb2 import ClusterResourceConstraint, ResourceRequest, ResourceRequestByCount
from ray.core.generated.common_pb2 import LabelSelector, LabelSelectorConstraint
from ray.data._internal.cluster_autoscaler.base_autoscaling_coordinator import ResourceRequestPriority
from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import _AutoscalingCoordinatorActor

from raytrain_brats.config import Run
from raytrain_brats.errors import UserError
from raytrain_brats.ray_ext import cluster, elastic, roles
from raytrain_brats.ray_ext.internals import data as ray_data
from raytrain_brats.ray_ext.internals import train as ray_train
from raytrain_brats.ray_ext.roles import Part

HEAD, DATA, TRAIN = {"CPU": 0.0}, {"CPU": 8.0}, {"CPU": 16.0, "GPU": 4.0}
KINDS = {
    "head": {"labels": {"role": "head"}, "resources": {"CPU": 0}, "max_workers": 0},
    "cpu": {"labels": {"role": "data"}, "resources": {"CPU": 8}, "max_workers": 3},
    "gpu": {"labels": {"role": "train"}, "resources": {"CPU": 16, "GPU": 4}, "max_workers": 2},
}


def row(role: str, resources: dict[str, float], alive: bool = True) -> dict[str, Any]:
    """A node as Ray tells of it; its name is its role."""
    labels = {"role": role} if role else {}
    return {"NodeID": role, "Alive": alive, "Labels": labels, "Resources": resources}


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[dict[str, Any]]:
    """The nodes that Ray tells of; to be filled."""
    told: list[dict[str, Any]] = []
    monkeypatch.setattr(roles.ray, "nodes", lambda: told)
    monkeypatch.setattr(roles.ray, "cluster_resources", lambda: {"object_store_memory": 1e9})
    monkeypatch.setattr(roles, "BOOTSTRAP", tmp_path / "ray_bootstrap_config.yaml")
    return told


def autoscaled(kinds: dict[str, Any], **more: Any) -> None:
    """As on the head of a cluster that `ray up` started."""
    roles.BOOTSTRAP.write_text(yaml.safe_dump({"available_node_types": kinds} | more))


def test_alone_one_node_does_everything(nodes: list[dict[str, Any]]) -> None:
    """Without labels, or as a head that is alone: no selector, whatever a YAML of another day says."""
    autoscaled(KINDS)
    nodes.append(row("", DATA))
    assert roles.part("data") == roles.part("train") == Part({}, [DATA], False)
    roles.BOOTSTRAP.unlink()
    nodes[:] = [row("head", DATA), row("data", DATA, alive=False)]
    assert roles.part("data") == roles.part("train") == Part({}, [DATA], False)


def test_nodes_that_are_up_have_their_roles(nodes: list[dict[str, Any]]) -> None:
    """A role that no node has is everyone's."""
    nodes += [row("head", HEAD), row("data", DATA), row("data", DATA)]
    assert roles.part("data") == Part({"role": "data"}, [DATA, DATA], False)
    assert roles.part("train") == Part({}, [HEAD, DATA, DATA], False)
    nodes.append(row("train", TRAIN))
    assert roles.part("train") == Part({"role": "train"}, [TRAIN], False)


def test_nodes_that_an_autoscaler_may_bring_have_theirs(nodes: list[dict[str, Any]]) -> None:
    """Before any is up; a kind that was switched off leaves its work to the others."""
    autoscaled(KINDS)
    nodes.append(row("head", HEAD))
    assert roles.part("data") == Part({"role": "data"}, [DATA] * 3, True)
    assert roles.part("train") == Part({"role": "train"}, [TRAIN] * 2, True)
    autoscaled(KINDS | {"cpu": KINDS["cpu"] | {"max_workers": 0}})
    assert roles.part("data") == Part({}, [HEAD, TRAIN, TRAIN], True)
    autoscaled(KINDS, max_workers=1)  # of the whole cluster
    assert roles.part("train") == Part({"role": "train"}, [TRAIN], True)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "- a",
        "{",
        "available_node_types: 3",
        "available_node_types: {a: {max_workers: 1}}",
        "available_node_types: {local.cluster.node: {resources: {}, max_workers: 3}}",  # `ray up` on own machines
    ],
)
def test_a_yaml_that_says_nothing_is_none(nodes: list[dict[str, Any]], content: str) -> None:
    roles.BOOTSTRAP.write_text(content)
    nodes.append(row("head", DATA))
    assert roles.part("train") == Part({}, [DATA], False)


def launches(constraint: list[ResourceRequest], waiting: list[ResourceRequest]) -> dict[str, int]:
    """{kind: number} of nodes that Ray's autoscaler starts for what was asked of it, and for tasks that wait."""
    kinds = {
        name: NodeTypeConfig(name, 0, kind["max_workers"], resources=kind["resources"], labels=kind["labels"])
        for name, kind in KINDS.items()
    }
    asked = SchedulingRequest(
        disable_launch_config_check=True,
        node_type_configs=kinds,
        resource_requests=[ResourceRequestByCount(request=one, count=1) for one in waiting],
        cluster_resource_constraints=[
            ClusterResourceConstraint(
                resource_requests=[ResourceRequestByCount(request=one, count=1) for one in constraint]
            )
        ],
    )
    return {launch.instance_type: launch.count for launch in ResourceDemandScheduler().schedule(asked).to_launch}


def request(amounts: dict[str, float], role: str = "") -> ResourceRequest:
    wanted = LabelSelectorConstraint(label_key="role", operator="LABEL_OPERATOR_IN", label_values=[role])
    return ResourceRequest(
        resources_bundle=amounts, label_selectors=[LabelSelector(label_constraints=[wanted])] if role else []
    )


def test_why_tasks_that_wait_are_what_brings_data_nodes() -> None:
    """Ray's autoscaler, asked: this is what `roles` is built around, and what an upgrade of Ray may change.

    A task that waits is looked at by itself. What is asked at once is brought whole or not at all, and what Ray Data
    asks for, a node more of every kind, brings GPUs.
    """
    workers, task = [request({"CPU": 1, "GPU": 1}, "train")] * 8, request({"CPU": 1}, "data")
    assert launches(workers, [task] * 9) == {"gpu": 2, "cpu": 2}
    assert launches(workers, [task] * 900) == {"gpu": 2, "cpu": 3}
    assert launches([*workers, workers[0]], []) == {}
    assert launches([*workers, *[request({"CPU": 8}, "data")] * 4], []) == {}
    both = request({"CPU": 1}, "data")  # what a task with a fallback is told as
    both.label_selectors.append(request({"CPU": 1}, "train").label_selectors[0])
    assert launches([], [both] * 900) == {"gpu": 2, "cpu": 3}
    assert launches([request({"CPU": 8}), request({"CPU": 16, "GPU": 4})], []) == {"cpu": 1, "gpu": 1}


def test_a_run_is_measured_by_what_may_come(nodes: list[dict[str, Any]]) -> None:
    """No node is up but the head: GPUs and data tasks are those of the nodes that will be."""
    autoscaled(KINDS)
    nodes.append(row("head", HEAD))
    found = cluster.measure(Run(workers="auto"), 8)
    assert (found.low, found.high, found.cpus, found.gpus) == (1, 8, 1.0, 1)
    assert (found.cpus_per_task, found.tasks) == (1.0, None)
    assert cluster.measure(Run(workers="1:8", cpus_per_worker=4), 8).high == 8  # all CPUs of a training node
    with pytest.raises(UserError, match=r"1:9.* room for 8 workers .* and a GPU.* max_workers"):
        cluster.measure(Run(workers="1:9"), 9)


def test_gpus_that_nobody_uses_are_told(nodes: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]) -> None:
    """By default all that may come train; where the batch or --workers leave some out, one line says so."""
    autoscaled(KINDS)
    nodes.append(row("head", HEAD))
    cluster.measure(Run(workers="auto"), 16)
    assert capsys.readouterr().err == ""
    assert cluster.measure(Run(workers="auto"), 6).high == 6
    assert capsys.readouterr().err == "2 of 8 GPUs stay idle: 6 workers at most, by train.global_batch = 6\n"
    cluster.measure(Run(workers="1:4"), 16)
    assert capsys.readouterr().err == "4 of 8 GPUs stay idle: 4 workers at most, by --workers\n"


def test_too_few_training_nodes_are_told(nodes: list[dict[str, Any]]) -> None:
    """Where nobody brings nodes, a range may reach beyond those of today, its lower end may not."""
    nodes += [row("data", DATA), row("train", {"CPU": 4.0})]
    assert cluster.measure(Run(workers="1:8", cpus_per_worker=2), 8).high == 8
    with pytest.raises(UserError, match=r"3:8.* room for 2 workers .*add nodes"):
        cluster.measure(Run(workers="3:8", cpus_per_worker=2), 8)


@pytest.mark.parametrize("grows", [True, False])
def test_each_side_counts_on_its_own_nodes(
    nodes: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, grows: bool
) -> None:
    """Ray's own book would put the worker on the data node, which is larger, and data tasks on the rest."""
    nodes += [row("head", HEAD), row("data", DATA), row("train", {"CPU": 4.0})]
    book = _AutoscalingCoordinatorActor(time.time, lambda *_, **__: None, lambda: nodes)
    call = SimpleNamespace(remote=lambda function, *arguments: function(book, *arguments))
    monkeypatch.setattr(ray_data, "get_or_create_autoscaling_coordinator", lambda: SimpleNamespace(__ray_call__=call))
    monkeypatch.setattr(ray_data.ray, "get", lambda *_, **__: None)
    if grows:
        autoscaled(KINDS)
    data = roles.part("data")
    roles.keep_apart(data)
    roles.keep_apart(data)  # every run of a cluster does it

    worker = {"resources": [{"CPU": 2.0}], "label_selectors": [{"role": "train"}]}
    book.request_resources("train-a", expire_after_s=60, priority=ResourceRequestPriority.HIGH, **worker)
    tasks: dict[str, Any] = {"resources": [], "request_remaining": ["CPU"], "expire_after_s": 60}
    book.request_resources("data-a", subcluster_selector=data.selector, **tasks)
    ahead = {"": {"CPU": 8.0}} if grows else {}
    assert book.get_reserved_resources("data-a") == ahead | {"data": {"CPU": 8.0}}
    book.request_resources("data-b", subcluster_selector=data.selector, **tasks)
    assert book.get_reserved_resources("data-b") == ahead | {"data": {"CPU": 4.0}}
    nodes[1]["Alive"] = False
    assert book.get_reserved_resources("data-a", recompute=True) == ahead


P4D = {"CPU": 96.0, "GPU": 8.0}
BIG = {"cpu": KINDS["cpu"], "gpu": {"labels": {"role": "train"}, "resources": P4D, "max_workers": 2}}


@pytest.mark.parametrize(
    ("run", "train", "on_train"),
    [
        (Run(), P4D, True),  # 88 CPUs of each node
        (Run(data_on_train_nodes=False), P4D, False),
        (Run(cpus_per_worker=12), P4D, False),
        (Run(cpus_per_worker=11, cpus_per_task=8), P4D, True),
        (Run(cpus_per_worker=11.5, cpus_per_task=5), P4D, False),
        (Run(workers="1:2", cpus_per_worker=1), {"CPU": 2.0}, False),
        (Run(workers="1", cpus_per_worker=1), {"CPU": 2.0}, True),
    ],
)
def test_data_tasks_may_use_what_workers_leave_of_training_nodes(
    nodes: list[dict[str, Any]], run: Run, train: dict[str, float], on_train: bool
) -> None:
    """By default where a task fits beside as many workers as the node can have."""
    nodes += [row("head", HEAD), row("data", DATA), row("train", train)]
    assert cluster.measure(run, 16).on_train_nodes is on_train


def test_without_roles_the_setting_does_nothing(nodes: list[dict[str, Any]]) -> None:
    nodes.append(row("", {"CPU": 8.0}))
    for value in ("auto", True, False):
        needed = cluster.measure(Run(workers="1", data_on_train_nodes=value), 8)
        assert roles.readers(needed.on_train_nodes, local=True) == roles.Readers({}, {})


def test_no_gpus_are_ordered_for_data_tasks(nodes: list[dict[str, Any]]) -> None:
    """An autoscaler adds the nodes of either label for a task that waits; `auto` allows that only where the workers ask
    for all of them anyway. Data nodes come first then, whatever the data are."""
    autoscaled(BIG)
    nodes.append(row("head", HEAD))
    assert cluster.measure(Run(), 16).on_train_nodes
    assert not cluster.measure(Run(), 8).on_train_nodes
    assert not cluster.measure(Run(workers="1:8"), 16).on_train_nodes
    assert cluster.measure(Run(workers="1:8", data_on_train_nodes=True), 16).on_train_nodes
    for local in (True, False):
        assert roles.readers(True, local) == roles.Readers({"role": "data"}, {"role": "train"})


def test_who_reads_first(nodes: list[dict[str, Any]]) -> None:
    """From S3 data nodes, and training nodes when these are busy; from a mounted folder the other way round."""
    nodes += [row("data", DATA), row("train", P4D)]
    assert roles.readers(True, local=False) == roles.Readers({"role": "data"}, {"role": "train"})
    assert roles.readers(True, local=True) == roles.Readers({"role": "train"}, {"role": "data"})
    assert roles.readers(False, local=True) == roles.Readers({"role": "data"}, {})


@pytest.mark.parametrize("local", [True, False])
def test_ray_data_counts_what_the_most_workers_leave(
    nodes: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, local: bool
) -> None:
    """Its tasks never count on a CPU that a worker may get, also on a node that joins."""
    nodes += [row("head", HEAD), row("data", DATA), row("train", P4D)]
    book = _AutoscalingCoordinatorActor(time.time, lambda *_, **__: None, lambda: nodes)
    call = SimpleNamespace(remote=lambda function, *arguments: function(book, *arguments))
    monkeypatch.setattr(ray_data, "get_or_create_autoscaling_coordinator", lambda: SimpleNamespace(__ray_call__=call))
    monkeypatch.setattr(ray_data.ray, "get", lambda *_, **__: None)
    where = roles.readers(True, local)
    roles.keep_apart(roles.part("data"), where, roles.Workers(12, 2.0, 1))
    tasks: dict[str, Any] = {"resources": [], "request_remaining": ["CPU"], "expire_after_s": 60}
    book.request_resources("data-a", subcluster_selector=where.first, **tasks)
    assert book.get_reserved_resources("data-a") == {"data": {"CPU": 8.0}, "train": {"CPU": 80.0}}
    nodes.append(row("train", P4D) | {"NodeID": "joined"})
    assert book.get_reserved_resources("data-a", recompute=True)["joined"] == {"CPU": 80.0}


def test_room_for_workers_is_on_training_nodes_that_stay(
    nodes: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A drained group leaves early only for a place where it may run."""
    nodes += [row("data", DATA), row("train", TRAIN)]
    monkeypatch.setattr(ray_train, "_get_draining_nodes", dict)
    assert elastic.room_for_workers({"CPU": 4.0}, {"role": "train"}) == 4
    assert elastic.room_for_workers({"CPU": 4.0}, {}) == 6
    monkeypatch.setattr(ray_train, "_get_draining_nodes", lambda: {"train": 0})
    assert elastic.room_for_workers({"CPU": 4.0}, {"role": "train"}) == 0
