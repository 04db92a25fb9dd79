"""The line a person reads while a run goes on."""

import dataclasses
import json
import re
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.util.metrics import Gauge
from rich.console import Console

from raytrain_brats import books
from raytrain_brats.errors import UserError
from raytrain_brats.monitoring import progress
from raytrain_brats.monitoring.live_line import Standing, clock, fitted, standing, whole
from raytrain_brats.run import journal
from tests.support.simulated_run import Run


def describe(*about: Any) -> str:
    return whole(standing(*about))


def row(seen: int, at: float, **changes: Any) -> dict[str, Any]:
    about = {"samples_seen": seen, "positions": [seen - 4, seen], "world_size": 2, "loss": 0.5, "time": at}
    return about | {"step_s": 2.0, "wait_s": 0.5} | changes


def group(number: int, at: float) -> dict[str, Any]:
    return {"event": "group", "generation": number, "time": at}


def test_before_the_first_step() -> None:
    """It says that it starts, then that workers do."""
    assert describe([], [], 4000) == "starting"
    assert describe([], [group(1, 0)], 4000) == "sample 0 of 4,000: workers are starting"


def test_how_far_how_well_how_fast_how_long() -> None:
    """Means of the recent steps; the time left follows from samples per second."""
    rows = [row(seen, seen, loss=loss) for seen, loss in ((1200, 0.4), (1204, None), (1208, 0.6))]
    assert describe(rows, [group(1, 0)], 1508) == (
        "sample 1,208 of 1,508 | loss 0.500 | 2.0 samples/s | 25% waiting for data | 2 workers | 2:30 left"
    )
    assert "| loss - |" in describe([row(4, 1, loss=None, world_size=1)], [], 8)
    assert "| 1 worker |" in describe([row(4, 1, world_size=1)], [], 8)


def test_only_recent_steps_count() -> None:
    """A slow start is forgotten after twenty steps."""
    rows = [row(4 * n, n, step_s=100.0 if n <= 5 else 2.0, loss=9.0 if n <= 5 else 0.5) for n in range(1, 26)]
    assert "loss 0.500 | 2.0 samples/s" in describe(rows, [], 1000)


def test_for_what_training_stood_still() -> None:
    """Between the last two checkpoints, beside the wait for data; not where it is less than a per cent."""
    saved = {"event": "checkpoint", "samples_seen": 4}
    events = [saved | {"time": n, "stall": {"checkpoint": 0.3 / n, "validation": 0.004}} for n in (1, 6)]
    assert "| 25% waiting for data, 5% saving | 2 workers |" in describe([row(4, 1)], events, 8)


def test_scores_and_restarts() -> None:
    """The last validation by region; how often the group was started again."""
    scores = {"event": "validation", "dice": {"WT": 0.9, "TC": 0.805, "ET": 0.7}, "time": 3}
    rows, older = [row(4, 5)], scores | {"dice": {"WT": 0, "TC": 0, "ET": 0}}
    assert "| Dice WT 0.90 TC 0.81 ET 0.70 |" in describe(rows, [group(1, 0), older, scores], 8)
    assert describe(rows, [group(1, 0), group(2, 1)], 8).endswith("| 1 restart")
    assert describe(rows, [group(1, 0), group(2, 1), group(3, 2)], 8).endswith("| 2 restarts")


def test_between_two_worker_groups() -> None:
    """While a new group starts, the line says so instead of showing the old speed."""
    assert describe([row(8, 5)], [group(1, 0), group(2, 6)], 80) == "sample 8 of 80: worker group 2 is starting"


