"""Failures that would come again at every start end the run at once, with advice."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from raytrain_brats import books, config
from raytrain_brats.run import control, journal
from raytrain_brats.run.controller import FailureLogger
from raytrain_brats.run.final_failures import advice
from tests.support import ROOT

TOO_SMALL = torch.cuda.OutOfMemoryError(
    "CUDA out of memory. Tried to allocate 1.50 GiB. GPU 0 has a total of 15.77 GiB"
)
NOT_BUILT = torch.AcceleratorError("CUDA error: no kernel image is available for execution on the device")
OTHER = [
    RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [10.0.0.7]:1234"),
    MemoryError("cannot allocate"),
    torch.AcceleratorError("CUDA error: unspecified launch failure"),
    RuntimeError("NCCL error: unhandled system error"),
]
SETTINGS = config.load("segresnet", ("train.micro_batch=1",))


@pytest.mark.parametrize("error", OTHER, ids=str)
def test_other_failures_may_start_again(error: Exception) -> None:
    assert advice(error, SETTINGS, trained_before=False) == ""


def test_advice_names_what_this_run_can_change() -> None:
    """In one line: the micro batch where it is more than one, which keeps the run; then what needs a new one."""
    four = config.parse({"network": {"name": "dynunet"}, "train": {"micro_batch": 4, "amp": False}}, "test")
    for error in (TOO_SMALL, RuntimeError("CUDA error: out of memory\nCompile with ...")):
        told = advice(error, four, trained_before=False)
        assert "lower train.micro_batch (now 4)" in told and "train.amp: true" in told
        assert "data.patch_xyz" in told and "network.filters" in told and "\n" not in told
    assert "micro_batch" not in advice(TOO_SMALL, SETTINGS, trained_before=False)
    assert "lower train.micro_batch (now auto" in advice(TOO_SMALL, config.load("segresnet"), trained_before=False)
    assert "network.init_filters" in advice(TOO_SMALL, SETTINGS, trained_before=False)
    told = advice(NOT_BUILT, SETTINGS, trained_before=True)
    assert "no code for the GPU" in told and "check_gpus" in told


def failed(run_dir: str, errors: dict[int, Exception]) -> control.GroupStatus:
    """The status of a group after it began and its workers raised."""
    number = journal.begin_generation(run_dir, "me").number
    FailureLogger(run_dir, "me", SETTINGS).after_exception(None, errors)
    return control.status(run_dir, number)


def test_the_rank_with_the_cause_is_named(tmp_path: Path) -> None:
    """Not the lowest one, which lost its connection to it."""
    journal.take_over(str(tmp_path), "me")
    status = failed(str(tmp_path), {0: OTHER[0], 2: TOO_SMALL, 3: OTHER[0]})
    assert status.stopped.startswith("rank 2: the GPU's memory is too small") and "out of memory" in status.failure
    (event,) = [e for e in books.read_events(str(tmp_path)) if e["event"] == "failure"]
    assert event["rank"] == 2


def test_memory_that_was_enough_before_may_be_enough_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that has trained: a worker that was killed may hold its memory for a while. Once; a second failure at the
    same place ends the run. A missing kernel ends it at once."""
    begun = control.Generation(2, samples_seen=64, driver="me")
    monkeypatch.setattr(control, "current", lambda _: begun)
    logger = FailureLogger(str(tmp_path), "me", SETTINGS)
    logger.after_exception(None, {0: TOO_SMALL})
    assert control.status(str(tmp_path), 2).failure and not control.status(str(tmp_path), 2).stopped
    begun = replace(begun, number=3, failures_in_place=1)
    logger.after_exception(None, {0: TOO_SMALL})
    assert "memory is too small" in control.status(str(tmp_path), 3).stopped
    begun = replace(begun, number=4, failures_in_place=0)
    logger.after_exception(None, {0: NOT_BUILT})
    assert "no code for the GPU" in control.status(str(tmp_path), 4).stopped
    begun = replace(begun, number=5, samples_seen=0)
    control.note(str(tmp_path), 5, committed=True)
    logger.after_exception(None, {0: TOO_SMALL})
    assert not control.status(str(tmp_path), 5).stopped


RUN = """
import sys, traceback
from types import SimpleNamespace
import ray
from raytrain_brats.errors import RunFailed
from raytrain_brats.ray_ext import cluster
from raytrain_brats.run import driver
from tests.ray.test_driver import NEEDED, spec_of

def work(arguments):
    import ray.train, torch
    if ray.train.get_context().get_world_rank() == 1:
        raise eval(sys_argv_1)

def main():
    cluster.connect(4)
    spec = spec_of(10, sys.argv[2])
    lease = SimpleNamespace(token="t", lost="", trouble="")
    try:
        driver.train(spec, NEEDED.__class__(2, 2, 1.0, 0, 1.0, None, 1, 1 << 28), lease)
    except RunFailed as error:
        print("failed:", error)
    ray.shutdown()

sys_argv_1 = sys.argv[1]
driver._work = work
main()
"""


@pytest.mark.campaign
@pytest.mark.parametrize(("error", "told"), [
    ('torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.50 GiB")', "memory is too small"),
    ('torch.AcceleratorError("CUDA error: no kernel image is available for execution on the device")', "no code for"),
])  # fmt: skip
def test_through_ray_one_group_is_all_that_starts(tmp_path: Path, error: str, told: str) -> None:
    """The exception as it comes from a worker by Ray Train to its controller: one group, one line, no other try."""
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"} | {"PYTHONPATH": str(ROOT)}
    done: Any = subprocess.run(
        [sys.executable, "-c", RUN, error, str(tmp_path / "run")],
        env=environment, cwd=ROOT, capture_output=True, text=True, timeout=400, check=False,
    )  # fmt: skip
    assert f"failed: rank 1: {'the GPU' if 'memory' in told else 'this torch'}" in done.stdout, (
        done.stdout + done.stderr
    )
    assert told in done.stdout and "Traceback" not in done.stdout
    events = books.read_events(str(tmp_path / "run"))
    assert [e["rank"] for e in events if e["event"] == "failure"] == [1]
    assert sum(e["event"] == "group" for e in events) == 1
