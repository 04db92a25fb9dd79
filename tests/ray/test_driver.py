"""The driver's part: it ends when it is told to, whatever Ray's threads do."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from raytrain_brats.ray_ext.cluster import Resources
from raytrain_brats.run import driver


def test_ctrl_c_ends_a_driver_whose_call_of_ray_never_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stuck, shut = threading.Event(), []
    monkeypatch.setattr(driver, "TorchTrainer", lambda *_, **__: SimpleNamespace(fit=stuck.wait))
    monkeypatch.setattr(driver.elastic, "free_reservations", lambda _: None)
    monkeypatch.setattr(driver.roles, "part", lambda _: SimpleNamespace(selector={}))
    monkeypatch.setattr(driver.roles, "keep_apart", lambda _: None)
    monkeypatch.setattr(driver.checkpoint_request, "request", lambda *_: True)
    monkeypatch.setattr(driver.ray, "shutdown", lambda: shut.append(True))
    monkeypatch.setattr(driver, "SHUTDOWN_S", 0.1)
    spec: Any = SimpleNamespace(
        run_dir=str(tmp_path), config=SimpleNamespace(run=SimpleNamespace(resize_check_s=2.0)), train_cases=()
    )
    lease: Any = SimpleNamespace(token="t", lost="")
    threading.Timer(1, os.kill, [os.getpid(), signal.SIGINT]).start()
    free = threading.Timer(60, stuck.set)  # so that a driver that waits for ever fails the test and not the suite
    free.daemon = True
    free.start()
    with pytest.raises(KeyboardInterrupt):
        driver._fit(spec, Resources(1, 1, 1.0, 0, 1.0, None, 1, 1 << 30), lease, "run")
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