@pytest.mark.parametrize("error", [OSError("away"), UserError("s3://x: S3 answers 403"), ValueError("line 3")])
def test_books_that_cannot_be_read_do_not_end_the_picture(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    """The line says why; the next look may work again."""

    def fail(_: str) -> Any:
        raise error

    class RunSpec:
        run_dir = "s3://x/run"

    monkeypatch.setattr(books, "recent", fail)
    line = progress.Progress(RunSpec())._update()  # type: ignore[arg-type]
    assert isinstance(line, str)
    assert "cannot be read just now" in line and str(error) in line


def test_metrics_are_taken_from_the_books_now_and_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From all events, not from the tail that the line needs; at most every ten seconds; nothing when nobody knows."""
    run, step, told = Run(), ("step", 2.0, 0.5), dict[str, float]()
    run.group([*[step, ("checkpoint", 0.1, 0.5), ("commit", 0, 0)] * 300, step], "alive")
    spec: Any = SimpleNamespace(run_dir=str(tmp_path), sampler=SimpleNamespace(total=4000))
    monkeypatch.setattr(Gauge, "set", lambda gauge, value, tags: told.update({gauge.info["name"]: value}))
    picture = progress.Progress(spec)
    picture._update()
    assert "raytrain_brats_goodput" not in told
    for name, lines in (("events", run.events), ("metrics", run.rows)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    told.clear()
    picture._update()
    assert not told
    picture._next_measure = 0.0
    picture._update()
    assert told["raytrain_brats_goodput"] == pytest.approx(600 / (run.now - 1e6))
    assert told["raytrain_brats_samples_total"] == 4000


def test_a_run_that_goes_on_says_nothing_of_before() -> None:
    """Speed, loss and time left are this launch's: until its first step the line says that it starts, and where."""
    old = [row(seen, seen, generation=1) for seen in (4, 8)]
    assert describe(old, [group(1, 0)], 80, "", 1) == "sample 8 of 80: starting"
    assert describe(old, [group(1, 0), group(2, 101)], 80, "", 1) == "sample 8 of 80: worker group 2 is starting"
    line = describe([*old, row(12, 105, step_s=4.0, generation=2)], [group(1, 0), group(2, 101)], 80, "", 1)
    assert line.startswith("sample 12 of 80 |") and "| 1.0 samples/s |" in line


NOW = Standing(
    1208, 1508, "", "", 150.0, 0.5, {"WT": 0.9, "TC": 0.805, "ET": 1.0}, 2.0, 0.25, ", 5% saving", 2, 1,
    ("$12.00/h, $3.40 so far",),
)  # fmt: skip


@pytest.mark.parametrize(
    ("width", "line"),
    [
        (48, "80%  2:30 left  loss 0.500  Dice .90 .81 1.00"),
        (68, "80%  2:30 left  loss 0.500  Dice .90 .81 1.00  2.0/s  wait 25%"),
        (98, "80%  2:30 left  loss 0.500  Dice WT 0.90 TC 0.81 ET 1.00  2.0/s  wait 25%  2 workers  1 restart"),
        (10, "80%"),
    ],
)
def test_a_terminal_is_told_as_much_as_it_has_room_for(width: int, line: str) -> None:
    """At 60, 80 and 120 columns, beside a bar of 10 or 20: percent, time left, loss, Dice, speed, wait, in this order
    of importance; then words. Never more than the width, whatever the numbers."""
    assert fitted(NOW, width) == line
    long = dataclasses.replace(NOW, seen=9_999_999, total=10_000_000, left_s=3e5, speed=12345.6, workers=1000)
    failing = dataclasses.replace(long, warning="not saved since sample 20: No space left on device " * 3)
    starting = dataclasses.replace(NOW, instead="sample 8 of 80: worker group 2 is starting")
    for now in (NOW, long, failing, starting):
        assert len(fitted(now, width)) <= width
    assert fitted(long, max(width, 20)).startswith("99%  3 d 11 h left"), "not 100% before the end"
    assert width < 48 or "not saved since" in fitted(failing, width)


def test_times_to_go() -> None:
    """Minutes, hours and days are not taken for each other."""
    assert [clock(s) for s in (0, 150, 3599, 3600, 12_000, 300_000)] == [
        "0:00", "2:30", "59:59", "1 h 00 min", "3 h 20 min", "3 d 11 h",
    ]  # fmt: skip


@pytest.mark.parametrize("columns", [60, 80, 120])
def test_the_live_line_stays_in_one_line(
    columns: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a terminal of this width the bar and its numbers take no second line, and all are there that must be."""
    monkeypatch.setenv("COLUMNS", str(columns))
    spec: Any = SimpleNamespace(run_dir=str(tmp_path), sampler=SimpleNamespace(total=1508))
    picture = progress.Progress(spec)
    picture._console = Console(force_terminal=True, width=columns, no_color=True)
    monkeypatch.setattr(picture, "_update", lambda show: NOW)
    with picture:
        said = printed(capsys, "loss 0.500")
    drawn = [re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", line).strip("\r") for line in said.splitlines()]
    (line,) = {line.strip() for line in drawn if "loss" in line} or {""}
    assert len(line) <= columns and "80%" in line and "2:30 left" in line and "Dice" in line
    assert columns == 60 or "wait 25%" in line


FAILED = {"event": "checkpoint_failed", "samples_seen": 40, "time": 5.0}
FULL = "[Errno 28] No space left on device: '/run/checkpoints/000040-g1/.x.tmp'"


def test_that_nothing_is_saved_stands_in_the_line_until_something_is() -> None:
    """From which sample on and why; at the end, that it waits for room instead of `0:00 left`."""
    saved = {"event": "checkpoint", "samples_seen": 20, "time": 4.0}
    line = describe([row(40, 5)], [group(1, 0), saved, FAILED | {"error": FULL}], 80)
    assert line.startswith("sample 40 of 80 | not saved since sample 20: No space left on device | loss")
    assert "not saved" not in describe([row(40, 5)], [FAILED | {"error": FULL}, saved], 80)
    end = describe([row(80, 5)], [saved, FAILED | {"error": FULL}], 80)
    assert "waiting for room to save the last checkpoint" in end and "0:00 left" not in end
    # the books themselves find no room: the driver's own writing tells
    assert "not saved since sample 20: No space left" in describe([row(40, 5)], [saved], 80, FULL)


def printed(capsys: pytest.CaptureFixture[str], what: str) -> str:
    """All that is printed until this is in it."""
    said, deadline = "", time.monotonic() + 60
    while what not in said:
        assert time.monotonic() < deadline, said
        time.sleep(0.05)
        said += capsys.readouterr().out
    return said


@pytest.mark.parametrize("terminal", [False, True])
def test_a_save_that_fails_is_told_at_once(
    terminal: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line when it begins, none for the next of the same cause, one when it is over; also above a live bar."""
    spec: Any = SimpleNamespace(run_dir=str(tmp_path), sampler=SimpleNamespace(total=4000))
    monkeypatch.setenv("COLUMNS", "200")
    with progress.Progress(spec) as picture:
        picture._console._force_terminal = terminal
        said = ""
        for name, told in (("a", "warning: not saved: No space left on device;"), ("b", "")):
            journal.event(str(tmp_path), "checkpoint_failed", samples_seen=4, error=FULL.replace("000040", name))
            said += printed(capsys, told) if told else (time.sleep(1.5), "")[1]
        journal.event(str(tmp_path), "checkpoint", samples_seen=8)
        said += printed(capsys, "saved again")
        assert said.count("warning: not saved: No space left on device;") == 1


def test_what_a_person_should_know_is_told_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Why a group failed, who hung, what case is not used, what another process warns of: a line each."""
    spec: Any = SimpleNamespace(run_dir=str(tmp_path), sampler=SimpleNamespace(total=4000))
    journal.warn(str(tmp_path), "of an earlier launch")
    time.sleep(0.01)
    with progress.Progress(spec):
        for _ in range(2):
            journal.event(str(tmp_path), "quarantine", case="BRATS_007", reason="truncated", detail="12 bytes short")
        journal.event(str(tmp_path), "failure", generation=1, rank=0, error="RuntimeError: it died")
        hang = {"rank": 1, "for_s": 63.0, "phase": "forward", "stacks": "run/stacks/x.txt"}
        journal.event(str(tmp_path), "hang", generation=2, **hang)
        journal.event(str(tmp_path), "early_stop", samples_seen=8, reason="no gain")
        journal.warn(str(tmp_path), "no checkpoint before the resize")
        lines = (printed(capsys, "no checkpoint before the resize") + capsys.readouterr().out).splitlines()
    for told in (
        "warning: case BRATS_007 is not used: truncated (12 bytes short)",
        "worker group 1 failed and starts again: RuntimeError: it died",
        "warning: rank 1 hung for 63 s in phase forward, its group starts again; stacks: run/stacks/x.txt",
        "ends early: no gain",
        "warning: no checkpoint before the resize",
    ):
        assert lines.count(told) == 1, lines
    assert not [line for line in lines if "earlier" in line]


def test_what_was_planned_stands_beside_what_happens(tmp_path: Path) -> None:
    """With plan.json in the run folder; without it, or with a damaged one, there is no word of a plan."""
    plan = {"samples_per_s": 320.4, "data_wait": 0.02, "seconds": 9000, "usd": 59.5}
    for content, words in ((json.dumps({"plan": plan}), True), ("{", False), ('{"plan": {}}', False)):
        (tmp_path / "plan.json").write_text(content)
        spec: Any = SimpleNamespace(run_dir=str(tmp_path), sampler=SimpleNamespace(total=4000))
        now = progress.Progress(spec)._update()
        assert not isinstance(now, str)
        line = whole(now)
        told = " | planned: 320.4 samples/s, 2% waiting for data, 2.5 h in all, $59.50"
        assert line.endswith(told) is words and ("planned" in line) is words
