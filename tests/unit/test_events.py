"""Events while their storage fails, or while their writer ends: each once, in the order in which they were told."""

import errno
import os
import threading
from pathlib import Path
from typing import Any

import pytest

from raytrain_brats import books, storage
from raytrain_brats.run import events, journal


@pytest.fixture(params=["local", "s3"])
def run_dir(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A run folder of either kind."""
    return f"{request.getfixturevalue('s3_server')}/run" if request.param == "s3" else str(tmp_path)


def numbers(run_dir: str) -> list[int]:
    return [event["number"] for event in books.read_events(run_dir)]


def tell(run_dir: str, *told: int) -> None:
    for number in told:
        journal.event(run_dir, "told", number=number)


def test_what_is_told_while_the_writer_ends_is_written(run_dir: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the thread's last look at what waits and its end: it is there when `in_background` returns."""
    real, late = events._Log.store, [2]

    def store(log: Any) -> None:
        real(log)
        if threading.current_thread().name == "events" and log.writer._over and late:
            tell(run_dir, late.pop())

    monkeypatch.setattr(events._Log, "store", store)
    with events.in_background(run_dir):
        tell(run_dir, 1)
    assert not late and numbers(run_dir) == [1, 2]


def test_an_outage_that_comes_and_goes_keeps_the_order(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Puts that fail before they arrive, and puts that arrive although their answer is lost: nothing twice."""
    run_dir, real = f"{s3_server}/run", storage.write_bytes
    fate = iter(["put", "lost", "away", "away", "put", "lost", "lost", "away", "put", "lost", "away", "put"])

    def write_bytes(uri: str, content: bytes) -> None:
        if (now := next(fate)) != "away":
            real(uri, content)
        if now != "put":
            raise OSError("away")

    monkeypatch.setattr(storage, "write_bytes", write_bytes)
    for number in range(12):
        tell(run_dir, number)
    assert numbers(run_dir) == [*range(12)]
    assert len(storage.list_files(f"{run_dir}/events")) == 1


@pytest.mark.parametrize(("room", "truncates"), [("+--+-+", True), ("+-+-++", False)])
def test_a_line_whose_disk_was_full_amid_it_stands_once_and_whole(
    room: str, truncates: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The part that was written is taken back, or, where even that fails, left as the torn end of a segment."""
    real, left = os.write, iter(room)

    def fail(*_: Any) -> None:
        raise OSError(errno.EIO, "failed")

    monkeypatch.setattr(os, "write", lambda file, content: real(file, content[: None if next(left) == "+" else -9]))
    if not truncates:
        monkeypatch.setattr(os, "truncate", fail)
    tell(str(tmp_path), *range(6))
    torn: list[str] = []
    assert [event["number"] for event in books.read_events(str(tmp_path), torn)] == [*range(6)]
    assert len(torn) == (0 if truncates else 2), "a piece of a line joins no other"
