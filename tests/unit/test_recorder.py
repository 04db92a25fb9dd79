"""What a rank writes down, and what it does when steps are not finite or the disk is full."""

import dataclasses
import resource
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from raytrain_brats import books, storage
from raytrain_brats.errors import UserError
from raytrain_brats.learn.step import StepResult
from raytrain_brats.run import checkpoint, checkpoint_request, control, driver, journal, phase_timer
from raytrain_brats.run.checkpoint_request import HOLD, SAVE
from raytrain_brats.run.feed import batch_of
from raytrain_brats.run.phase_timer import PhaseTimer
from raytrain_brats.run.rank import Rank
from raytrain_brats.run.recorder import ROLL_BACK_AFTER, RunRecorder
from raytrain_brats.run.rows import MetricsLog
from raytrain_brats.run.worker import train_step_of
from tests.support.steps import CPU, arrived, patch, spec

GOOD = StepResult(0.5, 0, True, False, 17, 0, 0.1, (0.01,))
BAD = dataclasses.replace(GOOD, loss=None, finite=False)
OVERFLOW = dataclasses.replace(GOOD, finite=False, overflow=True)


def recorder_at(run_dir: Path) -> RunRecorder:
    """A worker group of one rank that goes on where the run stands."""
    run_spec = dataclasses.replace(spec(), run_dir=str(run_dir), dataset_identity="x")
    return RunRecorder(run_spec, journal.begin_generation(str(run_dir)), Rank(0, 1, CPU), PhaseTimer())


def steps(recorder: RunRecorder, result: StepResult, start: int, count: int) -> None:
    for number in range(count):
        recorder.step(start + 4 * number, start + 4 * number + 4, arrived(result), [])
    recorder.drain()


def events(run_dir: Path, kind: str) -> list[dict[str, Any]]:
    return [e for e in books.read_events(str(run_dir)) if e["event"] == kind]


def test_steps_that_stay_non_finite_go_back_before_the_trouble_then_stop(tmp_path: Path) -> None:
    """Ten in a row: the group ends and goes on from the checkpoint before them; the third time the run stops."""
    train_step = train_step_of(spec(), 1, CPU)
    for time_ in range(3):
        with recorder_at(tmp_path) as recorder:
            if time_ == 0:
                steps(recorder, GOOD, 0, 2)
                recorder.checkpoint(8, train_step)
            assert recorder.generation.roll_backs == time_ and recorder.generation.samples_seen == (8 if time_ else 0)
            steps(recorder, BAD, 8, ROLL_BACK_AFTER - 1)
            recorder.checkpoint(
                8 + 4 * (ROLL_BACK_AFTER - 1), train_step
            )  # none: it would hold what led to the trouble
            if time_ < 2:
                with pytest.raises(FloatingPointError, match="positions 8 to 47"):
                    steps(recorder, BAD, 8 + 4 * (ROLL_BACK_AFTER - 1), 1)
            else:
                steps(recorder, BAD, 8 + 4 * (ROLL_BACK_AFTER - 1), 1)
                assert recorder.stopped
    assert [e["positions"] for e in events(tmp_path, "roll_back")] == [[8, 48], [8, 48]]
    assert "positions 8 to 47" in events(tmp_path, "stop")[0]["reason"]
    assert [c[1] for c in checkpoint.committed(str(tmp_path))] == [8]


def test_loss_scaling_that_finds_its_place_is_no_trouble(tmp_path: Path) -> None:
    """fp16 overflows of the first steps are skipped as ever, and count for nothing."""
    with recorder_at(tmp_path) as recorder:
        steps(recorder, OVERFLOW, 0, 30)
        steps(recorder, BAD, 120, ROLL_BACK_AFTER - 1)
        steps(recorder, GOOD, 156, 1)
        steps(recorder, BAD, 160, ROLL_BACK_AFTER - 1)
    assert not events(tmp_path, "roll_back") and not recorder.stopped


