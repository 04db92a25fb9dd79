"""How a command starts: on whose Ray, with what around it; whose the signals are."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from raytrain_brats import home, interrupt, shadow
from raytrain_brats.errors import RunFailed, UserError
from raytrain_brats.ray_ext import cluster, start_up
from tests.support import ROOT
from tests.support.commands import environment, left, start


def test_a_second_signal_ends_what_the_first_cannot(place: Path) -> None:
    """Work that does not end on the first is ended by the second, with all that it started."""
    code = """
import subprocess, sys, time
from raytrain_brats import interrupt
interrupt.install()
subprocess.Popen(["sleep", "100"])
with interrupt.gracefully(60):
    while True:
        try:
            print("ready", flush=True)
            time.sleep(100)
        except KeyboardInterrupt:
            pass
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code], env=environment(MARK=place.name), stdout=subprocess.PIPE, text=True
    )
    assert process.stdout and process.stdout.readline()
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "ready\n"  # it went on
    time.sleep(1.2)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 130
    assert not left(place.name)


def test_who_imports_the_package_keeps_the_signals() -> None:
    """Handlers are a command's; an imported library puts none."""
    code = (
        "import signal as s, raytrain_brats.train, raytrain_brats.__main__; print(s.getsignal(s.SIGTERM) is s.SIG_DFL)"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True" and not interrupt.installed()


def test_a_start_that_takes_long_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A line at once, then how long it has been, now and then; none after it."""
    monkeypatch.setattr(start_up, "TELL_S", 0.05)
    with start_up.telling("starting Ray"):
        time.sleep(0.2)
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "starting Ray ..." and len(said) > 1 and set(said[1:]) == {"starting Ray: 0 s so far"}
    time.sleep(0.1)
    assert capsys.readouterr().out == ""


@pytest.fixture
def silent() -> Iterator[str]:
    """HOST:PORT of something that takes connections and never says a word, as a stopped head does."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


def test_a_ray_that_does_not_answer_is_told_within_seconds(silent: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """At RAY_ADDRESS: nothing there, something mute, something else; each with what to do, not after 14 minutes."""
    monkeypatch.setattr(start_up, "PATIENCE_S", 5.5)
    with socket.create_server(("127.0.0.1", 0)) as free:
        nobody = f"127.0.0.1:{free.getsockname()[1]}"
    for given in (silent, nobody):
        monkeypatch.setenv("RAY_ADDRESS", given)
        began = time.monotonic()
        with pytest.raises(UserError, match=f"no Ray cluster answers at RAY_ADDRESS={given} .*unset RAY_ADDRESS"):
            start_up.address()
        assert time.monotonic() - began < 60
    for given in ("ray://127.0.0.1:10001", "http://127.0.0.1:8265", "head"):
        monkeypatch.setenv("RAY_ADDRESS", given)
        with pytest.raises(UserError, match=r"is no HOST:PORT of a Ray head.*ray job submit"):
            start_up.address()


def test_a_file_left_by_a_cluster_that_is_gone_means_none(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is said in one line, and a Ray of our own starts; with RAY_ADDRESS=auto a cluster was asked for."""
    (place / "ray").mkdir()
    (place / "ray" / "ray_current_cluster").write_text("127.0.0.1:1\n")
    monkeypatch.setenv("RAY_TMPDIR", str(place))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert start_up.address() == ""
    assert f"no Ray answers at 127.0.0.1:1 (nothing listens there), which `ray start` left in {place}" in (
        capsys.readouterr().out
    )
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    with pytest.raises(UserError, match="RAY_ADDRESS=auto, but no Ray cluster runs here"):
        start_up.address()


def test_ray_finds_room_for_its_sockets(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A long TMPDIR, as of a batch job, is left for another place; a RAY_TMPDIR that is of no use is refused."""
    long = place / ("x" * 70)
    long.mkdir()
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setenv("TMPDIR", str(long))
    start_up.make_room()
    assert len(os.environ["RAY_TMPDIR"]) <= start_up.ROOM
    for given, why in ((long, "Ray's sockets leave room for"), (place / "gone", "does not exist")):
        monkeypatch.setenv("RAY_TMPDIR", str(given))
        with pytest.raises(UserError, match=f"RAY_TMPDIR={given} .*{why}.* short path"):
            start_up.make_room()
    monkeypatch.setenv("RAY_TMPDIR", str(place))
    start_up.make_room()
    (place / "ray").write_text("a file in the way")
    with pytest.raises(UserError, match="is no folder"):
        start_up.make_room()


def test_without_a_home_libraries_get_one(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A home that is not there is replaced; one that can be read alone stays, for the credentials in it."""
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    monkeypatch.setenv("HOME", "/nonexistent")
    monkeypatch.delenv("MPLCONFIGDIR", raising=False)
    home.provide()
    assert os.environ["HOME"] == os.environ["MPLCONFIGDIR"] == str(place / f"raytrain_brats-{os.getuid()}")
    assert home.writable()
    monkeypatch.setenv("HOME", "/proc/self")  # root may write anywhere else
    home.provide()
    assert os.environ["HOME"] == "/proc/self"


def test_an_account_without_name_and_home_can_work(place: Path) -> None:
    """`docker run --user 54321`: no entry in passwd, no HOME; what asks for them when imported is content, and mute."""
    code = """
import pwd, sys
def getpwuid(number):
    raise KeyError(f"getpwuid(): uid not found: {number}")
pwd.getpwuid, sys.argv = getpwuid, ["raytrain-brats"]
import raytrain_brats.__main__, raytrain_brats.run.driver, raytrain_brats.reporting.figures
import torch._inductor.runtime.cache_dir_utils as torch_caches
torch_caches.default_cache_dir()
"""
    bare = {k: v for k, v in environment().items() if k not in ("HOME", "USER", "LOGNAME", "USERNAME")}
    done = subprocess.run([sys.executable, "-c", code], env=bare, cwd=place, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr


@pytest.mark.parametrize("name", ["nibabel.py", "monai/__init__.py", "random.py"])
def test_a_file_that_hides_a_library_is_named(name: str, place: Path) -> None:
    """In the current folder, before anything imports it; the package's own and plain folders are no clash."""
    assert shadow.clash(str(place)) == ""
    (place / "data").mkdir()
    (place / "monai").mkdir()  # a folder that is no package gives way to one that is
    (place / "mine.py").write_text("x = 1")
    assert shadow.clash(str(place)) == "" == shadow.clash(str(ROOT))
    (place / name).write_text("raise SystemExit('mine was taken')")
    process = start("index", place)
    said = process.communicate(timeout=180)[0]
    library = name.removesuffix("/__init__.py").removesuffix(".py")
    assert process.returncode == 2 and said.count("\n") == 1, said
    assert said.startswith(f"error: {place / name.split('/')[0]} would be taken for the Python library {library};")


def test_workers_are_not_given_a_folder_that_hides_a_library(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The installed command, which does not look there itself: Ray puts the current folder first for its workers."""
    (place / "nibabel.py").write_text("x = 1")
    monkeypatch.chdir(place)
    with pytest.raises(UserError, match=r"nibabel\.py would be taken for the Python library nibabel; rename it"):
        start_up.check_folder()


def test_a_forked_child_is_nobodys_signal(place: Path) -> None:
    """A library that forks a helper and ends it by SIGTERM does not interrupt the command."""
    code = """
import os, signal, sys, time
from raytrain_brats import interrupt
interrupt.install()
if not (child := os.fork()):
    time.sleep(100)
time.sleep(0.3)
os.kill(child, signal.SIGTERM)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
time.sleep(0.5)
print("went on")
"""
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, timeout=180)
    assert done.stdout.split("\n") == ["-15", "went on", ""], done.stderr


def test_a_machine_on_which_ray_does_not_start_in_time_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray gives up with a bare Exception when the machine is overloaded; any other fault of its start stays itself."""
    monkeypatch.setenv("RAY_ADDRESS", "local")
    monkeypatch.setattr(cluster.ray, "is_initialized", lambda: False)
    for said, kind in (("The current node timed out during startup. ...", RunFailed), ("another fault", Exception)):

        def start(said: str = said, **_: object) -> None:
            raise Exception(said)

        monkeypatch.setattr(cluster.ray, "init", start)
        with pytest.raises(kind, match="overloaded" if kind is RunFailed else said):
            cluster.connect()
