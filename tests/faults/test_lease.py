"""One driver per run folder: real processes contend, die, are stopped and come back; on a local disk and on S3."""

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from raytrain_brats import books, storage, train
from raytrain_brats.errors import RunFailed, UserError
from raytrain_brats.ray_ext import cluster
from raytrain_brats.run import checkpoint, journal, lease
from raytrain_brats.run.rows import MetricsLog
from raytrain_brats.run.run_dir import Document
from tests.support.cases import write_msd_folder

TTL_S = 1.2
"""Of a lease that is to run out."""
LIVE_S = 6.0
"""Of one that is renewed all the time, also by a machine that is slow to come to it."""
DRIVER = """
import select, sys, time
from pathlib import Path
from raytrain_brats import storage
from raytrain_brats.errors import UserError
from raytrain_brats.run import lease
run_dir, ttl_s, start = sys.argv[1:]
storage.exists(run_dir)
print("ready", flush=True)
while start and not Path(start).exists():
    time.sleep(0.001)
try:
    with lease.hold(run_dir, float(ttl_s)) as held:
        print("holds", held.token, flush=True)
        while not held.lost and not select.select([sys.stdin], [], [], 0.02)[0]:
            pass
        print("lost to", held.lost, flush=True)
except UserError as error:
    sys.exit(f"refused: {error}")
"""


class Drivers(list[subprocess.Popen[str]]):
    """Processes that hold a lease until their standard input ends."""

    def start(self, run_dir: str, ttl_s: float = LIVE_S, start: str = "") -> subprocess.Popen[str]:
        pipe = subprocess.PIPE
        arguments = [sys.executable, "-c", DRIVER, run_dir, str(ttl_s), start]
        self.append(subprocess.Popen(arguments, stdin=pipe, stdout=pipe, stderr=pipe, text=True))
        assert self[-1].stdout and self[-1].stdout.readline() == "ready\n"
        return self[-1]


def said(driver: subprocess.Popen[str], what: str) -> str:
    """The rest of the next line that begins with `what`."""
    assert driver.stdout
    for line in driver.stdout:
        if line.startswith(what):
            return line[len(what) :].strip()
    raise AssertionError(f"not said: {what}; {driver.stderr.read() if driver.stderr else ''}")


@pytest.fixture
def drivers() -> Iterator[Drivers]:
    started = Drivers()
    yield started
    for driver in started:
        driver.kill()
        driver.communicate()


@pytest.fixture(params=["local", "s3"])
def run_dir(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return f"{request.getfixturevalue('s3_server')}/run" if request.param == "s3" else str(tmp_path / "run")


def elsewhere(run_dir: str, renewals: int = 0) -> None:
    """A lease that a driver on another machine holds."""
    about = {"token": "theirs", "renewals": renewals, "since": 1.7e9, "host": "far-away", "pid": 4, "machine": "b p"}
    storage.write_bytes(storage.join(run_dir, "lease.json"), json.dumps(about).encode())


def test_a_second_driver_is_refused_and_may_come_when_the_first_has_ended(tmp_path: Path, drivers: Drivers) -> None:
    """The refusal names the first; a released lease is free at once."""
    run_dir = str(tmp_path)
    first = drivers.start(run_dir)
    said(first, "holds")
    second = drivers.start(run_dir)
    error = second.communicate(timeout=120)[1]
    assert second.returncode == 1 and f"is being trained by another driver, process {first.pid} on " in error
    first.communicate("end", timeout=120)
    assert first.returncode == 0
    began = time.monotonic()
    with lease.hold(run_dir, 120):
        assert time.monotonic() - began < 60


def test_on_one_machine_a_second_driver_is_refused_at_once(tmp_path: Path, drivers: Drivers) -> None:
    """It need not wait for a renewal: the first lives here, and its last one is young. Not when it is suspended."""
    run_dir = str(tmp_path)
    first = drivers.start(run_dir, 120)
    said(first, "holds")
    for asked in (lease.check, lambda where: lease.Lease(where).take(120)):
        began = time.monotonic()
        with pytest.raises(UserError, match=f"is being trained by another driver, process {first.pid} on "):
            asked(run_dir)
        assert time.monotonic() - began < 1
    first.send_signal(signal.SIGSTOP)
    time.sleep(0.1)
    lease.check(run_dir)
    first.send_signal(signal.SIGCONT)


def test_a_killed_driver_of_this_machine_is_replaced_at_once(tmp_path: Path, drivers: Drivers) -> None:
    """SIGKILL, not even reaped: the next one need not wait for a lease to run out."""
    run_dir = str(tmp_path)
    first = drivers.start(run_dir)
    said(first, "holds")
    first.kill()
    time.sleep(0.1)
    began = time.monotonic()
    with lease.hold(run_dir, 120) as held:
        assert time.monotonic() - began < 60 and not held.lost


def test_a_process_number_given_to_another_process_is_not_the_driver(tmp_path: Path, drivers: Drivers) -> None:
    """The driver's number lives on in a process that began later: still dead."""
    first = drivers.start(str(tmp_path))
    said(first, "holds")
    first.kill()
    about = json.loads((tmp_path / "lease.json").read_text())
    other = drivers.start(str(tmp_path / "other"))
    (tmp_path / "lease.json").write_text(json.dumps(about | {"pid": other.pid}))
    began = time.monotonic()
    with lease.hold(str(tmp_path), 120):
        assert time.monotonic() - began < 60


@pytest.mark.parametrize("machine", ["another boot", "another name", "no /proc"])
def test_process_numbers_of_another_machine_say_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, machine: str
) -> None:
    """There the driver's number is another process's, or nobody's: only its renewals tell."""
    run_dir = str(tmp_path)
    first = lease.Lease(run_dir)
    first.take(TTL_S)
    about = json.loads((tmp_path / "lease.json").read_text())
    change = {"another boot": {"machine": "b p"}, "another name": {"host": "far-away"}, "no /proc": {"machine": ""}}
    (tmp_path / "lease.json").write_text(json.dumps(about | change[machine] | {"pid": 2**22 + 1}))
    if machine == "no /proc":
        monkeypatch.setattr(lease, "_machine", lambda: "")
    began = time.monotonic()
    with lease.hold(run_dir, TTL_S):
        assert time.monotonic() - began > TTL_S


