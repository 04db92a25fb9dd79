"""The driver's part: it ends when it is told to, whatever Ray's threads do."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray import cloudpickle

from raytrain_brats import config
from raytrain_brats.data import stream
from raytrain_brats.data.manifest import Case, Manifest
from raytrain_brats.data.store import Source
from raytrain_brats.data.turns import StreamSpec
from raytrain_brats.ray_ext import cluster
from raytrain_brats.ray_ext.cluster import Resources
from raytrain_brats.ray_ext.process_group import ProcessGroup
from raytrain_brats.run import driver
from raytrain_brats.run.spec import RunSpec, sampler_of

NEEDED = Resources(1, 1, 1.0, 0, 1.0, None, 1, 1 << 28)


@pytest.fixture
def one_ray_here() -> Iterator[None]:
    cluster.connect()
    yield
    ray.shutdown()


def spec_of(cases: int, run_dir: str) -> RunSpec:
    """Of a set of so many cases, a fifth of them held out; its files do not exist."""
    images = tuple(f"imagesTr/{kind}" for kind in ("flair", "t1", "t1ce", "t2"))
    found = tuple(
        Case(f"BraTS-{n}", f"s{n}", images, "label", 1 << 20, f"{n:064d}", n % 5, versions=("9:9",) * 5)
        for n in range(cases)
    )
    settings, manifest = config.load("demo"), Manifest("/nowhere", "msd", "msd", found)
    train, held_out = manifest.split(0)
    sampler, source = sampler_of(settings, len(train)), Source("/nowhere", "msd", 1.0)
    return RunSpec(settings, run_dir, "raw", source, train, held_out, sampler, "identity", manifest)


def test_ctrl_c_ends_a_driver_whose_call_of_ray_never_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stuck, shut = threading.Event(), []
    monkeypatch.setattr(driver, "_trainer", lambda *_, **__: SimpleNamespace(fit=stuck.wait))
    monkeypatch.setattr(driver.elastic, "free_reservations", lambda _: None)
    monkeypatch.setattr(driver.roles, "part", lambda _: SimpleNamespace(selector={}))
    monkeypatch.setattr(driver.roles, "keep_apart", lambda *_: None)
    monkeypatch.setattr(driver.checkpoint_request, "request", lambda *_: True)
    monkeypatch.setattr(driver.ray, "shutdown", lambda: shut.append(True))
    monkeypatch.setattr(driver, "SHUTDOWN_S", 0.1)
    spec: Any = SimpleNamespace(run_dir=str(tmp_path), source=Source(str(tmp_path), "msd", 1.0))
    lease: Any = SimpleNamespace(token="t", lost="")
    threading.Timer(1, os.kill, [os.getpid(), signal.SIGINT]).start()
    free = threading.Timer(60, stuck.set)  # so that a driver that waits for ever fails the test and not the suite
    free.daemon = True
    free.start()
    with pytest.raises(KeyboardInterrupt):
        driver._fit(spec, NEEDED, lease, "run")
    assert shut and not stuck.is_set()
    free.cancel()
    stuck.set()


def test_no_call_after_the_end_starts_a_ray_of_its_own() -> None:
    """The thread in `trainer.fit` outlives `ray.shutdown`; its next call of Ray must fail, not begin a new cluster."""
    script = """
import ray
from raytrain_brats.ray_ext import cluster
cluster.connect()
ray.shutdown()
try:
    ray.put(1)
except Exception as error:
    print("refused:", error)
