"""A rank that hangs is found, named and ended; a slow one is flagged; healthy ones are left alone."""

import dataclasses
import random
from pathlib import Path
from typing import Any

import pytest
import ray
from hypothesis import given
from hypothesis import strategies as st
from torch import distributed

from raytrain_brats import books, storage
from raytrain_brats.run import hang_detector, journal
from raytrain_brats.run.hang_detector import RankStatus, find_hung, updated
from raytrain_brats.run.phase_timer import PHASES, PhaseTimer
from raytrain_brats.run.rank import Rank
from raytrain_brats.run.recorder import RunRecorder
from raytrain_brats.run.stragglers import Stragglers
from raytrain_brats.run.validate import Validation
from tests.support.steps import CPU, spec


def life(
    rank: int,
    phase: str,
    seen: int = 40,
    beaten_s: float = 0.0,
    moved_s: float = 0.0,
    of: int = 2,
    updates: int = 1,
    device_at: int | None = None,
) -> RankStatus:
    """What the driver knows of a rank; the times are how long ago, at moment 1000."""
    about = {"rank": rank, "world_size": of, "phase": phase, "samples_seen": seen, "generation": 1, "pid": rank}
    about |= {"device_at": device_at}
    return RankStatus(about | {"beats": 5, "entries": 9, "updates": updates}, 1000 - beaten_s, 1000 - moved_s)


def named(*lives: RankStatus, longest_s: float = 1.0) -> list[int]:
    return [found.rank for found in find_hung(lives, 1000, 20, longest_s)]


def test_a_hang_is_told_also_where_no_stack_can_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rank is killed by then: on a full disk this is all that people hear of it."""

    class Stacks:
        def options(self, **_: Any) -> "Stacks":
            return self

        def remote(self, *_: Any) -> str:
            return "in all_reduce"

    def full(uri: str, *_: Any) -> None:
        raise OSError(28, "No space left on device", uri)

    monkeypatch.setattr(hang_detector, "_stacks", Stacks())
    monkeypatch.setattr(hang_detector, "NodeAffinitySchedulingStrategy", lambda *_, **__: None)
    monkeypatch.setattr(ray, "wait", lambda *_, **__: None)
    monkeypatch.setattr(ray, "get", lambda found, **_: found)
    monkeypatch.setattr(storage, "write_bytes", full)
    detector = hang_detector.HangDetector(str(tmp_path), "run", 20)
    hung = life(1, "forward", moved_s=50)
    hung.report.update(node="a", stacks="file")
    detector._ranks = {1: hung}
    assert detector._end([hung], 1000)
    (told,) = books.read_events(str(tmp_path))
    assert (told["event"], told["rank"], told["for_s"]) == ("hang", 1, 50)


@pytest.mark.parametrize(
    ("phases", "culprit"),
    [
        (("reduce", "forward"), 1),
        (("forward", "reduce"), 0),
        (("backward", "forward"), 1),
        (("reduce", "update"), 0),
    ],
)
def test_the_rank_behind_the_others_is_the_one(phases: tuple[str, str], culprit: int) -> None:
    """All stand still, since all wait for one: the one that has come least far."""
    assert named(*(life(rank, phase, moved_s=21) for rank, phase in enumerate(phases))) == [culprit]
    assert named(*(life(rank, phase, moved_s=19) for rank, phase in enumerate(phases))) == []


def test_a_rank_a_whole_step_behind_is_the_one() -> None:
    """Order is by step, then by phase."""
    assert named(life(0, "forward", seen=44, moved_s=30), life(1, "update", seen=40, moved_s=30)) == [1]


@pytest.mark.parametrize(("stuck", "waits"), [("start", "load"), ("load", "ready"), ("validate", "gather")])
def test_who_loads_or_scores_too_long_is_told_from_those_who_wait_for_it(stuck: str, waits: str) -> None:
    """However long these wait: only the rank that is stuck is named, and ended."""
    ranks = [life(rank, stuck if rank == 1 else waits, seen=39, moved_s=1000 - rank, of=3) for rank in range(3)]
    assert named(*ranks) == [1]


def test_a_rank_waits_for_the_others_in_a_phase_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When it has loaded its checkpoint, and when it has scored its cases."""
    timer, waits = PhaseTimer(), list[str]()

    def gather(found: list[Any], mine: Any) -> None:
        waits.append(timer.phase)
        found[:] = [mine] * len(found)

    monkeypatch.setattr(distributed, "all_gather_object", gather)
    monkeypatch.setattr(distributed, "barrier", lambda: waits.append(timer.phase))
    run_spec = dataclasses.replace(spec(), run_dir=str(tmp_path), held_out_cases=(), dataset_identity="x")
    recorder = RunRecorder(run_spec, journal.begin_generation(str(tmp_path)), Rank(1, 2, CPU), timer)
    timer.enter("load")
    recorder.ready()
    train_step: Any = None  # no case, so no prediction
    validation = Validation(run_spec, Rank(1, 2, CPU), timer.enter)
    timer.enter("validate")
    validation.predict(train_step, 4)
    validation.gather()
    assert waits == ["ready", "gather", "gather"]


class Event:
    """Stands for torch.cuda.Event, which needs a GPU; these tests are of the logic alone."""

    reached = False

    def query(self) -> bool:
        return self.reached


