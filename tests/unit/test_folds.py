"""The folds of one data set: which cases they hold, and their runs side by side. Stand-ins train in test_folds' place;
tests/ray/test_folds.py has real ones."""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from raytrain_brats import config, train
from raytrain_brats.cases import scan
from raytrain_brats.data.manifest import Case
from raytrain_brats.errors import RunFailed, UserError
from raytrain_brats.run import folds, lease
from raytrain_brats.run.folds import Plan, shared_out
from tests.support.cases import write_msd_folder

STAND_IN = """
import os, pathlib, signal, sys, time
fold, place, seconds = int(sys.argv[1]), pathlib.Path(sys.argv[2]), float(sys.argv[3])
def stop(*_):
    print("saved", flush=True)
    (place / f"saved-{fold}").touch()
    sys.exit(130)
signal.signal(signal.SIGTERM, stop)
(place / f"began-{fold}").write_text(str(os.getpid()))
print("sample 1 of 2", flush=True)
time.sleep(seconds)
if (place / f"fails-{fold}").exists():
    print("failed: the disk is on fire", file=sys.stderr)
    sys.exit(int((place / f"fails-{fold}").read_text() or 1))
(place / f"ended-{fold}").touch()
"""


def command(place: Path, seconds: float = 0.3) -> Callable[[int, str], list[str]]:
    return lambda fold, workers: [sys.executable, "-c", STAND_IN, str(fold), str(place), str(seconds)]


def test_subjects_and_copies_are_in_one_fold() -> None:
    """Time points of a subject, and subjects of which a file is the same, directly or through others: never held out
    from a network that has seen the other."""
    cases = [
        Case(f"P{subject}-{time}", f"P{subject}", ("image",), "label", 1, sha256=f"{subject}-{time}")
        for subject in range(60)
        for time in range(1 + subject % 3)
    ]
    cases += [  # P7 was given out twice more, the second time as a later scan of another
        Case("Q1-0", "Q1", ("image",), "label", 1, sha256="7-0"),
        Case("Q2-0", "Q2", ("image",), "label", 1, sha256="7-1"),
    ]
    fold_of = {case.id: case.fold for case in scan.dealt(cases)}
    for case in cases:
        assert fold_of[case.id] == fold_of[f"{case.subject}-0"]
    assert fold_of["Q1-0"] == fold_of["P7-0"] == fold_of["P7-1"] == fold_of["Q2-0"]
    assert set(fold_of.values()) == set(range(5))