print("initialized:", ray.is_initialized())
"""
    environment = os.environ | {"RAY_ADDRESS": "local"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=300)
    assert "Ray has not been started yet" in done.stdout, done.stdout + done.stderr
    assert "initialized: False" in done.stdout


def test_what_every_rank_is_sent_does_not_grow_with_the_cases(one_ray_here: None, tmp_path: Path) -> None:
    """Of 20,000 cases a rank gets those it validates on, once by reference; messages to ranks, controller and stream
    hold none."""
    sizes = []
    for cases in (200, 20_000):
        spec = spec_of(cases, str(tmp_path))
        trainer = driver._trainer(spec, NEEDED, "token", "run")
        sent = [trainer.train_run_context, trainer._get_train_func(), trainer.datasets, trainer.run_config.callbacks]
        factory = trainer.datasets["train-0"]
        streamed = stream.dataset(
            StreamSpec(spec.sampler, spec.train_cases, spec.source, spec.patch_spec, 0, 1 << 28), 1.0
        )
        sizes.append([len(cloudpickle.dumps(part)) for part in (*sent, spec.for_ranks(), streamed)])
        assert len(ray.get(factory.spec).train_cases) == 0.8 * cases
        (held,) = {value for name, value in trainer.train_loop_config.items() if name == "spec"}
        assert ray.get(held).held_out_cases == spec.held_out_cases[: spec.config.validate_.max_cases]
    for small, large in zip(*(found[:-1] for found in sizes), strict=True):
        assert large <= small + 200
    assert sizes[1][-1] < 100_000  # Ray Data keeps a few words of each read task of the first execution
    assert len(cloudpickle.dumps(spec)) > 2_000_000


def test_workers_that_do_not_leave_their_process_group_are_told(
    one_ray_here: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As Ray's own backend does: what a worker raised is raised, and who hangs is left after Ray's variable says so."""

    @ray.remote(num_cpus=0, max_retries=0)
    def leave(hangs: bool) -> None:
        if hangs:
            time.sleep(300)
        raise RuntimeError("NCCL error")

    class Group(list[Any]):
        def execute_async(self, *_: Any) -> list[Any]:
            return list(self)

    caplog.set_level("WARNING")  # Ray's start has quieted pytest's handler
    backend, config_ = ProcessGroup().backend_cls(), ProcessGroup()
    with pytest.raises(RuntimeError, match="NCCL error"):
        backend.on_shutdown(Group([leave.remote(False)]), config_)
    monkeypatch.setenv("TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S", "1")
    began, hangs = time.monotonic(), leave.remote(True)
    backend.on_shutdown(Group([hangs, ray.put(None)]), config_)
    assert time.monotonic() - began < 20
    assert "did not leave their process group within 1 s" in caplog.text
    ray.cancel(hangs, force=True)


def test_driver_and_controller_do_without_torch() -> None:
    """What they import, and what Ray Train unpickles in its controller, brings neither torch nor MONAI; SciPy, which
    makes phantoms, comes where they are made."""
    script = """
import sys
from ray import cloudpickle
import raytrain_brats.run.controller
import raytrain_brats.train
from raytrain_brats.ray_ext.process_group import ProcessGroup
backend = cloudpickle.loads(cloudpickle.dumps(ProcessGroup()))
backend.backend_cls()
print(sorted({"torch", "monai", "scipy.interpolate"} & sys.modules.keys()))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300, check=True)
    assert done.stdout == "[]\n"


def test_a_cluster_of_our_own_has_only_the_processes_it_needs() -> None:
    """No autoscaler, API server, log monitor, statistics of Ray Data or cleaner of placement groups: 0.4 GB.

    Another cluster that the process starts later, without us, has them.
    """
    script = """
import subprocess, sys
import ray
from raytrain_brats.ray_ext import cluster
cluster.connect()
assert cluster.started_here()
rows = ray.data.from_items([1, 2, 3]).map(lambda row: row).iter_rows()
assert sorted(row["item"] for row in rows) == [1, 2, 3]
print(subprocess.run(["ps", "-eo", "args"], env={"COLUMNS": "2000"}, capture_output=True, text=True).stdout)
named = ray.util.list_named_actors(all_namespaces=True)
print("statistics:", len([actor for actor in named if actor["name"] == "datasets_stats_actor"]))
from raytrain_brats.ray_ext.internals.train import LocalTrainer
made = LocalTrainer(print)._create_default_callbacks()
print("callbacks:", [type(one).__name__ for one in made])
print("later:", ray._private.node.Node.start_api_server.__name__, ray._private.node.Node.start_log_monitor.__name__)
print("session:", ray._private.worker._global_node.get_session_dir_path())
"""
    environment = os.environ | {"RAY_ADDRESS": "local"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    lines, _, session = done.stdout.partition("session: ")
    ours = [line for line in lines.splitlines() if session.strip() in line]
    assert any("raylet/raylet" in line for line in ours)
    assert not [line for line in ours if re.search(r"monitor\.py|dashboard/dashboard\.py", line)]
    assert "\nstatistics: 0\n" in lines  # the list of processes has this script's own text in it
    assert "\nlater: start_api_server start_log_monitor\n" in lines
    assert "DatasetsCallback" in lines
    assert "PlacementGroupCleanerCallback" not in lines
