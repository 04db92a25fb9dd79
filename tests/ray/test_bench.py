"""`bench data` on tiny cases: what its file holds, and that all processes are counted."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from scripts import bench
from scripts.bench_pipelines.meter import Meter

BURN = "import time\nwhile time.process_time() < {}: pass\ntime.sleep({})"


def test_the_meter_counts_children_that_live_and_that_are_gone() -> None:
    """CPU time of a child that ended and of one that still runs is in, that of a process outside the tree is not."""
    orphan = f"{sys.executable} -c '{BURN.format(30, 0)}' >/dev/null 2>&1 & echo $!"
    outside = int(subprocess.run(["/bin/sh", "-c", orphan], capture_output=True, check=True).stdout)
    command = [sys.executable, "-c", BURN.format(1.2, 60)]
    with Meter() as meter, subprocess.Popen(command) as alive:
        begun = time.monotonic()
        subprocess.run([sys.executable, "-c", BURN.format(1.2, 0.3)], check=True)
        while sum(map(int, Path(f"/proc/{alive.pid}/stat").read_text().split()[13:15])) < 110:  # ticks of 10 ms
            assert alive.poll() is None
            time.sleep(0.1)
        time.sleep(0.5)
        ended = time.monotonic()
        alive.kill()
    os.kill(outside, signal.SIGKILL)
    assert meter.spent(begun, ended)["worker"] == pytest.approx(2.4, abs=0.8)
    assert meter.spent(begun, begun + 0.01).get("worker", 0) < 0.6
    assert meter.peak_mb()["driver"] > 10


def test_a_meter_left_at_once_has_looked_twice() -> None:
    """What takes no time costs next to nothing, and is no error: a busy machine starts the meter's process late."""
    with Meter() as meter:
        begun = time.monotonic()
    assert sum(meter.spent(begun, time.monotonic()).values()) < 1
    assert meter.peak_mb()["driver"] > 10


@pytest.mark.campaign
def test_the_file_of_a_tiny_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every pipeline has its rates, memory, disk and conditions; Ray's own processes are in the sum; what is not
    installed is named."""
    out = tmp_path / "bench.json"
    options = ["--cases", "3", "--grid", "32", "--patch", "16", "--patches", "16", "--warm", "4", "--rounds", "1"]
    options += ["--work", str(tmp_path / "work"), "--json", str(out), "--routes", "store"]
    assert bench.main(["data", *options, "--peers", "store_alone,raw_alone,monai_dataset,mosaic"]) == 0
    found = json.loads(out.read_text())

    assert found["settings"]["malloc"] == "default" or isinstance(found["settings"]["malloc"], dict)
    assert found["machine"]["cpus"] >= 1
    names = {"store", "store_alone", "raw_alone", "monai_dataset"} | ({"mosaic"} - found["skipped"].keys())
    assert set(found["pipelines"]) == names
    for row in found["pipelines"].values():
        (run,) = row["runs"]
        assert run["patches"] >= 16
        assert run["wall_s"] >= 0.5 and row["patches_per_s"] > 0  # also where 16 patches lay ready
        assert row["patches_per_cpu_s"] == pytest.approx(
            run["patches"] / max(1e-3, sum(run["cpu_s"].values())), rel=0.01
        )
        assert row["peak_mb"] > 100
        assert row["disk_bytes"] > 1000
        assert {"augmentation", "cache", "output"} <= row.keys()
    ours = found["pipelines"]["store"]["runs"][0]
    ours_too = {"raylet", "gcs_server", "SplitCoordinator", "RayTrainWorker", "driver"}  # a task is too short to be met
    assert ours_too <= ours["peak_mb"].keys() | ours["cpu_s"].keys()  # none need be there when memory is at its peak
    assert "patches per CPU s" in capsys.readouterr().out


@pytest.mark.campaign
def test_what_a_case_costs_to_prepare(tmp_path: Path) -> None:
    """All copies are prepared, each counts, and further cases cost less than the first, which bear Ray's start."""
    out = tmp_path / "prepare.json"
    small = ["--cases", "2", "--copies", "8", "--grid", "32"]
    assert bench.main(["prepare", *small, "--work", str(tmp_path / "work"), "--json", str(out)]) == 0
    found = json.loads(out.read_text())
    assert 0 < found["cpu_s_per_further_case_in_all"] < sum(found["cpu_s_of_a_quarter"].values()) / 4
    assert found["store_over_nii_gz"] == pytest.approx(found["store_bytes"] / found["nii_gz_bytes"], abs=0.01)
    assert found["cpu_s_of_all"]["Map"] > 0


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["data", "--peers", "monia"], "--peers monia: not known; there are raw_alone"),
        (["stream", "--workers", "8,x"], "--workers 'x': write numbers of ranks"),
        (["stream", "--workers", "0"], "--workers '0': write numbers of ranks"),
        (["stream", "--routes", "rwa"], "--routes rwa: not known; there are raw, store"),
        (["scale", "--cases", "1"], "--cases 1: 2 at least"),
        (["speed"], "benchmark 'speed' is not known; there are data, stream, step, augment, scale, prepare"),
    ],
)
def test_mistakes_are_told(arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit 2 and one line."""
    assert bench.main(arguments) == 2
    assert told in capsys.readouterr().err