def test_a_dead_driver_elsewhere_is_replaced_after_its_lease(run_dir: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Its machine cannot be asked: wait for the ttl, say so, then go on."""
    elsewhere(run_dir)
    began = time.monotonic()
    with lease.hold(run_dir, TTL_S):
        assert time.monotonic() - began > TTL_S
    assert capsys.readouterr().out.count("waiting to see whether the driver process 4 on far-away since 2023") == 1


def test_a_live_driver_elsewhere_is_left_alone(run_dir: str) -> None:
    """Its counter moves: refused, however wrong its clock may be."""
    elsewhere(run_dir)
    done = threading.Event()

    def renew() -> None:
        count = 0
        while not done.wait(LIVE_S / 6):
            elsewhere(run_dir, count := count + 1)

    thread = threading.Thread(target=renew)
    thread.start()
    try:
        with pytest.raises(UserError, match="process 4 on far-away since 2023"), lease.hold(run_dir, LIVE_S):
            pass
    finally:
        done.set()
        thread.join()
    assert json.loads(storage.read_bytes(storage.join(run_dir, "lease.json")))["token"] == "theirs"


def test_a_lease_outlives_its_time_and_a_storage_outage(run_dir: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Renewed in the background; while the storage is out nothing is lost, and afterwards it is renewed again."""
    with lease.hold(run_dir, 0.6) as held:

        def renewals() -> int:
            return int(json.loads(storage.read_bytes(storage.join(run_dir, "lease.json")))["renewals"])

        def out(_: str) -> bytes:
            raise OSError("out")

        with monkeypatch.context() as broken:
            broken.setattr(Document, "read", out)
            time.sleep(1)
            before = renewals()
        deadline = time.monotonic() + 60
        while renewals() < before + 2:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert not held.lost
        storage.delete(storage.join(run_dir, "lease.json"))  # by a person: nobody else has it, so it is put back
        while not storage.exists(storage.join(run_dir, "lease.json")):
            assert time.monotonic() < deadline
        assert not held.lost


def test_a_stopped_driver_that_comes_back_is_fenced_off(tmp_path: Path, drivers: Drivers) -> None:
    """SIGSTOP, taken over after the ttl, SIGCONT: it learns of it, leaves the lease alone, begins no group."""
    run_dir = str(tmp_path)
    zombie = drivers.start(run_dir)
    token = said(zombie, "holds")
    journal.take_over(run_dir, token)
    first = journal.begin_generation(run_dir, token)
    assert (first.number, first.driver) == (1, token)
    zombie.send_signal(signal.SIGSTOP)
    while Path(f"/proc/{zombie.pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":
        time.sleep(0.01)  # until then it is refused at once, as one that lives
    with lease.hold(run_dir, TTL_S) as held:
        journal.take_over(run_dir, held.token)
        for _ in range(2):
            with pytest.raises(RunFailed, match=r"another driver has taken .* over"):
                journal.begin_generation(run_dir, token)
            assert journal.begin_generation(run_dir, held.token).driver == held.token
        zombie.send_signal(signal.SIGCONT)
        assert f"process {lease.os.getpid()} on " in said(zombie, "lost to")
        assert zombie.wait(120) == 0 and not held.lost
        now = json.loads(storage.read_bytes(storage.join(run_dir, "lease.json")))
        assert now["token"] == held.token


@pytest.mark.parametrize("moment", ["swap", "list_files", "read_bytes"])
def test_a_driver_replaced_amid_its_decision_changes_nothing(
    run_dir: str, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """Stopped between check and write, or between fence and cut, while another driver begins and its group trains."""
    journal.take_over(run_dir, "old")
    log = MetricsLog(run_dir, journal.begin_generation(run_dir, "old"))
    log.add({"samples_seen": 4})
    log.flush()
    checkpoint.save(run_dir, 4, 1, {"a": torch.ones(2)}, {"bad_in_epoch": 0})
    real, entered = getattr(storage, moment), []

    def interrupted(uri: str, *arguments: Any) -> Any:
        read = real(uri) if moment == "read_bytes" else None
        if not entered and (moment != "read_bytes" or "metrics" in uri):
            entered.append(uri)
            journal.take_over(run_dir, "new")
            new = MetricsLog(run_dir, journal.begin_generation(run_dir, "new"))
            new.add({"samples_seen": 8})
            new.flush()
        return read or real(uri, *arguments)

    monkeypatch.setattr(storage, moment, interrupted)
    with pytest.raises(RunFailed, match="another driver has taken"):
        journal.begin_generation(run_dir, "old")
    assert entered and [row["samples_seen"] for row in books.read_rows(run_dir)] == [4, 8]


def test_rows_held_up_until_a_later_group_has_begun_do_not_count(s3_server: str) -> None:
    """A put on S3 may wait minutes for an outage to end, past the fence: the part does not count."""
    log = MetricsLog(s3_server, journal.begin_generation(s3_server))
    log.add({"samples_seen": 4})
    log.flush()
    log.add({"samples_seen": 8})
    log.check = lambda: None  # type: ignore[method-assign] # passed before the outage
    checkpoint.save(s3_server, 4, 1, {"a": torch.ones(2)}, {"bad_in_epoch": 0})
    new = MetricsLog(s3_server, journal.begin_generation(s3_server))
    new.add({"samples_seen": 8, "generation": 2})
    new.flush()
    log.flush()
    rows = books.read_rows(s3_server)
    assert [(row["samples_seen"], row.get("generation")) for row in rows] == [(4, None), (8, 2)]


@pytest.mark.parametrize("left", ["free", "stale"])
def test_of_eight_drivers_at_once_one_wins(run_dir: str, drivers: Drivers, tmp_path: Path, left: str) -> None:
    """Free or left behind elsewhere: one holds it, seven are refused and name that one."""
    if left == "stale":
        elsewhere(run_dir)
    start = tmp_path / "start"
    for _ in range(8):
        drivers.start(run_dir, LIVE_S, str(start))
    start.touch()
    deadline = time.monotonic() + 180
    while sum(driver.poll() is None for driver in drivers) > 1:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    winner = next(driver for driver in drivers if driver.poll() is None)
    said(winner, "holds")
    for driver in drivers:
        if driver is not winner:
            printed, error = driver.communicate()
            assert f"process {winner.pid} on " in error and "holds" not in printed


def test_train_refuses_before_it_starts_ray(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The second `train` ends with 2 and one line; a mistake found later leaves the lease free."""
    data, run_dir = write_msd_folder(tmp_path / "data", 3, shape=(8, 8, 8)), str(tmp_path / "run")
    arguments = ["--data", str(data), "--run-dir", run_dir]

    def connect(**_: Any) -> None:
        raise UserError("no cluster")

    monkeypatch.setattr(cluster, "connect", connect)
    with lease.hold(run_dir, 0.6):
        assert train.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "is being trained by another driver, process" in error
    assert not (tmp_path / "run" / "config.yaml").exists()
    assert train.main(arguments) == 2
    assert "no cluster" in capsys.readouterr().err
    assert "released_by" in json.loads((tmp_path / "run" / "lease.json").read_text())
