"""The driver's part: it ends when it is told to, whatever Ray's threads do."""

import os
import signal
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from raytrain_brats.run import launch
from raytrain_brats.run.cluster import Resources


def test_ctrl_c_ends_a_driver_whose_call_of_ray_never_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stuck, shut = threading.Event(), []
    monkeypatch.setattr(launch, "TorchTrainer", lambda *_, **__: SimpleNamespace(fit=stuck.wait))
    monkeypatch.setattr(launch.recovery, "free_reservations", lambda _: None)
    monkeypatch.setattr(launch.roles, "part", lambda _: SimpleNamespace(selector={}))
    monkeypatch.setattr(launch.roles, "keep_apart", lambda _: None)
    monkeypatch.setattr(launch.saving, "ask", lambda *_: True)
    monkeypatch.setattr(launch.ray, "shutdown", lambda: shut.append(True))
    monkeypatch.setattr(launch, "LAST_WORDS_S", 0.1)
    job: Any = SimpleNamespace(
        run_dir=str(tmp_path), config=SimpleNamespace(run=SimpleNamespace(resize_check_s=2.0)), train_cases=()
    )
    lease: Any = SimpleNamespace(token="t", lost="")
    threading.Timer(1, os.kill, [os.getpid(), signal.SIGINT]).start()
    free = threading.Timer(20, stuck.set)  # so that a driver that waits for ever fails the test and not the suite
    free.daemon = True
    free.start()
    with pytest.raises(KeyboardInterrupt):
        launch._fit(job, Resources(1, 1, 1.0, 0, 1.0, None), lease, "run")
    assert shut and not stuck.is_set()
    free.cancel()
    stuck.set()
