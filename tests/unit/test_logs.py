"""A node's logs reach a place that outlives it: what has changed, within a bound, whatever happens in between."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from raytrain_brats import logs, storage
from raytrain_brats.logs import FILE_MAX, MB, Copier

Puts = list[str]


@pytest.fixture(params=["disk", "s3"])
def to(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "runs") if request.param == "disk" else f"{request.getfixturevalue('s3_server')}/brats"


@pytest.fixture
def session(tmp_path: Path) -> Path:
    """The link to Ray's newest session, as Ray makes it."""
    return new_session(tmp_path, 1)


def new_session(tmp_path: Path, number: int) -> Path:
    (tmp_path / f"session_{number}" / "logs" / "old").mkdir(parents=True)
    latest = tmp_path / "session_latest"
    latest.unlink(missing_ok=True)
    latest.symlink_to(tmp_path / f"session_{number}")
    return latest


@pytest.fixture
def puts(monkeypatch: pytest.MonkeyPatch) -> Puts:
    """Names of the files that were put."""
    names: Puts = []
    put = storage.write_bytes

    def note(uri: str, content: bytes) -> None:
        put(uri, content)
        names.append(uri.rpartition("/")[2])

    monkeypatch.setattr(storage, "write_bytes", note)
    return names


def write(session: Path, name: str, content: bytes, at: int = 0) -> None:
    """A log; `at` says in which order files were changed last."""
    path = session / "logs" / name
    path.write_bytes(content)
    if at:
        os.utime(path, (at, at))


def kept(copier: Copier, session: Path) -> dict[str, bytes]:
    place = copier.place(session.resolve())
    return {name: storage.read_bytes(storage.join(place, name)) for name in storage.list_files(place)}


def test_only_what_changed_is_put(to: str, session: Path, puts: Puts) -> None:
    """Logs arrive whole, also from folders below; again only when they have grown; empty ones and links to nowhere
    do not count."""
    copier = Copier(to, session, MB)
    write(session, "raylet.out", b"up\n")
    write(session, "old/job-driver-x.log", b"epoch 1\n")
    write(session, "worker.err", b"")
    write(session, "debug_state.txt", b"not a log")
    (session / "logs" / "gone.log").symlink_to("nowhere")
    assert copier.look() == 2
    assert kept(copier, session) == {"raylet.out": b"up\n", "old/job-driver-x.log": b"epoch 1\n"}
    assert copier.look() == 0
    write(session, "raylet.out", b"up\nand on\n")
    assert copier.look() == 1
    assert kept(copier, session)["raylet.out"] == b"up\nand on\n"
    assert sorted(puts) == ["job-driver-x.log", "raylet.out", "raylet.out"]


def test_rotation_and_a_file_that_goes(to: str, session: Path) -> None:
    """A rotated log is there by both names; one that Ray has deleted stays."""
    copier = Copier(to, session, MB)
    write(session, "raylet.out", b"first " * 100)
    write(session, "worker-1.out", b"said before it ended")
    copier.look()
    (session / "logs" / "raylet.out").rename(session / "logs" / "raylet.out.1")
    write(session, "raylet.out", b"second")
    (session / "logs" / "worker-1.out").unlink()
    copier.look()
    assert kept(copier, session) == {
        "raylet.out.1": b"first " * 100,
        "raylet.out": b"second",
        "worker-1.out": b"said before it ended",
    }


def test_no_more_than_the_limit(to: str, session: Path) -> None:
    """The job's own log is kept, then what was written last; older ones give way; never more, not even in between."""
    copier = Copier(to, session, 1000)

    def fill(name: str, size: int, at: int) -> None:
        write(session, name, name[:1].encode() * size, at)
        copier.look()
        assert sum(map(len, kept(copier, session).values())) <= 1000

    fill("job-driver-1.log", 300, 1)
    fill("a.out", 400, 2)
    fill("b.out", 300, 3)
    assert sorted(kept(copier, session)) == ["a.out", "b.out", "job-driver-1.log"]
    fill("c.out", 350, 4)
    assert sorted(kept(copier, session)) == ["b.out", "c.out", "job-driver-1.log"]
    fill("b.out", 20, 5)  # rotated: room again
    fill("d.out", 2000, 6)  # never fits
    assert sorted(kept(copier, session)) == ["b.out", "c.out", "job-driver-1.log"]
    (session / "logs" / "c.out").unlink()
    fill("e.out", 600, 7)
    assert sorted(kept(copier, session)) == ["b.out", "e.out", "job-driver-1.log"]


