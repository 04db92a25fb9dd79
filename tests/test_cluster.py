"""Several machines: a second Ray node in a mount namespace of its own, so that it really sees other folders."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from raytrain_brats import verify
from raytrain_brats.data.phantom import write_set
from raytrain_brats.run import checkpoint, ledger
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
