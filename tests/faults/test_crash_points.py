"""Die between any two system calls of a commit or of a start: the old state or the new one, never a torn one.

A forked child does the work and dies before its n-th call that touches the disk, for every n until it gets through.
Power loss is worse than a kill: a file falls back to what it was at its last fsync, and a name to what it was at the
last fsync of its folder, as a disk may do.
On S3 the child dies before its n-th put or delete; after the n-th is before the next, or the end.
"""

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from raytrain_brats import books, storage
from raytrain_brats.labels import REGIONS
from raytrain_brats.run import checkpoint, control, gains, journal
from raytrain_brats.run.rows import MetricsLog
from raytrain_brats.run.run_dir import RunDir
from tests.support.crashes import Disk, die_before_request, in_child


def state_of(seen: int) -> dict[str, Any]:
    return {"samples_seen": seen, "bad_in_epoch": 0}


def begun(folder: str) -> None:
    """A run with rows 4 and 8 and a checkpoint at 8, of worker group 1."""
    log = MetricsLog(folder, journal.begin_generation(folder))
    for seen in (4, 8):
        log.add({"samples_seen": seen})
    log.flush()
    checkpoint.save(folder, 8, 1, {"a": torch.ones(4)}, state_of(8))


def go_on(folder: str, validated: float | None = None) -> None:
    """What a worker group does from 8 to 16, checkpoint, validation and clean-up included."""
    generation = control.current(folder)
    assert generation is not None
    log = MetricsLog(folder, dataclasses.replace(generation, samples_seen=8))  # the same group goes on
    for seen in (12, 16):
        log.add({"samples_seen": seen})
    log.flush()
    checkpoint.save(folder, 16, generation.number, {"a": torch.zeros(4)}, state_of(16), fence=log.check)
    if validated is None:
        checkpoint.prune(folder, 1, generation.number)
        return
    table(folder, 16, validated)
    checkpoint.prune(folder, 1, generation.number, 0, gains.Keeper(folder, print, print))


def start_again(folder: str) -> None:
    journal.begin_generation(folder)


def check_every_point(place: Callable[[int], str], work: Any, arm: Callable[[int], Callable[[], None]]) -> int:
    """After each death: a valid checkpoint, old or new, whose rows are all there and no others; a start that works."""
    # `arm` sets a death up; what it returns is called when that was not reached
    ends, wanted = set(), {begun: {0, 8}, go_on: {8, 16}, start_again: {8}}[work]
    for last in range(200):
        folder = place(last)
        if work is not begun:
            begun(folder)

        def until_death(last: int = last, folder: str = folder) -> None:
            end = arm(last)
            work(folder)
            end()

        code = in_child(until_death)
        assert code in (0, 9)

        found, damaged = checkpoint.newest_valid(folder)
        assert not damaged and (found is not None or work is begun)
        seen = found.samples_seen if found else 0
        generation = journal.begin_generation(folder)
        ends.add(generation.samples_seen)
        assert generation.samples_seen == seen
        assert [row["samples_seen"] for row in books.read_rows(folder)] == [*range(4, seen + 1, 4)]
        assert {"group"} <= {event["event"] for event in books.read_events(folder)}
        if not storage.is_s3(folder):
            shutil.rmtree(folder, ignore_errors=True)
        if code == 0:
            break
    assert ends == wanted
    assert seen == max(wanted), "what was committed is there for good"
    return last


@pytest.mark.parametrize("power_loss", [False, True], ids=["kill", "power loss"])
@pytest.mark.parametrize("work", [begun, go_on, start_again])
def test_every_crash_point_leaves_a_state_to_go_on_from(tmp_path: Path, work: Any, power_loss: bool) -> None:
    """On a local disk, before every call that touches it."""
    assert 8 < check_every_point(lambda n: str(tmp_path / f"{n}"), work, lambda n: Disk(n, power_loss).lose) < 199


def table(folder: str, seen: int, dice: float) -> None:
    row = ",".join(["case", *(f"dice_{r}" for r in REGIONS)]) + f"\na,{dice},{dice},{dice}\n"
    storage.write_bytes(RunDir(folder).validation(seen), row.encode())


@pytest.mark.parametrize("power_loss", [False, True], ids=["kill", "power loss"])
@pytest.mark.parametrize("better", [False, True])
def test_the_best_checkpoint_survives_every_crash_point(tmp_path: Path, better: bool, power_loss: bool) -> None:
    """The old best stays until the new one is there with its scores; a start after the death keeps it, too."""
    ends = set()
    for last in range(200):
        folder = str(tmp_path / f"{last}")
        begun(folder)
        table(folder, 8, 0.5)

        def until_death(last: int = last, folder: str = folder) -> None:
            end = Disk(last, power_loss).lose
            go_on(folder, 0.6 if better else 0.4)
            end()

        code = in_child(until_death)
        assert code in (0, 9)
        for _ in range(2):
            best = gains.best_valid(folder).samples_seen
            scored = {each.samples_seen for each in gains.history(folder)}
            assert best == (16 if better and 16 in scored else 8)
            journal.begin_generation(folder)
        ends.add(best)
        shutil.rmtree(folder, ignore_errors=True)
        if code == 0:
            break
    assert last > 8 and ends == ({8, 16} if better else {8})


@pytest.mark.parametrize("work", [go_on, start_again])
def test_every_crash_point_on_s3_leaves_a_state_to_go_on_from(s3_server: str, work: Any) -> None:
    """On S3, before every request that changes something."""
    deaths = check_every_point(lambda n: f"{s3_server}/{n}", work, die_before_request)
    assert deaths == (7 if work is go_on else 5)