@contextmanager
def no_file_beyond(size: int) -> Iterator[None]:
    """The kernel refuses to let any file of this process grow beyond `size` bytes: a full disk, without root."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))


def test_a_full_disk_costs_checkpoints_not_the_run(tmp_path: Path) -> None:
    """Training goes on, the last good checkpoint stays, the event tells; with room again all is made up for."""
    train_step = train_step_of(spec(), 1, CPU)
    with recorder_at(tmp_path) as recorder:
        steps(recorder, GOOD, 0, 2)
        recorder.checkpoint(8, train_step)
        recorder._saver.wait()
        steps(recorder, GOOD, 8, 2)
        with no_file_beyond(400):
            steps(recorder, GOOD, 16, 3)  # the rows find no room, nor a part of one
            recorder.checkpoint(28, train_step)
            recorder._saver.wait()
        assert all(path.read_bytes()[-1:] in (b"", b"\n") for path in (tmp_path / "metrics").iterdir())
        assert checkpoint.newest_valid(str(tmp_path))[0].samples_seen == 8
        steps(recorder, GOOD, 28, 1)
        recorder.checkpoint(32, train_step)
    assert [row["samples_seen"] for row in books.read_rows(str(tmp_path))] == list(range(4, 36, 4))
    assert checkpoint.newest_valid(str(tmp_path))[0].samples_seen == 32
    failed = events(tmp_path, "checkpoint_failed")
    assert [e["samples_seen"] for e in failed] == [28] and "Errno" in failed[0]["error"]
    assert not list(tmp_path.rglob("*.tmp"))


def test_an_event_that_finds_no_room_is_told_later(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """None is lost, none is torn, order stays."""
    journal.event(str(tmp_path), "first")
    (segment,) = (tmp_path / "events").iterdir()
    with no_file_beyond(segment.stat().st_size + 20):
        journal.event(str(tmp_path), "second")
        journal.event(str(tmp_path), "third")
    journal.event(str(tmp_path), "fourth")
    assert [e["event"] for e in books.read_events(str(tmp_path))] == ["first", "second", "third", "fourth"]
    assert "second: not written to events/ yet" in caplog.text


def test_a_save_that_is_still_under_way_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A slow storage makes checkpoints rarer; it does not hold the training up."""
    real, stored = checkpoint.save, threading.Event()
    monkeypatch.setattr(checkpoint, "save", lambda *a, **k: (stored.wait(60), real(*a, **k))[1])
    train_step = train_step_of(spec(), 1, CPU)
    with recorder_at(tmp_path) as recorder:
        for number in range(3):
            steps(recorder, GOOD, 4 * number, 1)
            recorder.checkpoint(4 * number + 4, train_step)
        stored.set()  # had a step waited, the save before it would have ended, and none been left out
    assert [e["samples_seen"] for e in events(tmp_path, "checkpoint_left_out")] == [8, 12]
    assert [c[1] for c in checkpoint.committed(str(tmp_path))] == [4]


def test_the_clock_shares_every_moment_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What checkpoints say was spent is the time between their marks, no more and no less.

    By a clock on which every phase takes 50 ms.
    """
    clock = [1.7e9]
    monkeypatch.setattr(phase_timer, "time", SimpleNamespace(time=lambda: clock[0], perf_counter=lambda: clock[0]))
    train_step = train_step_of(spec(), 1, CPU)
    with recorder_at(tmp_path) as recorder:
        timer = recorder.timer
        timer._on_enter = lambda _: clock.insert(0, clock[0] + 0.05)
        timer.enter("validate")  # before the first batch: start-up
        timer.enter("data")
        for seen in (4, 8, 12):
            train_step.launch(batch_of([patch(i) for i in range(4)], seen - 4, CPU), seen - 4, 0, timer.enter)
            timer.enter("save")
            steps(recorder, GOOD, seen - 4, 1)
            recorder.checkpoint(seen, train_step)
            recorder._saver.wait()
            timer.enter("data")
    marks = events(tmp_path, "checkpoint") + events(tmp_path, "closed")
    assert timer.first_batch == pytest.approx(1.7e9 + 0.1, abs=1e-3)
    for before, event in zip([timer.first_batch, *(e["mark"] for e in marks)], marks, strict=False):
        assert sum(event["spent"].values()) == pytest.approx(event["mark"] - before, abs=2e-3)
        for cause, share in event["stall"].items():
            assert share == pytest.approx(event["spent"].get(f"{cause}_s", 0.0) / (event["mark"] - before), abs=0.02)
    assert len(marks) == 4 and all(e["spent"]["data_wait_s"] == pytest.approx(0.05, abs=1e-3) for e in marks[1:3])
    assert set(marks[0]["stall"]) == {"data_wait", "checkpoint", "validation"} and marks[1]["stall"]["checkpoint"] > 0


def test_a_step_waited_for_data_and_computed(tmp_path: Path) -> None:
    """The row's seconds are those of its own step; neither the saving before it nor its own counts."""
    timer, began = PhaseTimer(), time.monotonic()
    for phase, seconds in (("data", 0.2), ("forward", 0.1), ("update", 0.05), ("save", 0.3)):
        timer.enter(phase)
        time.sleep(seconds)
    wait_s, step_s = timer.step_times()
    assert wait_s >= 0.2 and step_s >= wait_s + 0.15 and step_s <= time.monotonic() - began - 0.3
    assert timer.step_times() == (0.0, 0.0) and timer.updates == 1 and timer.entries == 4


