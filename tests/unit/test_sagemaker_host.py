"""The containers' entry: who leads, who waits for whom, how a job ends. Hosts are loopback addresses."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from raytrain_brats import sagemaker, storage
from raytrain_brats.config import load
from raytrain_brats.errors import RunFailed
from raytrain_brats.run import checkpoint
from raytrain_brats.sagemaker import host, rendezvous
from raytrain_brats.sagemaker.rendezvous import Channel, Cluster

HOSTS = ("127.0.0.1", "127.0.0.2", "127.0.0.3")

FAKE = """
import os, sys, time
from pathlib import Path
from raytrain_brats.sagemaker import host, rendezvous

def start_ray(cluster, deadline):
    Path(os.environ["RAYTRAIN_BRATS_ML"], "joined").touch()
    if os.environ.get("NO_RAY"):
        raise host.RunFailed(f"Ray did not start on {cluster.me}: no memory")
    return "127.0.0.1:6379"

host.start_ray = start_ray
rendezvous.PORT = int(os.environ["FAKE_PORT"])
host.program = lambda name: [sys.executable, "-u", "-c", os.environ["FAKE_" + name.upper()]]
host.export = lambda run_dir, model: (model.mkdir(), (model / "exported").write_text(run_dir))
sys.exit(host.main("host", ["train"]))
"""
"""The entry with Ray, the commands and the port replaced; all else is as in a container."""


def lay_out(root: Path, me: str, hosts: tuple[str, ...], groups: dict[str, tuple[str, ...]], **hyper: str) -> Path:
    """/opt/ml of one container."""
    (root / "input/config").mkdir(parents=True)
    named = [{"instance_group_name": n, "instance_type": "ml.m5.xlarge", "hosts": h} for n, h in groups.items()]
    about = {"current_host": me, "hosts": hosts, "network_interface_name": "lo"}
    about |= {"instance_groups": named} if groups else {}
    (root / "input/config/resourceconfig.json").write_text(json.dumps(about))
    (root / "input/config/hyperparameters.json").write_text(json.dumps(hyper))
    return root


def test_all_hosts_choose_the_same_head(tmp_path: Path) -> None:
    """The first CPU host leads, by number and not by letters; the order in the file does not count."""
    hosts = ("algo-10", "algo-2", "algo-1", "algo-3")
    groups = {"train": ("algo-1", "algo-2"), "data": ("algo-10", "algo-3")}
    for me in hosts:
        cluster = rendezvous.read_cluster(lay_out(tmp_path / me, me, hosts, groups))
        assert (cluster.me, cluster.head) == (me, "algo-3")
        assert cluster.group == ("train" if me in groups["train"] else "data")
        assert cluster.peers == ("algo-1", "algo-2", "algo-10")
    alone = rendezvous.read_cluster(lay_out(tmp_path / "one", "algo-2", ("algo-2", "algo-1"), {}))
    assert (alone.head, alone.group) == ("algo-1", "all")


def test_a_place_that_is_no_container_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    """At home `host` says what it is for; damaged files are shown."""
    monkeypatch.setenv("RAYTRAIN_BRATS_ML", str(tmp_path))
    restored = signal.getsignal(signal.SIGTERM)
    assert sagemaker.main(["host", "train"]) == 1
    signal.signal(signal.SIGTERM, restored)
    assert "at home use `train` itself" in capfd.readouterr().err
    (lay_out(tmp_path / "x", "a", ("a",), {}) / "input/config/resourceconfig.json").write_text('{"hosts": 3}')
    with pytest.raises(RunFailed, match=r'is not as expected .*"hosts": 3'):
        rendezvous.read_cluster(tmp_path / "x")


def test_hyperparameters_become_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `launch` packed is what `train` gets; a recipe's content becomes a file; other commands stay as given."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    recipe = json.dumps({"network": {"name": "segresnet"}})
    given = {"store": "s3://b/s", "run_dir": "s3://b/r", "recipe": recipe, "set": '["train.epochs=3", "run.workers=4"]'}
    root = lay_out(tmp_path / "ml", "algo-1", ("algo-1",), {}, **given)
    found = host.command(root, ["train"])
    assert found == [
        *("train", "--store=s3://b/s", "--run-dir=s3://b/r", f"--recipe={tmp_path}/recipe.yaml"),
        *("--set=train.epochs=3", "--set=run.workers=4"),
    ]
    assert load(str(tmp_path / "recipe.yaml")).network.name == "segresnet"
    assert host.option(found, "run-dir") == "s3://b/r"
    prepare = ["prepare", "--data", "s3://b/d", "--store", "s3://b/s"]
    assert host.command(root, prepare) == prepare
    assert host.option(prepare, "store") == "s3://b/s"


def test_the_token_is_made_once(tmp_path: Path) -> None:
    """Hosts that ask at the same time get the same secret, and so does the next attempt."""
    found: list[str] = []
    threads = [threading.Thread(target=lambda: found.append(rendezvous.shared_token(str(tmp_path)))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8 and len(set(found)) == 1 and len(found[0]) == 64


@pytest.fixture
def server() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield listening


def test_strangers_are_not_taken_for_hosts(server: socket.socket) -> None:
    """Port scanners, wrong tokens and unknown names change nothing; the hosts that are meant come in."""
    cluster = Cluster("a", ("a", "b"), "a", "all", "lo")

    def visit() -> None:
        for message in (b"GET / HTTP/1.1\n", b'{"host": "b", "token": "wrong"}\n', b"[]\n", b"", b"\xff\n"):
            with socket.create_connection(server.getsockname()) as stranger:
                stranger.sendall(message)
        for name in ("c", "b"):
            Channel(socket.create_connection(server.getsockname())).send({"host": name, "token": "secret"})

    threading.Thread(target=visit).start()
    channels: dict[str, Channel] = {}
    rendezvous.gather(cluster, "secret", server, time.monotonic() + 60, channels)
    assert channels.keys() == {"b"}


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        return int(found.getsockname()[1])


JOBS: list["Job"] = []


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """Also after a test that failed."""
    yield
    for process in (process for job in JOBS for process in job.processes.values()):
        process.kill()
        process.wait()
    JOBS.clear()


class Job:
    """Containers of one job as processes; `train` is a line of Python."""

    def __init__(self, folder: Path, train: str, hosts: tuple[str, ...] = HOSTS, join_s: float = 60, **more: str):
        JOBS.append(self)
        self.run, port = folder / "run", free_port()
        self.roots = {me: lay_out(folder / me, me, HOSTS, {}, run_dir=str(self.run)) for me in HOSTS}
        self.logs = {me: folder / f"{me}.log" for me in HOSTS}
        self.processes = {}
        for me in hosts:
            own = {"RAYTRAIN_BRATS_ML": str(self.roots[me]), "RAYTRAIN_BRATS_JOIN_S": str(join_s)}
            faked = {"FAKE_PORT": str(port), "FAKE_TRAIN": train, "FAKE_REPORT": ""}
            if me in more.get("no_ray", ""):
                faked["NO_RAY"] = "1"
            with open(self.logs[me], "wb") as log:
                self.processes[me] = subprocess.Popen(
                    [sys.executable, "-c", FAKE], env=os.environ | own | faked, stdout=log, stderr=log
                )

    def wait_for(self, what: str, me: str = HOSTS[0]) -> None:
        deadline = time.monotonic() + 120
        while what not in self.logs[me].read_text():
            assert time.monotonic() < deadline and self.processes[me].poll() is None, self.logs[me].read_text()
            time.sleep(0.05)

    def end(self) -> dict[str, int]:
        return {me: process.wait(120) for me, process in self.processes.items()}

    def failure(self, me: str) -> str:
        path = self.roots[me] / "output/failure"
        return path.read_text() if path.exists() else ""


def test_a_job_that_works_ends_well_on_all_hosts(tmp_path: Path) -> None:
    """Peers start Ray when the head says so, wait for its end, and the head alone exports the model."""
    job = Job(tmp_path, "import sys; print('trained', sys.argv[1:])")
    assert set(job.end().values()) == {0}
    assert all((root / "joined").exists() for root in job.roots.values())
    assert f"trained ['--run-dir={job.run}']" in job.logs[HOSTS[0]].read_text()
    assert [(root / "model/exported").exists() for root in job.roots.values()] == [True, False, False]
    assert not any(job.failure(me) for me in HOSTS)


def test_a_failure_is_everyones_and_names_its_cause(tmp_path: Path) -> None:
    """Exit code 1 on every host, the trainer's own line in every failure file: AWS's sample exits with 0 here."""
    job = Job(tmp_path, "import sys; print('chatter', file=sys.stderr); sys.exit('failed: 8 failures in a row')")
    assert set(job.end().values()) == {1}
    assert all("failed: 8 failures in a row" in job.failure(me) for me in HOSTS)
    assert "chatter" in job.logs[HOSTS[0]].read_text()


TRAINS = """
import signal, sys, time
def stop(*_):
    print("saved", flush=True)
    sys.exit(130)
