"""Several machines: a second Ray node in a mount namespace of its own, so that it really sees other folders."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from raytrain_brats import verify
from raytrain_brats.data.phantom import write_set
from raytrain_brats.run import checkpoint, ledger
from scripts.chaos_campaign import under_ray
from scripts.chaos_campaign.ray_cluster import SMALL, Cluster, ElasticRun


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
    assert said.startswith(f"error: run folder {hidden} is not seen by node")
    assert "s3://" in said


def test_a_node_that_joins_is_used_and_no_step_is_lost(cluster: Cluster) -> None:
    """The run begins with the one worker that fits, saves before it grows, and goes on with two from that very step."""
    run = ElasticRun(cluster)
    run.rows_until(1, after=0)
    cluster.add()
    run.rows_until(2, after=1)
    run.interrupt()

    rows = ledger.read_rows(str(run.folder))
    assert [row["world_size"] for row in rows] == sorted(row["world_size"] for row in rows)
    assert run.events("resize")[0]["saved"]
    assert [e["redone_steps"] for e in run.events("group")] == [0, 0]
    # Ctrl-C saved as well: what is on record is what the next start goes on from
    assert checkpoint.newest_valid(str(run.folder))[0].samples_seen == rows[-1]["samples_seen"]
    assert verify.main(["--run-dir", str(run.folder)]) == 0


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
    took = {row["strike"]: row for row in rows}
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
    assert verify.main(["--run-dir", str(run.folder)]) == 0


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
    assert verify.main(["--run-dir", str(run.folder)]) == 0


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
        assert verify.main(["--run-dir", str(run.folder)]) == 0
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
        assert verify.main(["--run-dir", str(run.folder)]) == 0
        assert not run.events("failure")
    finally:
        cluster.close()
