"""Rows of replaced groups: whatever they still write late, and in whatever order, each step has exactly one row."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from raytrain_brats import books, storage
from raytrain_brats.run import checkpoint, journal, rows
from raytrain_brats.run.control import Generation
from raytrain_brats.run.rows import MetricsLog
from raytrain_brats.storage import Listing

RUN, LARGE = "s3://memory/run", 200
Request = tuple[str, str, bytes]
"""(put, delete, check or commit; a part's name or a sample; content)."""


@pytest.fixture
def small_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two small parts are merged; a part with a large row stays."""
    monkeypatch.setattr(rows, "MERGE_PARTS", 2)
    monkeypatch.setattr(rows, "CLOSED_BYTES", LARGE)


def row(seen: int, generation: int, large: bool = False) -> dict[str, Any]:
    return {"samples_seen": seen, "generation": generation, "loss": LARGE * "x" if large else ""}


class Memory:
    """What `storage` reads and writes, in memory; with `asked` changes are noted there, to be made later."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.files: dict[str, bytes] = {}
        self.asked: list[Request] | None = None
        monkeypatch.setattr(storage, "listing", self.listing)
        monkeypatch.setattr(storage, "read_bytes", self.read_bytes)
        monkeypatch.setattr(storage, "write_bytes", lambda uri, content: self.ask("put", uri, content))
        monkeypatch.setattr(storage, "delete", lambda uri: self.ask("delete", uri, b""))

    def listing(self, _: str) -> Listing:
        return Listing({name: (len(content), "") for name, content in self.files.items()}, {})

    def read_bytes(self, uri: str) -> bytes:
        if (name := uri.rpartition("/")[2]) not in self.files:
            raise FileNotFoundError(uri)
        return self.files[name]

    def ask(self, what: str, uri: str, content: bytes) -> None:
        asked = (what, uri.rpartition("/")[2], content)
        self.apply(asked) if self.asked is None else self.asked.append(asked)

    def apply(self, asked: Request) -> None:
        what, name, content = asked
        if what == "put":
            self.files[name] = content
        elif what == "delete":
            self.files.pop(name, None)

    def told(self, do: Callable[[], None]) -> tuple[Request, ...]:
        self.asked, asked = (now := []), self.asked
        do()
        self.asked = asked
        return tuple(now)

    def work(self, generation: int, start: int, steps: int, large: tuple[int, ...]) -> tuple[Request, ...]:
        """All that a group does, a checkpoint a step, as `recorder` does it."""

        class Writer(MetricsLog):
            def check(_) -> None:  # noqa: N805
                self.ask("check", "", b"")

        def do() -> None:
            writer = Writer(RUN, Generation(generation, start))
            for seen in range(start + 4, start + 4 * steps + 1, 4):
                writer.add(row(seen, generation, seen in large))
                writer.flush(seen)
                self.ask("commit", f"{seen}", b"")
                writer.merge()

        return self.told(do)


@dataclass(frozen=True)
class State:
    """Of a run between any two requests."""

    files: frozenset[tuple[str, bytes]] = frozenset()
    group: int = 1
    seen: int = 0
    """Where the group started."""
    fence: int = 1
    plan: tuple[int, rows.Plan] | None = None
    tidying: tuple[Request, ...] = ()
    """What the controller still does before the group starts."""
    left: tuple[tuple[Request, ...], ...] = ()
    """What each group still does; of a replaced one, what it has looked at the fence for."""
    counted: tuple[tuple[int, int], ...] = ()
    """(sample, group) of the rows that are there."""
    saved: frozenset[int] = frozenset({0})


class Run:
    """All that may happen next, and what must be true then."""

    def __init__(self, memory: Memory, steps: tuple[int, ...], large: tuple[int, ...]) -> None:
        """`steps`: of each group; `large`: samples whose row is."""
        self.memory, self.steps, self.large = memory, steps, large

    def begin(self) -> State:
        return State(left=(self.memory.work(1, 0, self.steps[0], self.large),))

    def nexts(self, state: State) -> Iterator[State]:
        for number, left in enumerate(state.left, 1):
            if left:
                yield self.written(state, number, left)
        if state.fence < len(self.steps):
            yield replace(state, fence=state.fence + 1, plan=None, tidying=())  # the controller may be killed amid it
        if state.fence > state.group and not state.plan:
            for seen in state.saved:  # a damaged checkpoint is passed over
                yield replace(state, plan=(seen, rows.plan(RUN, state.fence, seen)))
        elif state.plan:
            yield self.decided(state, *state.plan)
        elif state.tidying:
            self.memory.apply(state.tidying[0])
            yield self.begun(replace(state, tidying=state.tidying[1:], files=self.files()))

    def files(self) -> frozenset[tuple[str, bytes]]:
        return frozenset(self.memory.files.items())

    def written(self, state: State, number: int, left: tuple[Request, ...]) -> State:
        (what, name, content), rest = left[0], left[1:]
        if what in ("check", "commit") and number != state.fence:
            rest = ()
        elif what == "commit":
            state = replace(state, saved=state.saved | {int(name)})
        self.memory.apply(left[0])
        if what == "put" and number == state.group:
            put = [json.loads(line)["samples_seen"] for line in content.splitlines()]
            new = [(seen, number) for seen in put if seen > max((s for s, _ in state.counted), default=0)]
            state = replace(state, counted=(*state.counted, *new))
        lefts = tuple(rest if n == number else other for n, other in enumerate(state.left, 1))
        return replace(state, left=lefts, files=self.files())

    def decided(self, state: State, seen: int, plan: rows.Plan) -> State:
        tidying = self.memory.told(lambda: rows.settle(RUN, plan))
        counted = tuple(row for row in state.counted if row[0] <= seen)
        saved = frozenset(at for at in state.saved if at <= seen)
        state = replace(state, group=state.fence, seen=seen, plan=None, tidying=tidying, counted=counted, saved=saved)
        idle = ((),) * (state.group - 1 - len(state.left))  # groups whose controller was killed before they started
        return self.begun(replace(state, left=(*state.left, *idle)))

    def begun(self, state: State) -> State:
        if state.tidying or len(state.left) == state.group:
            return state
        work = self.memory.work(state.group, state.seen, self.steps[state.group - 1], self.large)
        return replace(state, left=(*state.left, work))

    def look(self, state: State) -> None:
        """Make this the state of the storage, and read it."""
        decided = json.dumps({"number": state.group, "samples_seen": state.seen}).encode()
        self.memory.files = dict(state.files)
        self.memory.files["generation.json"] = decided
        found = [(row["samples_seen"], row["generation"]) for row in books.read_rows(RUN)]
        del self.memory.files["generation.json"]
        assert found == [*state.counted], sorted(self.memory.files)


LONGER = [pytest.param((3, 2, 1), large, marks=pytest.mark.campaign) for large in ((), (4,), (8,), (4, 8), (8, 12))]


@pytest.mark.parametrize(("steps", "large"), [*(((3, 1, 1), large) for large in ((), (4,), (8, 12))), *LONGER], ids=str)
def test_in_any_order_of_late_writes_each_step_has_one_row(
    steps: tuple[int, ...], large: tuple[int, ...], small_limits: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three groups, each replaced at any moment and going on until it looks at its fence: flushes, checkpoints, merges
    between any two requests of the controller, which goes back to any checkpoint, or is killed amid a start."""
    run = Run(Memory(monkeypatch), steps, large)
    known = {run.begin()}
    waiting = [*known]
    while waiting:
        state = waiting.pop()
        run.look(state)
        for after in run.nexts(state):
            run.memory.files = dict(state.files)
            if after not in known:
                known.add(after)
                waiting.append(after)
    assert len(known) > 2000 and {state.group for state in known} == {1, 2, 3}
    wanted = tuple((4 * n, 1 if n <= steps[0] else 2 if n <= sum(steps[:2]) else 3) for n in range(1, 1 + sum(steps)))
    assert wanted in {state.counted for state in known}, "the longest run"


@pytest.fixture(params=["local", "s3"])
def run_dir(request: pytest.FixtureRequest) -> str:
    """A run folder of either kind."""
    return (
        f"{request.getfixturevalue('s3_server')}/run"
        if request.param == "s3"
        else str(request.getfixturevalue("tmp_path"))
    )


def test_a_merge_that_ends_after_the_next_group_has_gone_on_takes_no_row(run_dir: str, small_limits: None) -> None:
    """It was past its fence, and the next group has tidied up, put a part and a checkpoint meanwhile."""
    zombie = MetricsLog(run_dir, journal.begin_generation(run_dir))
    for seen in (4, 8, 12):
        zombie.add(row(seen, 1, large=seen == 4))
        zombie.flush(seen)
    checkpoint.save(run_dir, 4, 1, {"a": torch.ones(2)}, {"bad_in_epoch": 0})
    zombie.check = lambda: None  # type: ignore[method-assign] # it has looked before the next group began
    log = MetricsLog(run_dir, journal.begin_generation(run_dir))
    log.add(row(8, 2))
    log.flush()
    zombie.merge()
    checkpoint.save(run_dir, 8, 2, {"a": torch.ones(2)}, {"bad_in_epoch": 0})
    for _ in range(2):
        assert [(r["samples_seen"], r["generation"]) for r in books.read_rows(run_dir)] == [(4, 1), (8, 2)]
        assert journal.begin_generation(run_dir).samples_seen == 8
