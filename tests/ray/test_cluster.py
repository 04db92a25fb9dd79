"""Several machines: a second Ray node in a mount namespace of its own, so that it really sees other folders."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from raytrain_brats import books, verify
from raytrain_brats.monitoring import cost
from raytrain_brats.run import checkpoint, gauges
from raytrain_brats.synthetic.phantom import write_set
from tests.support.clusters import SMALL, Cluster, ElasticRun, free_port
from tests.support.dashboard import asked


@pytest.fixture(scope="module")
def shared() -> Iterator[Cluster]:
    """One cluster for the tests of every day: the first of them is alone on it with a node, the next adds another."""
    with tempfile.TemporaryDirectory(prefix="rb", dir="/tmp", ignore_cleanup_errors=True) as folder:
        started = Cluster(Path(folder))
        yield started
        started.close()


def test_a_node_that_joins_is_used_and_no_step_is_lost(shared: Cluster) -> None:
    """The run begins with the one worker that fits, saves before it grows, and goes on with two from that very step."""
    run = ElasticRun(shared)
    run.rows_until(1, after=0)
    shared.add()
    run.rows_until(2, after=1)
    run.interrupt()

    rows = books.read_rows(run.folder)
    assert [row["world_size"] for row in rows] == sorted(row["world_size"] for row in rows)
    assert run.events("resize")[0]["saved"]
    assert [e["redone_steps"] for e in run.events("group")] == [0, 0]
    # Ctrl-C saved as well: what is on record is what the next start goes on from
    assert checkpoint.newest_valid(run.folder)[0].samples_seen == rows[-1]["samples_seen"]
    assert verify.main(["--run-dir", run.folder]) == 0


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("unshare"), reason="a mount namespace needs root")
def test_a_run_folder_that_another_node_does_not_see_is_refused(shared: Cluster) -> None:
    """`train` on two machines with a folder of the first one's own: exit 2, the folder and the remedy named."""
    place = shared.place
    hidden, data = place / "hidden", place / "few"
    hidden.mkdir()
    write_set(str(data), cases=6, seed=0, grid=32, anatomy="procedural")
    shared.add(before=f"mount -t tmpfs none {hidden}")
    code = shared.train("--data", data, "--run-dir", hidden, *(f"--set={value}" for value in SMALL)).wait(600)

    said = (place / "train.log").read_text()
    assert code == 2, said[-2000:]
    assert f"error: run folder {hidden} is not seen by node" in said
    assert "s3://" in said


@pytest.mark.campaign
def test_an_object_store_that_is_too_small_slows_the_run_and_does_not_end_it(place: Path) -> None:
    """80 MB of shared memory for patches of 2 MB, two workers and all that is prefetched."""
    cluster = Cluster(place, head="--num-cpus=2 --object-store-memory=80000000")
    try:
        run = ElasticRun(cluster, "2", "run.cpus_per_worker=0.5", "data.patch_xyz=[64, 64, 64]", "run.prefetch=16")
        run.rows_until(2, after=0)
        run.interrupt()
        assert verify.main(["--run-dir", run.folder]) == 0
        assert not run.events("failure")
    finally:
        cluster.close()