signal.signal(signal.SIGTERM, stop)
print("training", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("told", [HOSTS[:1], HOSTS[1:2], HOSTS])
def test_sigterm_anywhere_saves_and_ends_all(tmp_path: Path, told: tuple[str, ...]) -> None:
    """On the head, on a peer, on all of them: the trainer is told once, saves, and no host says 0 or `failed`."""
    job = Job(tmp_path, TRAINS)
    job.wait_for("training")
    for me in told:
        job.processes[me].send_signal(signal.SIGTERM)
    assert set(job.end().values()) == {host.STOPPED}
    assert job.logs[HOSTS[0]].read_text().count("saved\n") == 1
    assert not any(job.failure(me) for me in HOSTS)


def test_a_store_holds_nothing_of_the_jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The secret of a processing job lies beside the store, where `prepare` refuses files that are not its own."""
    places: list[str] = []

    def enough(place: str) -> str:
        places.append(place)
        raise RunFailed("enough")

    monkeypatch.setattr(rendezvous, "shared_token", enough)
    root, restored = lay_out(tmp_path / "ml", "127.0.0.1", ("127.0.0.1",), {}), signal.getsignal(signal.SIGTERM)
    for command in (["prepare", "--store", "s3://brats/store/"], ["train", "--run-dir=s3://brats/run"]):
        assert host.Host(root, command).run() == 1
    signal.signal(signal.SIGTERM, restored)
    assert places == ["s3://brats/store-job", "s3://brats/run"]


@pytest.mark.parametrize(("asked", "me", "shown"), [("1", "here", True), ("", "here", False), ("1", "there", False)])
def test_the_dashboard_is_for_who_asked(monkeypatch: pytest.MonkeyPatch, asked: str, me: str, shown: bool) -> None:
    """On the head alone, on its loopback; a job that nobody is to look into has none."""
    given: list[str] = []

    def run(arguments: list[str], **_: Any) -> Any:
        given.extend(arguments)
        return subprocess.CompletedProcess(arguments, 0, "")

    monkeypatch.setattr(host.subprocess, "run", run)
    monkeypatch.setattr(rendezvous, "address_of", lambda name, deadline: "127.0.0.1")
    monkeypatch.setenv(host.DASHBOARD, asked)
    host.start_ray(Cluster(me, ("here", "there"), "here", "all", "lo"), 0)
    assert ("--include-dashboard=true" in given) == ("--dashboard-host=127.0.0.1" in given) == shown
    assert ("--include-dashboard=false" in given) == (me == "here" and not shown)


def test_sigterm_before_the_others_came_ends_at_once(tmp_path: Path) -> None:
    job = Job(tmp_path, TRAINS, hosts=HOSTS[:2])
    job.wait_for("127.0.0.2 is here")
    job.processes[HOSTS[0]].send_signal(signal.SIGTERM)
    assert set(job.end().values()) == {host.STOPPED}


def test_a_host_that_never_comes_is_named_within_the_deadline(tmp_path: Path) -> None:
    """The hosts that are there fail together and say who is missing."""
    job = Job(tmp_path, TRAINS, hosts=HOSTS[:2], join_s=8)
    assert set(job.end().values()) == {1}
    assert all("127.0.0.3 did not come up within" in job.failure(me) for me in HOSTS[:2])


def test_a_head_that_never_comes_is_named_too(tmp_path: Path) -> None:
    job = Job(tmp_path, TRAINS, hosts=HOSTS[1:2], join_s=2)
    assert set(job.end().values()) == {1}
    assert "127.0.0.1, the head, did not come up in time" in job.failure(HOSTS[1])


def test_a_host_whose_ray_does_not_start_is_named(tmp_path: Path) -> None:
    job = Job(tmp_path, TRAINS, no_ray=HOSTS[2])
    assert set(job.end().values()) == {1}
    assert all("Ray did not start on 127.0.0.3: no memory" in job.failure(me) for me in HOSTS)


def test_a_head_that_dies_ends_the_others(tmp_path: Path) -> None:
    """Nobody waits for ever for a head that was killed."""
    job = Job(tmp_path, "import time; print('training', flush=True); time.sleep(30)")
    job.wait_for("training")
    job.processes[HOSTS[0]].kill()
    assert job.end() == {HOSTS[0]: -signal.SIGKILL, HOSTS[1]: 1, HOSTS[2]: 1}
    assert "the head, ended without a message" in job.failure(HOSTS[1])


def test_the_model_is_a_run_folder_with_its_newest_checkpoint(tmp_path: Path) -> None:
    """What `predict --run-dir` needs, and the report; older checkpoints and the hosts' own files stay behind."""
    import torch

    run = str(tmp_path / "run")
    for seen in (4, 8):
        checkpoint.save(run, seen, 1, {"network.x": torch.ones(2)}, {"samples_seen": seen})
    for name in ("config.yaml", "report.html", "validation/000000000008.csv", "sagemaker/ray_token"):
        storage.write_bytes(storage.join(run, name), name.encode())
    host.export(run, tmp_path / "model")
    found = set(storage.list_files(str(tmp_path / "model")))
    newest = {name for name in found if name.startswith("checkpoints/")}
    assert newest == {
        f"checkpoints/000000000008-g0001/{n}" for n in ("MANIFEST.json", "state.json", "tensors.safetensors")
    }
    assert found - newest == {"config.yaml", "report.html", "validation/000000000008.csv"}
    assert checkpoint.newest_valid(str(tmp_path / "model"))[0] is not None
    with pytest.raises(RunFailed, match="no valid checkpoint"):
        host.export(str(tmp_path / "nothing"), tmp_path / "none")
