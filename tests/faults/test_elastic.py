"""The promise, kept: kill what you like, come back with as many workers as you like, get the same run.

Real Ray clusters, real SIGKILLs. Every process tree here is started by the test and killed by its own pid.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from raytrain_brats import books, config, verify
from raytrain_brats.run import checkpoint, spec
from raytrain_brats.synthetic.phantom import write_set
from tests.support.clusters import train_alone

# Small enough for seconds, long enough to be killed in the middle; SGD, as AdamW magnifies the last bits.
RECIPE = """
network: {name: dynunet, filters: [8, 16, 16]}
preprocess: {spacing_mm: 7.5}
data: {patch_xyz: [16, 16, 16], patches_per_case: 3}
train:
  epochs: 20
  global_batch: 4
  optimiser: {name: sgd, learning_rate: 0.001}
validate: {every_samples: 150, max_cases: 2}
checkpoint: {every_samples: 24}
run: {cpus_per_worker: 0.25, cpus_per_task: 0.5}
"""


def recipe(run_dir: Path) -> str:
    file = run_dir.parent / "recipe.yaml"
    file.write_text(RECIPE)
    return str(file)


def command(run_dir: Path, data: Path, workers: str) -> list[str]:
    arguments = ["--data", str(data), "--run-dir", str(run_dir), "--recipe", recipe(run_dir), "--workers", workers]
    return [sys.executable, "-m", "raytrain_brats.train", *arguments]


def environment() -> dict[str, str]:
    return os.environ | {"RAY_ADDRESS": "local", "PYTHONUNBUFFERED": "1"}


def wait_until(run_dir: Path, samples: int, generation: int, process: subprocess.Popen[bytes]) -> None:
    """Until the run has applied so many samples in a worker group of that number."""
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline:
        rows = books.read_rows(str(run_dir))
        if rows and rows[-1]["samples_seen"] >= samples and rows[-1]["generation"] >= generation:
            return
        assert process.poll() is None, f"the driver ended early; see {run_dir}/driver.log"
        time.sleep(0.05)
    pytest.fail(f"{samples} samples in generation {generation} were not reached")


def final_weights(run_dir: Path) -> dict[str, torch.Tensor]:
    found, damaged = checkpoint.newest_valid(str(run_dir))
    assert found is not None
    assert not damaged
    return checkpoint.load(str(run_dir), found.name)[0]


@pytest.mark.usefixtures("ray_place")
def test_a_run_killed_twice_and_resized_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    """SIGKILL a worker, then the driver, then go on with three workers: the same rows, the same weights."""
    data = tmp_path / "data"
    write_set(str(data), cases=7, seed=3, grid=32, anatomy="procedural")
    calm, rough = tmp_path / "calm", tmp_path / "rough"

    calm.mkdir()
    rough.mkdir()
    alone = spec.build(config.load(recipe(rough)), str(calm), str(data), "")
    spec.write_config(alone)
    train_alone(alone)  # one worker, without Ray

    with open(rough / "driver.log", "wb") as log:
        driver = subprocess.Popen(command(rough, data, "1:2"), env=environment(), stdout=log, stderr=log)
        wait_until(rough, 40, 1, driver)
        worker = [e for e in books.read_events(str(rough)) if e["event"] == "worker"][-1]
        os.kill(worker["pid"], signal.SIGKILL)
        wait_until(rough, 100, 2, driver)  # workers outlive it by some steps, and some must be left
        driver.kill()
        driver.wait()
    done = subprocess.run(command(rough, data, "3"), env=environment(), capture_output=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr.decode()[-2000:]

    expected, found = books.read_rows(str(calm)), books.read_rows(str(rough))
    total = 308  # 5 cases x 3 patches x 20 epochs = 300 samples, and 8 empty places at begin and end
    assert [row["positions"] for row in expected] == [[p, p + 4] for p in range(0, total, 4)]
    assert [row["positions"] for row in found] == [row["positions"] for row in expected]
    assert [row["step"] for row in found] == list(range(total // 4))
    assert {row["world_size"] for row in found} == {2, 3}
    assert len({row["generation"] for row in found}) == 3
    assert [row["loss"] for row in found] == pytest.approx([row["loss"] for row in expected], rel=1e-5)
    reference, weights = final_weights(calm), final_weights(rough)
    assert reference.keys() == weights.keys()
    apart = max(
        float((reference[name] - weights[name]).abs().max()) for name in reference if name.startswith("network/")
    )
    assert apart < 1e-5, f"weights differ by {apart}"
    for run in (calm, rough):
        assert verify.main(["--run-dir", str(run)]) == 0
    events = books.read_events(str(rough))
    assert [e["event"] for e in events].count("launch") == 2
    assert sum(e["redone_steps"] for e in events if e["event"] == "group") <= 2 * (24 / 4 + 1)
