"""The books of a run's time: to the second, whatever happened."""

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raytrain_brats.reporting.goodput import TimeBreakdown, from_first_batch, recoveries, time_breakdown
from tests.support.simulated_run import DRIVER_ENDS, Action, Run

MILLISECONDS = st.integers(0, 5000).map(lambda n: n / 1000)
KINDS = ("step", "step", "step", "checkpoint", "commit", "validate", "idle")
ENDS = ("kill", "resize", "resize saved", "event lost", "damaged", "stillborn", *DRIVER_ENDS)
ACTIONS = st.lists(st.tuples(st.sampled_from(KINDS), MILLISECONDS.map(lambda s: s + 0.001), MILLISECONDS), max_size=14)
HISTORIES = st.lists(st.tuples(ACTIONS, st.sampled_from(ENDS), MILLISECONDS), min_size=1, max_size=6)
History = list[tuple[list[Action], str, float]]


def simulated(history: History) -> Run:
    run = Run()
    for actions, end, start_s in history:
        run.group(actions, end, start_s)
    return run


def test_what_a_driver_tells_before_its_launch_is_no_life_of_the_one_before() -> None:
    """A run that was lengthened after an hour stood still for that hour."""
    run = Run()
    run.group([("step", 1.0, 0.0), ("checkpoint", 0.1, 0.0)], "finish", 0.5)
    ended = max(row["time"] for row in [*run.events, *run.rows])
    mine = {"host": "h", "pid": 77}
    later = [{"event": kind, "time": ended + 3600 + n, **mine} for n, kind in enumerate(("lengthened", "launch"))]
    found = time_breakdown([*run.events, *later], run.rows)
    assert found.stopped_s == pytest.approx(3601, abs=1e-6)


@settings(max_examples=100, deadline=None)
@given(HISTORIES)
def test_every_second_has_its_true_cause(history: History) -> None:
    """Random kills, resizes, driver deaths, Ctrl-C, lost events, damaged checkpoints: the account is the truth."""
    run = simulated(history)
    found, truth = time_breakdown(run.events, run.rows), run.truth()
    times = [row["time"] for row in [*run.events, *run.rows]]
    assert found.wall_s == pytest.approx(max(times) - run.events[0]["time"], abs=1e-6)
    assert min(found.parts().values()) >= 0
    assert {cause: s for cause, s in found.parts().items() if s > 1e-6} == pytest.approx(
        {cause: s for cause, s in truth.items() if s > 1e-6}, abs=1e-6
    )
    if truth.get("productive", 0) > 1e-6:
        up = sum(truth.values()) - truth.get("stopped", 0.0)
        assert found.goodput == pytest.approx(truth["productive"] / up)


@settings(max_examples=40, deadline=None)
@given(HISTORIES, st.integers(-20, 20))
def test_clocks_that_disagree_lose_no_second(history: History, skew_s: int) -> None:
    """Workers' clocks stand apart from the driver's: still no negative part, and the sum is the wall time."""
    run = simulated(history)
    for row in run.rows:
        row["time"] += skew_s
    for event in run.events:
        ours = ("time", "mark", "began") if event["event"] in ("recovered", "checkpoint", "validation") else ()
        event.update({key: event[key] + skew_s for key in (*ours, "last_row") if event.get(key)})
    found, start = time_breakdown(run.events, run.rows), run.events[0]["time"]
    assert min(found.parts().values()) >= 0
    ends = [start, *(row["time"] for row in [*run.events, *run.rows])]
    assert found.wall_s == pytest.approx(max(ends) - start, abs=1e-6)


NAMES = ("launch", "group", "recovered", "checkpoint", "failure", "validation", "interrupt", "invented")
ODD = st.one_of(st.none(), st.floats(), st.integers(-5, 50), st.text(max_size=2), st.just({"productive_s": 1.0}))
FIELDS = ("time", "generation", "samples_seen", "mark", "began", "spent", "last_row", "seconds", "redone_steps")
LINES = st.dictionaries(st.sampled_from(FIELDS), ODD).flatmap(
    lambda facts: st.sampled_from(NAMES).map(lambda name: {"time": 1.0} | facts | {"event": name})
)


