"""The watcher of a spot machine on a real Ray: the runs that train here are asked to save."""

import json
import os

import pytest
import ray

from raytrain_brats import spot
from raytrain_brats.ray_ext.internals import core
from raytrain_brats.run import checkpoint_request, heartbeat
from raytrain_brats.spot import Notice


def test_the_runs_on_this_machine_are_asked_to_save(monkeypatch: pytest.MonkeyPatch) -> None:
    """By what their ranks tell the cluster: those that train here and are alive, each run once."""
    asked: list[str] = []
    monkeypatch.setattr(
        checkpoint_request,
        "request",
        lambda run_dir, what: asked.append(run_dir) is None and what == checkpoint_request.SAVE,
    )
    try:
        context = ray.init(address="local", num_cpus=1, include_dashboard=False)
        monkeypatch.setenv("RAY_ADDRESS", context.address_info["gcs_address"])
        with pytest.raises(SystemExit, match="1"):
            spot.save(Notice("", 0))
        about = {
            "node": ray.get_runtime_context().get_node_id(),
            "phase": "data",
            "pid": os.getpid(),
            "run_dir": "here",
        }
        others = ({"node": "0"}, {"phase": "end"}, {"pid": 2**22 + 1})
        rows = [about, about, *(about | other | {"run_dir": "other"} for other in others)]
        for number, each in enumerate(rows):
            core.kv_put(f"{heartbeat.PREFIX}run/{number}", json.dumps(each).encode())
        core.kv_put("reservations/x", b"another key of ours")
        with pytest.raises(SystemExit, match="0"):
            spot.save(Notice("", 0))
    finally:
        ray.shutdown()
    assert asked == ["here"]
