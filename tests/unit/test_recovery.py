"""Where the time of a recovery went, and which nodes a new worker group may count on."""

import socket
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest

from raytrain_brats.ray_ext import elastic, warm_pool
from raytrain_brats.ray_ext.elastic import LiveNodesPolicy
from raytrain_brats.ray_ext.internals import core
from raytrain_brats.ray_ext.internals import data as ray_data
from raytrain_brats.ray_ext.internals import train as ray_train
from raytrain_brats.reporting.goodput import recovery_parts

PARTS = ("detect_s", "reschedule_s", "import_s", "first_batch_s", "first_step_s")


def event(kind: str, at: float, **facts: Any) -> dict[str, Any]:
    return {"event": kind, "time": at, **facts}


def test_the_parts_of_a_worker_kill_add_up_to_its_total() -> None:
    """Last row at 98, noticed at 100, imports 103 to 105, training function at 106, then ready, batch, step."""
    events = [event("launch", 10.0), event("recovered", 20.0), event("failure", 100.0, last_row=98.0)]
    found = recovery_parts(events, (103.0, 105.0), [106.0, 107.0, 110.0, 110.5])
    assert [found[part] for part in PARTS] == [2.0, 4.0, 3.0, 3.0, 0.5]
    assert (found["cause"], found["total_s"]) == ("failure", 12.5)


def test_imports_of_a_spare_cost_nothing() -> None:
    """They were done before the failure."""
    found = recovery_parts([event("failure", 100.0)], (50.0, 60.0), [101.0, 101.5, 102.0, 102.25])
    assert [found[part] for part in PARTS] == [0.0, 1.0, 0.5, 0.5, 0.25]


def test_a_resize_begins_when_it_was_decided_and_a_launch_with_the_launch() -> None:
    """A resize's event comes after the save; of a driver that was killed only the next launch tells."""
    resize = [event("recovered", 20.0), event("resize", 100.0, seconds=1.5)]
    assert recovery_parts(resize, (0.0, 0.0), [103.0, 104.0, 105.0, 106.0])["total_s"] == 7.5
    again = [event("recovered", 20.0), event("failure", 30.0, last_row=29.0), event("launch", 100.0)]
    assert recovery_parts(again, (0.0, 0.0), [103.0, 104.0, 105.0, 106.0])["total_s"] == 6.0


def test_several_failures_in_a_row_count_from_the_first() -> None:
    """A group that never trained has not recovered."""
    events = [event("recovered", 20.0), event("failure", 100.0, last_row=99.0), event("failure", 105.0)]
    assert recovery_parts(events, (0.0, 0.0), [110.0, 111.0, 112.0, 113.0])["total_s"] == 14.0


def test_workers_are_counted_on_nodes_that_are_up_and_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not on the dead, not on the drained.

    Where nodes have roles, on those with the right one, all of each: the reservations do not look at labels.
    """
    labels = {"here": "data", "other": "train"}
    nodes = [
        {
            "NodeID": name,
            "Alive": name != "dead",
            "Labels": {"role": labels.get(name, "train")},
            "Resources": {"CPU": 4.0},
        }
        for name in ("here", "other", "dead", "drained")
    ]
    monkeypatch.setattr(elastic.ray, "nodes", lambda: nodes)
    monkeypatch.setattr(ray_train, "_get_draining_nodes", lambda: {"drained": 0})
    reserved: Any = {name: {"CPU": 2.0} for name in ("here", "dead", "drained")}
    policy = SimpleNamespace(scaling_config=SimpleNamespace(label_selector=None))
    assert elastic.nodes_that_stay(policy, reserved) == {"here": {"CPU": 2.0}}
    policy.scaling_config.label_selector = {"role": "train"}
    assert elastic.nodes_that_stay(policy, reserved) == {"other": {"CPU": 4.0}}


@pytest.mark.parametrize("listening", [True, False])
def test_only_a_node_that_does_not_answer_is_waited_for(monkeypatch: pytest.MonkeyPatch, listening: bool) -> None:
    """A plain worker kill must not pay for nodes that might be gone."""
    with socket.socket() as raylet:
        raylet.bind(("127.0.0.1", 0))
        if listening:
            raylet.listen()
        node = {"NodeManagerAddress": "127.0.0.1", "NodeManagerPort": raylet.getsockname()[1], "NodeID": "n"}
        answers = iter([[node | {"Alive": True}], [node | {"Alive": False}]])
        asked: list[int] = []
        monkeypatch.setattr(elastic.ray, "nodes", lambda: asked.append(1) or next(answers))
        book = SimpleNamespace(get_reserved_resources=SimpleNamespace(remote=lambda *_, **__: None))
        monkeypatch.setattr(ray_data, "get_or_create_autoscaling_coordinator", lambda: book)
        monkeypatch.setattr(ray_data.ray, "get", lambda *_, **__: {})
        callback = LiveNodesPolicy("run", warm_pool.WarmPool(lambda: False))
        callback._requester = "train-x"
        callback.before_controller_execute_failure_decision(None)
    assert len(asked) == (1 if listening else 2)


@pytest.mark.parametrize(
    ("reserved", "warm", "counted"),
    [
        ({"a": 2, "b": 2, "c": 2}, [], 2),  # c has just joined
        ({"a": 2, "b": 2, "c": 2}, ["c"], 3),
        ({"a": 2, "c": 2}, [], 2),  # Ray has put c in b's place: no reason to shrink
        ({"a": 2}, [], 1),  # b is gone
        ({"a": 2, "b": 2, "c": 1}, [], 2),  # no worker fits on c
    ],
)
def test_a_node_that_joined_counts_once_it_is_warm(
    monkeypatch: pytest.MonkeyPatch, reserved: dict[str, int], warm: list[str], counted: int
) -> None:
    """A group on a and b; workers take 1.5 CPUs each."""
    monkeypatch.setattr(elastic.ray, "nodes", lambda: [{"NodeID": name} for name in "abc"])
    ready: Any = SimpleNamespace(is_warm=lambda node, number: node["NodeID"] in warm)
    policy = SimpleNamespace(
        scaling_config=SimpleNamespace(_resources_per_worker_not_none={"CPU": 1.5, "GPU": 0}),
        _count_possible_workers=lambda there: sum(node["CPU"] // 1.5 for node in there.values()),
    )
    workers = [SimpleNamespace(metadata=SimpleNamespace(node_id=name)) for name in "ab"]
    group = SimpleNamespace(workers=workers, num_workers=2)
    there = {name: {"CPU": float(cpus)} for name, cpus in reserved.items()}
    kept = LiveNodesPolicy("run", ready).in_use_or_warm(policy, group, there)
    assert policy._count_possible_workers(kept) == counted


def test_only_spares_that_are_missing_are_ordered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two stood ready; a group of one took one of them: none is missing then."""
    ordered = []
    monkeypatch.setattr(core, "prestart", lambda node, number, env, keep_s: ordered.append(number))
    callback = warm_pool.WarmPool(lambda: True)
    for workers in (2, 2, 1, 2):
        callback._fill({"NodeID": "node"}, workers)
    assert ordered == [2, 2, 0, 2]
    assert callback._ready == Counter(node=2)


def test_an_import_that_fails_ahead_ends_no_process(caplog: pytest.LogCaptureFixture) -> None:
    """Ray would end a process whose hook raises."""
    warm_pool._warm("raytrain_brats.no_such_module")
    assert "no_such_module" in caplog.text