@settings(max_examples=60, deadline=None)
@given(st.lists(LINES, max_size=12), st.lists(st.dictionaries(st.sampled_from(["time", "step_s", "wait_s"]), ODD)))
def test_nonsense_is_no_crash(events: list[dict[str, Any]], rows: list[dict[str, Any]]) -> None:
    """Books of another version, or damaged: some account, without a negative part."""
    found = time_breakdown(events, rows)
    assert min(found.parts().values()) >= 0
    assert math.isfinite(found.wall_s)
    recoveries(events)


@pytest.mark.parametrize("mark", [None, math.nan, 0.0, 1e12])
def test_a_mark_that_cannot_be_moves_nothing_out_of_the_run(mark: Any) -> None:
    """No time, the past, the far future: the sum stays the wall time."""
    run = Run()
    run.group([("step", 2.0, 0.5), ("checkpoint", 0.1, 0.5), ("commit", 0, 0), ("step", 2.0, 0.5)], "alive")
    next(e for e in run.events if e["event"] == "checkpoint")["mark"] = mark
    assert time_breakdown(run.events, run.rows).wall_s == pytest.approx(run.now - 1e6)


def test_books_from_before_these_books() -> None:
    """Without marks and measured parts, rows tell what they can, and the rest is called unrecorded."""
    run = Run()
    actions: list[Action] = [("step", 2.0, 0.5), ("idle", 1.0, 0.0), ("step", 2.0, 0.5), ("checkpoint", 0.1, 0.25)]
    run.group([*actions, ("commit", 0, 0), ("step", 2.0, 0.5)], "kill")
    run.group(actions, "finish")
    for key in ("mark", "spent", "began", "last_row"):
        for event in run.events:
            event.pop(key, None)
    events = [event for event in run.events if event["event"] != "recovered"]
    found = time_breakdown(events, run.rows)
    assert found.productive_s == pytest.approx(8.0)
    assert found.data_wait_s == pytest.approx(2.0)
    assert found.recovery_s == pytest.approx(6.0)
    assert found.unrecorded_s == pytest.approx(2 * 1.25 + 2.5 + 1.5 + 2.0)
    assert found.wall_s == pytest.approx(run.now - 1e6)
    assert math.isnan(time_breakdown(events).goodput)
    assert time_breakdown([], run.rows).wall_s == pytest.approx(run.rows[-1]["time"] - run.rows[0]["time"] + 2.5)
    assert time_breakdown([]) == TimeBreakdown() and math.isnan(TimeBreakdown().goodput)


def test_a_first_row_that_no_checkpoint_tells_of() -> None:
    """A row that outlived its group: what it waited for the group's first batch is recovery, not waiting."""
    run = Run()
    actions: list[Action] = [("step", 2.0, 6.0), ("step", 2.0, 0.5), ("checkpoint", 0.1, 0.25), ("commit", 0, 0)]
    run.group(actions, "event lost")
    run.group([("step", 2.0, 0.0)], "alive")
    run.events = [event for event in run.events if event["event"] != "checkpoint"]
    found = time_breakdown(run.events, run.rows)
    assert (found.productive_s, found.data_wait_s) == (pytest.approx(4.0), pytest.approx(0.5))
    assert from_first_batch(run.events, run.rows)[0]["wait_s"] == 0.0
    assert run.rows[0]["wait_s"] == 6.0, "the row itself is left as it is"


def test_recoveries_know_their_cause_and_parts() -> None:
    """A launch, a death with a group that was stillborn after it, a resize: one line each, with what was lost."""
    step: Action = ("step", 2.0, 0.5)
    run = Run()
    run.group([step, step], "kill")
    run.group([], "stillborn")
    run.group([step], "resize saved", world_size=1)
    run.group([step], "interrupt")
    run.group([step], "alive")
    run.event("preemption", saved=False, seconds=30.0)
    run.event("failure", generation=5, rank=0, error="the node went")
    run.group([step], "finish")
    found = recoveries(run.events)
    assert [r.cause for r in found] == ["launch", "failure", "resize", "launch", "preemption"]
    assert [r.redone_steps for r in found] == [0, 2, 0, 1, 1]
    assert [r.generation for r in found] == [1, 3, 4, 5, 6]
    assert [r.world_size for r in found] == [2, 1, 2, 2, 2]
    assert found[0].total_s == pytest.approx(sum(found[0].steps_s.values()))
    assert found[0].steps_s["first_batch_s"] == 0.5