def test_folds_train_side_by_side_as_there_is_room(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two places for five folds: never three at once; each line carries its fold."""
    most, over = [0], threading.Event()

    def watch() -> None:
        while not over.wait(0.01):
            count = {kind: len(list(tmp_path.glob(f"{kind}-*"))) for kind in ("began", "ended")}
            most[0] = max(most[0], count["began"] - count["ended"])

    watcher = threading.Thread(target=watch)
    watcher.start()
    folds.train(range(5), command(tmp_path), Plan(("1", "1")))
    over.set()
    watcher.join()
    assert len(list(tmp_path.glob("ended-*"))) == 5 and most[0] == 2
    lines = capsys.readouterr().out.splitlines()
    assert sorted(lines) == [f"fold {fold}: sample 1 of 2" for fold in range(5)]


def test_a_fold_that_fails_stops_no_other(tmp_path: Path) -> None:
    """All others end; one line names each that failed, with its last word; a mistake in all of them is the user's."""
    (tmp_path / "fails-1").write_text("1")
    (tmp_path / "fails-3").write_text("2")
    with pytest.raises(RunFailed) as raised:
        folds.train(range(5), command(tmp_path, 0), Plan(("",)))
    assert sorted(path.name for path in tmp_path.glob("ended-*")) == ["ended-0", "ended-2", "ended-4"]
    assert str(raised.value) == (
        "2 of 5 folds failed (fold 1: the disk is on fire; fold 3: the disk is on fire); "
        "the same command goes on with them"
    )
    (tmp_path / "fails-1").write_text("2")
    with pytest.raises(UserError, match="the disk is on fire"):
        folds.train((1, 3), command(tmp_path, 0), Plan(("", "")))


def test_ctrl_c_saves_all_and_begins_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each that trains is told once and waited for; those that wait do not start."""

    def interrupt() -> None:
        while len(list(tmp_path.glob("began-*"))) < 2:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        folds.train(range(5), command(tmp_path, 60), Plan(("1", "1")))
    assert sorted(path.name for path in tmp_path.glob("saved-*")) == ["saved-0", "saved-1"]
    assert len(list(tmp_path.glob("began-*"))) == 2
    assert "fold 1: saved" in capsys.readouterr().out.splitlines()
    for path in tmp_path.glob("began-*"):
        with pytest.raises(ProcessLookupError):
            os.kill(int(path.read_text()), 0)


def test_room_is_shared_out() -> None:
    """A GPU a worker; what is left over goes to the first; as the user says where the user does; no worker without a
    sample of the step."""
    settings = config.load("demo")
    for room, workers, expected in (
        (1, "", ("",)),
        (2, "", ("1", "1")),
        (5, "", ("1",) * 5),
        (8, "", ("1:2", "1:2", "1:2", "1", "1")),
        (64, "", ("1:4",) * 5),
        (8, "1:2", ("1:2",) * 4),
        (8, "16", ("16",)),
    ):
        assert shared_out(room, 5, workers, settings) == Plan(expected)


def test_one_fold_at_a_time_without_cluster_and_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """And no Ray is started to learn that."""
    monkeypatch.setattr(folds.start_up, "address", lambda: "")
    monkeypatch.setattr(folds, "_gpus_here", lambda: False)
    monkeypatch.setattr(folds.cluster, "connect", lambda **_: pytest.fail("Ray was started"))
    assert folds.plan(5, config.load("demo"), "1:2") == Plan(("1:2",))


def test_a_fold_ends_when_its_command_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    """It gets SIGTERM, as by hand; a command that nobody started so does not."""
    told = threading.Event()
    monkeypatch.setattr(os, "kill", lambda pid, number: told.set() if number == signal.SIGTERM else None)
    folds.end_with_parent()
    parent = [os.getppid()]
    monkeypatch.setattr(os, "getppid", lambda: parent[0])
    monkeypatch.setenv(folds.PARENT, str(parent[0]))
    folds.end_with_parent()
    assert not told.wait(1.5)
    parent[0] = 1
    assert told.wait(5)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_msd_folder(tmp_path / "data", 8, shape=(16, 14, 12))


def test_the_cases_are_read_once_for_all_folds(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folds' commands name the manifest that the first has made, the settings and the workers given."""
    called: list[Any] = []
    monkeypatch.setattr(folds, "train", lambda there, command, plan: called.append((there, command(3, "1:2"))))
    monkeypatch.setattr(folds, "plan", lambda *_: Plan(("1:2", "1:2")))
    for name in ("DATA", "STORE", "RUN_DIR"):
        monkeypatch.delenv(f"RAYTRAIN_BRATS_{name}", raising=False)
    run, settings = tmp_path / "run", ["--set", "preprocess.spacing_mm=1.0", "--set", "data.patch_xyz=[16,16,16]"]
    words = ["--data", str(data), "--run-dir", str(run), "--recipe", "demo", *settings]
    assert train.main([*words, "--fold", "all"]) == 0
    ((there, line),) = called
    assert there == [0, 1, 2, 3, 4] and (run / "manifest.jsonl").exists()
    expected = ["--data", f"{run}/manifest.jsonl", "--run-dir", str(run), "--recipe", "demo", "--fold", "3"]
    assert line[3:] == ["train", *expected, "--workers", "1:2", *settings]


def test_all_folds_have_one_driver(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A second command that trains all is refused at once; it would take folds of the first."""
    monkeypatch.setattr(folds, "train", lambda *_: None)
    monkeypatch.setattr(folds, "plan", lambda *_: Plan(("1",)))
    run = tmp_path / "run"
    with lease.hold(str(run)):
        assert train.main(["--data", str(data), "--run-dir", str(run), "--recipe", "demo", "--fold", "all"]) == 2
    assert "is being trained by another driver" in capsys.readouterr().err


def test_places_and_words_that_do_not_fit_are_refused(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """No such fold, a fold said twice, a folder that holds a run or other files, a run in a folder of folds."""
    monkeypatch.setattr(folds.cluster, "connect", lambda **_: pytest.fail("Ray was started"))

    def fails(*words: str) -> str:
        assert train.main(["--data", str(data), "--recipe", "demo", *words]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line

    run = tmp_path / "run"
    assert "give 0 to 4, or all" in fails("--run-dir", str(run), "--fold", "5")
    assert "leave one out" in fails("--run-dir", str(run), "--fold", "1", "--set", "data.fold=2")
    run.mkdir()
    (run / "config.yaml").write_text("x")
    assert "holds a run of its own" in fails("--run-dir", str(run), "--fold", "all")
    (run / "config.yaml").rename(run / "mine.txt.gz")
    assert "mine.txt.gz, no run of a fold" in fails("--run-dir", str(run), "--fold", "2")
    (run / "mine.txt.gz").unlink()
    (run / "fold-2").mkdir()
    (run / "fold-2" / "config.yaml").write_text("x")
    assert "say --fold all or --fold K" in fails("--run-dir", str(run))
