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
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml

from raytrain_brats import verify
from raytrain_brats.run import checkpoint, gauges, journal
from raytrain_brats.synthetic.phantom import write_set
from scripts.chaos_campaign import under_ray
from tests.support.clusters import SMALL, Cluster, ElasticRun, free_port
from tests.support.dashboard import asked
from tests.support.metadata import Metadata
from tests.support.proxies import Proxy


@pytest.fixture
def place() -> Iterator[Path]:
    """A short path: Ray's sockets do not fit below pytest's own."""
    folder = Path(tempfile.mkdtemp(prefix="rb", dir="/tmp"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def cluster(place: Path) -> Iterator[Cluster]:
    started = Cluster(place)
    yield started
    started.close()


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("unshare"), reason="a mount namespace needs root")
def test_a_run_folder_that_another_node_does_not_see_is_refused(cluster: Cluster, place: Path) -> None:
    """`train` on two machines with a folder of the first one's own: exit 2, the folder and the remedy named."""
    hidden, data = place / "run", place / "data"
    hidden.mkdir()
    write_set(str(data), cases=6, seed=0, grid=32, anatomy="procedural")
    cluster.add(before=f"mount -t tmpfs none {hidden}")
    code = cluster.train("--data", data, "--run-dir", hidden, *(f"--set={value}" for value in SMALL)).wait(120)

    said = (place / "train.log").read_text()
    assert code == 2, said[-2000:]
    assert f"error: run folder {hidden} is not seen by node" in said
    assert "s3://" in said


def test_a_node_that_joins_is_used_and_no_step_is_lost(cluster: Cluster) -> None:
    """The run begins with the one worker that fits, saves before it grows, and goes on with two from that very step."""
    run = ElasticRun(cluster)
    run.rows_until(1, after=0)
    cluster.add()
    run.rows_until(2, after=1)
    run.interrupt()

    rows = journal.read_rows(run.folder)
    assert [row["world_size"] for row in rows] == sorted(row["world_size"] for row in rows)
    assert run.events("resize")[0]["saved"]
    assert [e["redone_steps"] for e in run.events("group")] == [0, 0]
    # Ctrl-C saved as well: what is on record is what the next start goes on from
    assert checkpoint.newest_valid(run.folder)[0].samples_seen == rows[-1]["samples_seen"]
    assert verify.main(["--run-dir", run.folder]) == 0


@pytest.mark.campaign
def test_kills_under_ray_leave_the_run_as_if_undisturbed(tmp_path: Path) -> None:
    """A slice of the campaign: a rank killed, a node joins, the driver killed and started again, saved on Ctrl-C.

    Each position once, bit-equal to one worker; the node that joins costs no step; the dead driver's reservations are
    not waited for, which would take three minutes.
    """
    found = under_ray.section(tmp_path, 1, 0, lambda *_: None, kinds=("worker", "join", "driver"), calm_s=(4, 8))
    assert found["failures"] == []
    assert found["figures"]["kills"] >= 2
    (rows,) = found["tables"].values()
    took = {row["strike"].removesuffix(", soon"): row for row in rows}
    assert took.keys() >= {"join", "driver"}
    assert float(took["driver"]["most"]) < 150


@pytest.mark.campaign
def test_a_node_that_is_drained_leaves_a_checkpoint_behind(cluster: Cluster) -> None:
    """On a preemption notice the group saves and goes on with one worker at once, not at the deadline."""
    run = ElasticRun(cluster)
    run.rows_until(1, after=0)
    node = cluster.add()
    run.rows_until(2, after=1)
    cluster.drain(node, within_s=600)
    run.rows_until(1, after=2)  # long before the deadline: the group leaves the node as soon as it has saved
    assert any(e["saved"] for e in (*run.events("preemption"), *run.events("resize")[1:]))
    assert run.events("group")[-1]["redone_steps"] == 0
    cluster.kill_node(node)
    run.interrupt()
    assert verify.main(["--run-dir", run.folder]) == 0


@pytest.mark.campaign
def test_a_node_that_is_lost_is_not_waited_for(cluster: Cluster) -> None:
    """SIGKILL all of a node: the run goes on with one worker, and says what that cost."""
    run = ElasticRun(cluster)
    run.rows_until(1, after=0)
    node = cluster.add()
    run.rows_until(2, after=1)
    cluster.kill_node(node)
    run.rows_until(1, after=2)
    told = run.events("recovered")[-1]
    run.interrupt()
    assert (told["cause"], told["world_size"]) == ("failure", 1)
    assert told["reschedule_s"] < 20  # Ray's own start timeout: a group of two was not asked for
    assert verify.main(["--run-dir", run.folder]) == 0


@pytest.mark.campaign
def test_workers_killed_for_want_of_memory_cost_the_run_nothing(place: Path) -> None:
    """Ray's memory monitor kills processes while another program eats the memory: the run goes on, or says why not."""
    memory = {line.split(":")[0]: int(line.split()[1]) << 10 for line in Path("/proc/meminfo").read_text().splitlines()}
    used = 1 - memory["MemAvailable"] / memory["MemTotal"]
    threshold = used + 0.25  # room for the cluster itself
    cluster = Cluster(place, RAY_memory_usage_threshold=f"{threshold:.2f}", RAY_memory_monitor_refresh_ms="250")
    try:
        run = ElasticRun(cluster, "1:2", "run.cpus_per_worker=0.5")
        run.rows_until(2, after=0)
        code = f"import time; eaten = b'x' * {int(0.3 * memory['MemTotal'])}; time.sleep(8)"
        subprocess.run([sys.executable, "-c", code], check=True)
        with suppress(subprocess.TimeoutExpired):
            if run.driver.wait(20) == 1:  # its controller was the victim
                run.start()
        assert run.events("failure") or run.events("launch")[1:], "nothing was killed: the test proves nothing"
        run.rows_until(None, after=1)
        run.interrupt()
        assert verify.main(["--run-dir", run.folder]) == 0
        causes = " ".join(e["error"] for e in run.events("failure")) + run.said.read_text()
        assert "memory" in causes
    finally:
        cluster.close()


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


@pytest.mark.campaign
def test_a_minute_without_s3_is_outlived(place: Path, s3_server: str) -> None:
    """Cases, rows and checkpoints are in S3, which refuses for 60 s: the same group goes on, no step is lost."""
    proxy = Proxy(int(os.environ["AWS_ENDPOINT_URL"].rpartition(":")[2]))
    cluster = Cluster(place, AWS_ENDPOINT_URL=f"http://127.0.0.1:{proxy.port}")
    try:
        run = ElasticRun(cluster, "2", "run.cpus_per_worker=0.5", root=s3_server)
        run.rows_until(2, after=0)
        proxy.set("refuse")
        time.sleep(60)
        proxy.set("pass")
        back = len(journal.read_rows(run.folder))
        until = time.monotonic() + 120
        while len(journal.read_rows(run.folder)) < back + 100:
            assert time.monotonic() < until and run.driver.poll() is None, run.said.read_text()[-2000:]
            time.sleep(1)
        run.interrupt()
        assert run.generation() == 1 and not run.events("failure")
        assert verify.main(["--run-dir", run.folder]) == 0
    finally:
        cluster.close()
        proxy.server.close()


@pytest.mark.campaign
def test_nodes_do_what_their_labels_say(place: Path) -> None:
    """The only worker waits for no data node's CPUs, data tasks for no training node's; both kinds may join later."""
    cluster = Cluster(place, head="--num-cpus=0 --labels role=head")
    try:
        data = cluster.add(options="--num-cpus=2 --labels role=data")
        train = cluster.add(options="--num-cpus=2 --labels role=train")
        run = ElasticRun(cluster)
        run.rows_until(1, after=0)
        assert cluster.where("ray::RayTrainWorker") == {train}
        assert _seen(cluster, "ray::ReadPositions") == {data}
        trains, reads = (cluster.add(options=f"--num-cpus=2 --labels role={role}") for role in ("train", "data"))
        run.rows_until(2, after=1)
        assert cluster.where("ray::RayTrainWorker") == {train, trains}
        assert _seen(cluster, "ray::ReadPositions") == {data, reads}
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
def test_a_spot_notice_saves_shrinks_and_is_outlived(cluster: Cluster, place: Path) -> None:
    """EC2's notice, by way of the watcher on the node: a checkpoint and one worker less long before the deadline; when
    another machine comes the run grows again, and no step is lost."""
    run, metadata = ElasticRun(cluster), Metadata()
    run.rows_until(1, after=0)
    node = cluster.add()
    command = [sys.executable, "-m", "raytrain_brats.spot", "--every", "0.5", "--node", node]
    about = {"AWS_EC2_METADATA_SERVICE_ENDPOINT": metadata.url, "RAY_ADDRESS": f"127.0.0.1:{cluster.port}"}
    said = place / "spot.log"
    with said.open("wb") as log:
        watcher = subprocess.Popen(command, env=cluster.environment | about | {"TMPDIR": str(place)}, stdout=log)
    try:
        run.rows_until(2, after=1)
        metadata.terminate_in(120)
        noticed = time.time()
        shrunk = run.rows_until(1, after=2)
        assert shrunk["time"] < noticed + 110
        time.sleep(3)
        assert said.read_text().count("drained for: spot/instance-action") == 1, said.read_text()
    finally:
        watcher.kill()
        watcher.wait()
        metadata.shutdown()
    cluster.kill_node(node)
    cluster.add()
    run.rows_until(2, after=run.generation())
    assert any(e["saved"] for e in (*run.events("preemption"), *run.events("resize")[1:]))
    assert {e["redone_steps"] for e in run.events("group")} == {0}
    run.interrupt()
    assert verify.main(["--run-dir", run.folder]) == 0


@pytest.mark.campaign
def test_prometheus_is_told_of_a_live_run(place: Path) -> None:
    """Scrape the node's port as Prometheus does: all that the dashboard asks for is there, with the run's numbers."""
    port = free_port()
    cluster = Cluster(
        place, head=f"--num-cpus=2 --metrics-export-port={port} --labels role=head", **{gauges.PRICES: "head=3.5"}
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