def test_a_rank_whose_gpu_is_behind_is_the_one() -> None:
    """Hosts run ahead of GPUs, so all wait in `reduce`: the rank with work of its own still to do, in the earliest
    step. Hosts in different phases say more than that, and with all work done everywhere all are at fault."""
    assert named(life(0, "reduce", moved_s=21), life(1, "reduce", moved_s=21, device_at=40)) == [1]
    late = [life(0, "reduce", moved_s=21, device_at=36), life(1, "reduce", moved_s=21, device_at=40)]
    assert named(*late) == [0]
    assert named(life(0, "reduce", moved_s=19), life(1, "reduce", moved_s=19, device_at=40)) == []
    assert named(life(0, "data", moved_s=400), life(1, "reduce", moved_s=400, device_at=40)) == [0]
    assert named(life(0, "reduce", moved_s=21), life(1, "reduce", moved_s=21)) == [0, 1]


def test_a_timer_knows_the_step_that_the_device_is_at() -> None:
    """The earliest step whose event is not reached; nothing where there are no events, or the device has failed."""
    timer, events = PhaseTimer(), [Event() for _ in range(3)]
    assert timer.device_at() is None
    for seen, event in zip((40, 44, 48), events, strict=True):
        timer.enter("backward", seen)
        timer.own_work_until(event)
        assert timer.device_at() == 40
    events[0].reached = True
    assert timer.device_at() == 44
    events[1].reached = events[2].reached = True
    assert timer.device_at() is None
    for seen in range(52, 152, 4):  # events that are reached are let go
        timer.enter("backward", seen)
        timer.own_work_until(event := Event())
        event.reached = True
    assert len(timer._own_work) == 1

    class Failed(Event):
        def query(self) -> bool:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    timer._own_work.clear()
    timer._own_work.append((0, Failed()))
    assert timer.device_at() is None


def test_a_rank_without_beats_is_the_one_whatever_it_did() -> None:
    """A stopped process shows no life; those that wait for it do, and may be behind it."""
    assert named(life(0, "forward", moved_s=25), life(1, "reduce", beaten_s=21, moved_s=21)) == [1]
    assert named(life(0, "end", beaten_s=500), life(1, "end", beaten_s=500)) == []


def test_waiting_for_data_validating_and_a_first_step_take_their_time() -> None:
    """What is slow by nature is no hang; the others wait for it in their collective."""
    for phase in ("data", "validate", "save", "load"):
        others = life(1, "data", seen=44, moved_s=60) if phase != "data" else life(1, "reduce", moved_s=60)
        assert named(life(0, phase, moved_s=60), others) == []
        assert named(life(0, phase, moved_s=1000), others) == [0]
    assert named(life(0, "forward", moved_s=60, updates=0), life(1, "reduce", moved_s=60, updates=0)) == []
    assert named(life(0, "forward", moved_s=60), life(1, "reduce", moved_s=60), longest_s=15) == []


def test_a_group_that_is_not_complete_yet_is_not_judged() -> None:
    """Ranks that have not begun are Ray's business."""
    assert named(life(0, "reduce", moved_s=60, of=3), life(1, "reduce", moved_s=60, of=3)) == []


@given(st.lists(st.tuples(st.sampled_from(PHASES[:-1]), st.floats(0, 19)), min_size=1, max_size=8))
def test_ranks_that_move_are_never_hung(ranks: list[tuple[str, float]]) -> None:
    assert named(*(life(r, phase, moved_s=s, of=len(ranks)) for r, (phase, s) in enumerate(ranks))) == []


def test_clocks_of_other_hosts_do_not_matter() -> None:
    """Only what changes between two looks counts, at the driver's own time."""
    about = {"rank": 0, "pid": 1, "generation": 1, "beats": 7, "entries": 3}
    first = updated(None, about, 10.0)
    assert updated(first, about | {"beats": 8}, 12.0) == RankStatus(about | {"beats": 8}, 12.0, 10.0)
    assert updated(first, about | {"entries": 4}, 12.0) == RankStatus(about | {"entries": 4}, 10.0, 12.0)
    assert updated(first, about | {"pid": 2}, 12.0).moved_s == 12.0  # another process under the same rank


def healthy(random_: random.Random, base_s: float) -> float:
    """Seconds of a sample: noise of 15 %, and one in twenty disturbed by up to ten times."""
    return base_s * random_.lognormvariate(0, 0.15) * (random_.uniform(1, 10) if random_.random() < 0.05 else 1)


@pytest.mark.parametrize("world_size", [2, 3, 8, pytest.param(64, marks=pytest.mark.campaign)])
def test_stragglers_are_flagged_within_20_steps_and_healthy_ranks_never(world_size: int) -> None:
    """10,000 healthy steps: no flag. From the step on at which one rank takes twice as long: it, within 20 steps."""
    random_ = random.Random(world_size)
    watch = Stragglers(world_size)
    for step in range(10_000):
        base_s = 1 + step % 7  # steps may differ, but alike on all ranks
        assert watch.add(tuple(healthy(random_, base_s) for _ in range(world_size))) == []
    for slow in range(min(world_size, 8)):
        watch = Stragglers(world_size)
        for _ in range(100):
            watch.add(tuple(healthy(random_, 1) for _ in range(world_size)))
        found = []
        for _ in range(20):
            found += watch.add(tuple(healthy(random_, 2 if rank == slow else 1) for rank in range(world_size)))
        assert [rank for rank, _ in found] == [slow]
        assert 1.5 < found[0][1] < 2.6
