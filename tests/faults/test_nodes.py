"""Nodes that are drained, lost or full, S3 that is away, on a cluster of several real Ray nodes."""

import os
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from raytrain_brats import books, verify
from scripts.chaos_campaign import under_ray
from tests.support.clusters import Cluster, ElasticRun
from tests.support.metadata import Metadata
from tests.support.proxies import Proxy


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
        back = len(books.read_rows(run.folder))
        until = time.monotonic() + 120
        while len(books.read_rows(run.folder)) < back + 100:
            assert time.monotonic() < until and run.driver.poll() is None, run.said.read_text()[-2000:]
            time.sleep(1)
        run.interrupt()
        assert run.generation() == 1 and not run.events("failure")
        assert verify.main(["--run-dir", run.folder]) == 0
    finally:
        cluster.close()
        proxy.server.close()


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