@pytest.mark.parametrize("place", ["local", "s3"])
def test_requests_are_heard_once_and_by_the_group_they_are_for(
    place: str, request: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a thread: a storage that is away costs no step."""
    run_dir = str(tmp_path) if place == "local" else f"{request.getfixturevalue('s3_server')}/run"
    monkeypatch.setattr(checkpoint_request.RequestPoller, "EVERY_S" if place == "local" else "EVERY_S3_S", 0.05)
    with checkpoint_request.RequestPoller(run_dir, 3) as poller:
        for generation, expected in ((2, 0), (3, HOLD)):
            text = f'{{"generation": {generation}, "what": {HOLD}, "time": {time.time()}}}'
            storage.write_bytes(f"{run_dir}/save-request.json", text.encode())
            deadline, heard = time.monotonic() + (1 if not expected else 60), 0
            while time.monotonic() < deadline and not heard:
                time.sleep(0.02)
                heard = poller.poll()
            assert heard == expected
        assert poller.poll() == 0


@pytest.mark.parametrize("wants", [(HOLD, HOLD), (SAVE, HOLD), (HOLD, SAVE)])
@pytest.mark.parametrize("apart_s", [0.0, 0.3])
def test_controller_and_driver_may_ask_at_once(
    wants: tuple[int, int], apart_s: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A resize and Ctrl-C, say: both are told that the group is saved, though it listens to neither once it holds."""
    run_dir, generation = str(tmp_path), begun(tmp_path)
    monkeypatch.setattr(checkpoint_request.RequestPoller, "EVERY_S", 0.1)
    poller, over = checkpoint_request.RequestPoller(run_dir, generation.number), threading.Event()

    def group() -> None:
        heard = 0
        while heard != HOLD and not over.is_set():
            if heard := poller.poll():
                holds = {"holds_since": time.time()} if heard == HOLD else {}
                control.note(run_dir, generation.number, answered=poller.answered, **holds)
            time.sleep(0.02)

    with poller, ThreadPoolExecutor(3) as pool:
        pool.submit(group)
        first = pool.submit(checkpoint_request.request, run_dir, wants[0])
        time.sleep(apart_s)
        second = pool.submit(checkpoint_request.request, run_dir, wants[1])
        try:
            assert first.result(timeout=60)
            assert second.result(timeout=60)
        finally:
            over.set()


def test_nobody_waits_for_a_group_that_was_replaced(tmp_path: Path) -> None:
    """The new group does not know of the request: the answer is no, at once."""
    begun(tmp_path)
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(checkpoint_request.request, str(tmp_path), SAVE)
        time.sleep(0.3)
        journal.begin_generation(str(tmp_path))
        assert asked.result(timeout=60) is False  # the request's own patience is longer


def test_a_request_that_was_not_answered_in_time_is_withdrawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A group that finds it later must not hold: whoever asked does not wait for it any more."""
    generation = begun(tmp_path)
    monkeypatch.setattr(checkpoint_request, "TIMEOUT_S", 0.3)
    assert checkpoint_request.request(str(tmp_path), HOLD) is False
    with checkpoint_request.RequestPoller(str(tmp_path), generation.number) as poller:
        deadline = time.monotonic() + 60
        while not poller._request and time.monotonic() < deadline:
            time.sleep(0.05)
        assert poller._request and poller.poll() == 0


def test_slow_steps_are_waited_for(tmp_path: Path) -> None:
    """On a CPU a step may take longer than any fixed limit: it is heard before the next, and saved after that."""
    generation = begun(tmp_path)
    assert checkpoint_request.patience_s(str(tmp_path)) == checkpoint_request.TIMEOUT_S
    control.note(str(tmp_path), generation.number, step_s=25.0)
    assert checkpoint_request.patience_s(str(tmp_path)) == 100


def test_a_status_is_written_after_any_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one that is no OSError, as of a mount without locks: later changes wait for the same thread."""
    real, failures = control.note, [UserError("its file system does not lock files")]

    def note(*place: Any, **changes: Any) -> None:
        if failures:
            raise failures.pop()
        real(*place, **changes)

    monkeypatch.setattr(control, "note", note)
    with control.StatusWriter(str(tmp_path), 1, patience_s=60) as writer:
        writer.note(trains=True)
    assert not failures and control.status(str(tmp_path), 1).trains


def begun(tmp_path: Path) -> control.Generation:
    """A run whose group has applied a step."""
    generation = journal.begin_generation(str(tmp_path))
    control.note(str(tmp_path), generation.number, trains=True)
    return generation


def test_rows_of_a_cut_off_write_are_taken_back(tmp_path: Path) -> None:
    """A row that fits in part only leaves the file as it was, and no part of the books."""
    log = MetricsLog(str(tmp_path), journal.begin_generation(str(tmp_path)))
    log.add({"samples_seen": 4})
    shown = tmp_path / "metrics" / books.live(1)
    size = shown.stat().st_size
    with no_file_beyond(size + 5):
        log.add({"samples_seen": 8})
        assert shown.stat().st_size == size
        with pytest.raises(OSError, match="File too large"):
            log.flush()
    log.add({"samples_seen": 12})
    assert [row["samples_seen"] for row in books.read_rows(str(tmp_path))] == [4, 8, 12]
    log.flush()
    assert [row["samples_seen"] for row in books.read_rows(str(tmp_path))] == [4, 8, 12]


def test_a_save_holds_the_state_of_its_step_and_only_the_next_update_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its tensors are copied while the next step goes forward and backward; what that step changes, changes after."""
    train_step, copy, order = train_step_of(spec(), 1, CPU), checkpoint.tensors_file, list[str]()

    def slow(*args: Any) -> Any:
        until = time.monotonic() + 20  # a copy that is waited for before the backward would take all of it
        while "backward" not in order and time.monotonic() < until:
            time.sleep(0.01)
        time.sleep(0.2)
        order.append("copied")
        return copy(*args)

    monkeypatch.setattr(checkpoint, "tensors_file", slow)
    with recorder_at(tmp_path) as recorder:
        recorder.step(0, 4, train_step.launch(batch_of([patch(i) for i in range(4)], 0, CPU), 0), [])
        before = {name: tensor.clone() for name, tensor in train_step.state()[0].items()}
        recorder.checkpoint(4, train_step)
        recorder.step(4, 8, train_step.launch(batch_of([patch(i) for i in range(4)], 4, CPU), 4, 0, order.append), [])
        order.append("stepped")
    saved, _ = checkpoint.load(str(tmp_path), f"{4:012d}-g0001")
    assert all(torch.equal(saved[name], before[name]) for name in before)
    assert order.index("backward") < order.index("copied") < order.index("stepped")


@pytest.mark.parametrize("reader", ["there", "gone"])
def test_ctrl_c_says_what_was_saved_and_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reader: str
) -> None:
    """A line in every case, also where no group trains; a `tee` that is gone does not keep it from saving."""
    run_dir, asked, told = str(tmp_path), list[int](), list[str]()
    monkeypatch.setattr(checkpoint_request, "request", lambda _, what: not asked.append(what))

    def say(text: str, **_: Any) -> None:
        if reader == "gone":
            raise BrokenPipeError
        told.append(text)

    monkeypatch.setattr("builtins.print", say)
    driver._save(run_dir)
    generation = begun(tmp_path)
    checkpoint.save(run_dir, 4, generation.number, {"a": torch.ones(1)}, {})
    driver._save(run_dir)
    monkeypatch.setattr(checkpoint_request, "request", lambda *_: False)
    driver._save(run_dir)
    assert asked == [HOLD]
    assert told == ([] if reader == "gone" else [
        "nothing to save, as no worker group trains: the same command begins anew, without a checkpoint",
        "saving a checkpoint ...",
        "saved: the same command goes on from the newest checkpoint",
        "saving a checkpoint ...",
        "not saved now: the same command goes on from the newest checkpoint",
    ])  # fmt: skip