def test_machines_of_a_cluster_read_for_the_driver(shared: Cluster) -> None:
    """Checksums of a large set: data tasks on the other machines, or nothing at all without a cluster of several."""
    script = """
import os, sys
from raytrain_brats.cases import scan
from raytrain_brats.ray_ext import cluster
from raytrain_brats.run import spec
from raytrain_brats.config import load
scan.SPREAD_BYTES = 1
spread, used = cluster.spread, []
def seen(function, rows, folder):
    found = spread(function, rows, folder)
    used.append(found is not None)
    return found
cluster.spread = seen
manifest, _ = spec.open_cases(load("demo"), sys.argv[1])
print(manifest == scan.open_manifest(sys.argv[1]), used)
"""
    data = shared.place / "to_read"
    write_set(str(data), cases=6, seed=0, grid=32, anatomy="procedural")
    if not shared.nodes:
        shared.add()
    environment = shared.environment | {"RAY_ADDRESS": f"127.0.0.1:{shared.port}"}
    command = [sys.executable, "-c", script, str(data)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.stdout.endswith("True [True]\n"), done.stdout + done.stderr
    alone = shared.environment | {"RAY_ADDRESS": "local"}
    done = subprocess.run(command, env=alone, capture_output=True, text=True, timeout=300)
    assert done.stdout.endswith("True [False]\n"), done.stdout + done.stderr


@pytest.mark.campaign
def test_the_doctor_looks_at_every_machine(shared: Cluster) -> None:
    """Each node tells its versions, limits and clock; then what workers and data tasks would get."""
    if not shared.nodes:
        shared.add()
    environment = shared.environment | {"RAY_ADDRESS": f"127.0.0.1:{shared.port}"}
    command = [sys.executable, "-m", "raytrain_brats.doctor", "--run-dir", str(shared.place)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    nodes = 1 + len(shared.nodes)
    for about in (": Python 3.", "/dev/shm has", "open files allowed", ": clock "):
        assert done.stdout.count(about) == nodes, done.stdout + done.stderr
    assert "clock" not in "".join(line for line in done.stdout.splitlines() if line.startswith("wrong"))
    assert re.search(r"^ok +cluster: 1 to \d+ workers", done.stdout, re.M), done.stdout + done.stderr
    assert done.returncode == int("wrong " in done.stdout)


@pytest.mark.campaign
@pytest.mark.parametrize("allowed", ["auto", "false"])
def test_data_tasks_use_cpus_that_workers_leave_of_training_nodes(place: Path, allowed: str) -> None:
    """With a local folder they run on the training node, beside a worker of 1.5 of its 2 CPUs; not if it is forbidden.
    The group grows all the same when a node joins, whose CPUs data tasks take first."""
    cluster = Cluster(place, head="--num-cpus=0 --labels role=head")
    try:
        data = cluster.add(options="--num-cpus=1 --labels role=data")
        train = cluster.add(options="--num-cpus=2 --labels role=train")
        run = ElasticRun(cluster, "1:2", f"run.data_on_train_nodes={allowed}", "run.data_tasks=2")
        run.rows_until(1, after=0)
        assert cluster.where("ray::RayTrainWorker") == {train}
        seen = _seen(cluster, "ray::ReadCases")
        assert seen == {data} if allowed == "false" else train in seen
        if allowed == "auto":
            joined = cluster.add(options="--num-cpus=2 --labels role=train")
            run.rows_until(2, after=1)
            assert cluster.where("ray::RayTrainWorker") == {train, joined}
            assert run.events("resize")[0]["saved"]
        run.interrupt()
        assert verify.main(["--run-dir", run.folder]) == 0
        assert not run.events("failure")
    finally:
        cluster.close()


@pytest.mark.campaign
def test_nodes_do_what_their_labels_say(place: Path) -> None:
    """The only worker waits for no data node's CPUs, data tasks for no training node's; both kinds may join later."""
    cluster = Cluster(place, head="--num-cpus=0 --labels role=head")
    try:
        data = cluster.add(options="--num-cpus=2 --labels role=data")
        train = cluster.add(options="--num-cpus=2 --labels role=train")
        run = ElasticRun(cluster, "1:2", "run.data_on_train_nodes=false")
        run.rows_until(1, after=0)
        assert cluster.where("ray::RayTrainWorker") == {train}
        assert _seen(cluster, "ray::ReadCases") == {data}
        trains, reads = (cluster.add(options=f"--num-cpus=2 --labels role={role}") for role in ("train", "data"))
        run.rows_until(2, after=1)
        assert cluster.where("ray::RayTrainWorker") == {train, trains}
        assert _seen(cluster, "ray::ReadCases") == {data, reads}
        assert run.events("resize")[0]["saved"]
        run.interrupt()
        assert verify.main(["--run-dir", run.folder]) == 0
    finally:
        cluster.close()


@pytest.mark.campaign
def test_work_that_waits_is_what_brings_nodes(place: Path) -> None:
    """From a head alone: Ray's own autoscaler, asked what it would launch, wants training nodes for the workers, then a
    data node for the tasks that wait; never more than the YAML allows, nor GPUs for want of CPUs."""
    resources = {"head": {"CPU": 0}, "data": {"CPU": 2}, "train": {"CPU": 2}, "dear": {"CPU": 64, "GPU": 8}}
    kinds = {
        name: {"labels": {"role": name}, "resources": amounts, "max_workers": 2 if name != "head" else 0}
        for name, amounts in resources.items()
    }
    (place / "ray_bootstrap_config.yaml").write_text(yaml.safe_dump({"available_node_types": kinds}))
    cluster = Cluster(place, head="--num-cpus=0 --labels role=head", HOME=str(place), RAY_enable_autoscaler_v2="1")
    try:
        run = ElasticRun(cluster)
        _until(cluster, kinds, {"train": 2})
        cluster.add(options="--num-cpus=2 --labels role=train")
        _until(cluster, kinds, {"train": 1, "data": 1})
        cluster.add(options="--num-cpus=2 --labels role=data")
        run.rows_until(1, after=0)
        cluster.add(options="--num-cpus=2 --labels role=train")
        run.rows_until(2, after=1)
        for _ in range(20):
            assert cluster.would_launch(kinds) in ({}, {"data": 1})
            time.sleep(1)
        run.interrupt()
        _until(cluster, kinds, {})
        assert verify.main(["--run-dir", run.folder]) == 0
    finally:
        cluster.close()


def _until(cluster: Cluster, kinds: dict[str, Any], wanted: dict[str, int]) -> None:
    until, found = time.monotonic() + 120, None
    while found != wanted:
        assert time.monotonic() < until, f"Ray would launch {found}, not {wanted}"
        time.sleep(1)
        found = cluster.would_launch(kinds)


def _seen(cluster: Cluster, task: str) -> set[str]:
    """Nodes on which a task is seen at work within some seconds."""
    seen: set[str] = set()
    until = time.monotonic() + 20
    while time.monotonic() < until:
        seen |= cluster.where(task)
        time.sleep(0.05)
    return seen


@pytest.mark.campaign
def test_prometheus_is_told_of_a_live_run(place: Path) -> None:
    """Scrape the node's port as Prometheus does: all that the dashboard asks for is there, with the run's numbers."""
    port = free_port()
    cluster = Cluster(
        place, head=f"--num-cpus=2 --metrics-export-port={port} --labels role=head", **{cost.PRICES: "head=3.5"}
    )
    try:
        run = ElasticRun(cluster, "1", "validate.every_samples=200", "validate.max_cases=1")
        run.rows_until(1, after=0, rows=100)
        found: dict[str, float] = {}
        until = time.monotonic() + 90
        # The first figures are from before the first step
        while time.monotonic() < until and (asked() - found.keys() or not found["ray_raytrain_brats_goodput"]):
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
                lines = re.findall(r"^(ray_raytrain_brats_\w+)\{(.*)\} (\S+)$", answer.read().decode(), re.MULTILINE)
            assert all(f'run="{run.folder}"' in tags for _, tags, _ in lines)
            found |= {name: float(value) for name, _, value in lines}
            time.sleep(2)
        assert asked() <= found.keys()
        told = {name: found[f"ray_raytrain_brats_{name}"] for name in gauges.NAMES}
        assert (told["world_size"], told["dollars_per_hour"], told["recoveries"], told["quarantined"]) == (1, 3.5, 1, 0)
        assert 0 < told["goodput"] < 1 and 0 <= told["data_wait_share"] < 1 and told["dice"] <= 1
        assert 400 <= told["samples_seen"] < told["samples_total"]
        run.interrupt()
    finally:
        cluster.close()