def test_a_long_file_keeps_its_beginning_and_its_end(session: Path, tmp_path: Path) -> None:
    """Why something started as it did, and how it ended; the gap is told."""
    copier = Copier(str(tmp_path / "runs"), session, 100 * MB)
    write(session, "worker.out", b"begin" + bytes(FILE_MAX) + b"end")
    copier.look()
    content = kept(copier, session)["worker.out"]
    assert len(content) == FILE_MAX
    assert content.startswith(b"begin") and content.endswith(b"end") and b"bytes or more are left out" in content


def test_killed_in_between(to: str, session: Path, puts: Puts, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copier that ended amid its puts is followed by one that completes them, and keeps to the same limit."""
    first = Copier(to, session, 1000)
    for number in range(4):
        write(session, f"{number}.out", b"x" * 200, at=10 - number)
    put = storage.write_bytes

    def die(uri: str, content: bytes) -> None:
        if len(puts) == 2:
            raise KeyboardInterrupt
        put(uri, content)

    with monkeypatch.context() as dying:
        dying.setattr(storage, "write_bytes", die)
        with pytest.raises(KeyboardInterrupt):
            first.look()
    assert sorted(kept(first, session)) == ["0.out", "1.out"]
    second = Copier(to, session, 1000)
    (session / "logs" / "0.out").unlink()  # it would stay, but for the room
    write(session, "new.out", b"y" * 500)
    second.look()
    assert sorted(kept(second, session)) == ["1.out", "2.out", "new.out"]


def test_an_outage_is_made_up_for(to: str, session: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What could not be put is put with a later look, and the copier goes on meanwhile, saying so once."""
    copier = Copier(to, session, MB)
    write(session, "raylet.out", b"up")

    def refuse(uri: str, content: bytes) -> None:
        raise OSError("away")

    with monkeypatch.context() as outage:
        outage.setattr(storage, "write_bytes", refuse)
        said = logs._look(copier, "copying")
        assert "away" in said and logs._look(copier, said) == said
    assert logs._look(copier, said) == "copying"
    assert kept(copier, session) == {"raylet.out": b"up"}


def test_a_new_session_gets_its_own_folder(to: str, session: Path, tmp_path: Path) -> None:
    """Ray restarted: the last lines of the one before arrive too, and none is overwritten."""
    copier = Copier(to, session, MB)
    write(session, "gcs_server.out", b"old")
    copier.look()
    write(session, "gcs_server.out", b"old, and why it ended")
    before = session.resolve()
    new_session(tmp_path, 2)
    write(session, "gcs_server.out", b"new")
    copier.look()
    assert kept(copier, before) == {"gcs_server.out": b"old, and why it ended"}
    assert kept(copier, session) == {"gcs_server.out": b"new"}


@pytest.fixture
def start(to: str, session: Path, tmp_path: Path) -> Callable[[], subprocess.Popen[str]]:
    """The command as the YAMLs start it, with a /tmp of its own."""
    (tmp_path / "tmp").mkdir()
    command = [sys.executable, "-m", "raytrain_brats.logs", "--session", str(session), "--every", "600"]
    environment = {**os.environ, "RAYTRAIN_BRATS_LOGS": to, "TMPDIR": str(tmp_path / "tmp")}
    return lambda: subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


def test_it_copies_once_more_when_it_is_ended(
    to: str, session: Path, tmp_path: Path, start: Callable[[], subprocess.Popen[str]]
) -> None:
    """SIGTERM, which a machine's shutdown sends, brings the last lines; our own helpers' logs come along; a second one
    on the machine ends at once."""
    write(session, "raylet.out", b"up")
    (tmp_path / "tmp" / "raytrain_brats-spot.log").write_text("watching")
    process, copier = start(), Copier(to, session, MB)
    deadline = time.monotonic() + 180
    while not kept(copier, session) and time.monotonic() < deadline:
        time.sleep(0.2)
    second = start()
    assert "another copier" in second.communicate(timeout=180)[0] and second.returncode == 0
    write(session, "raylet.out", b"up\nthe last line")
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=180)
    assert kept(copier, session) == {"raylet.out": b"up\nthe last line", "raytrain_brats-spot.log": b"watching"}


def test_without_a_place_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("RAYTRAIN_BRATS_LOGS", raising=False)
    assert logs.main([]) == 2
    assert "name one with --to, or set RAYTRAIN_BRATS_LOGS" in capsys.readouterr().err
