"""Where a run's wall time went, by cause, with nothing left out.

In: events in the order of `books`, rows of steps; no clock and no disk.
Out: a `TimeBreakdown`, whose parts sum to the wall time; the recoveries, each with its breakdown.

A cursor goes over the time line from mark to mark (launch, begin of a group's work, snapshot of a committed
checkpoint, last row of a group that died) and never back, so that clocks of two hosts may disagree: each second it
passes gets one cause. A checkpoint's event carries what was measured since the mark before. On S3 the rows of a group
that died are not there, so that what it threw away counts as recovery: the goodput is the same.
"""

import math
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any

Row = Mapping[str, Any]
_MEASURED = ("productive_s", "data_wait_s", "checkpoint_s", "validation_s", "other_s")
_BEFORE_LAUNCH = ("lengthened", "own_part_changed", "warning")
STEPS = ("detect_s", "reschedule_s", "import_s", "first_batch_s", "first_step_s")


@dataclass(frozen=True)
class TimeBreakdown:
    """Seconds since the first launch by what they were spent on."""

    productive_s: float = 0.0
    """Steps that a committed checkpoint holds."""
    data_wait_s: float = 0.0
    checkpoint_s: float = 0.0
    validation_s: float = 0.0
    recovery_s: float = 0.0
    """Start-up, detection, rescheduling, imports, restoring, waiting for the first batch."""
    redone_s: float = 0.0
    """Thrown away with a worker group: what it did after the mark that the next one went on from."""
    unsaved_s: float = 0.0
    """Spent since the last accounting event of a run that is training or was killed: not yet known to be kept."""
    other_s: float = 0.0
    unrecorded_s: float = 0.0
    """Time that no event accounts for: of older run folders, or around a checkpoint whose event a crash lost."""
    stopped_s: float = 0.0
    """From the last sign of life of one driver to the launch of the next."""

    def parts(self) -> dict[str, float]:
        """{cause in words: seconds}"""
        return {f.name.removesuffix("_s").replace("_", " "): getattr(self, f.name) for f in fields(self)}

    @property
    def wall_s(self) -> float:
        return math.fsum(self.parts().values())

    @property
    def goodput(self) -> float:
        """Google's runtime goodput: time in steps that were kept / time the run was up. NaN when unknown."""
        up_s = self.wall_s - self.stopped_s
        unknown = up_s <= 0 or (self.unrecorded_s > 0 and not self.productive_s)
        return math.nan if unknown else self.productive_s / up_s


@dataclass(frozen=True)
class Recovery:
    """From the end of one worker group's work, or a launch, to the next one's first applied step."""

    time: float
    generation: int
    world_size: int
    cause: str
    redone_steps: int
    total_s: float
    steps_s: dict[str, float]
    """By the names in STEPS; NaN where nothing is known."""


def time_breakdown(events: Sequence[Row], rows: Sequence[Row] = ()) -> TimeBreakdown:
    """Assign the time from the first launch to the last event or row to causes. Rows fill in where events lack."""
    told = [e for e in events if _known(e)]
    line = _Line(told, from_first_batch(told, [r for r in rows if _known(r)]))
    launches = {i for i, e in enumerate(line.events) if e.get("event") == "launch"}
    for first, end in pairwise(sorted({0, *launches, len(line.events)})):
        line.launch(first, end)
        for index in range(first, end):
            line.read(index)
        line.close(line.end, line.heir(end), ended=True)
    return TimeBreakdown(**line.seconds)


def recoveries(events: Sequence[Row]) -> list[Recovery]:
    """Every start of a worker group that came to a step, in order."""
    found, cause, redone = [], "", 0.0
    for event in events:
        kind = event.get("event")
        if kind in ("launch", "resize", "preemption") or (kind == "failure" and not cause):
            cause = str(kind)  # a node that is lost after its notice is no new cause
        elif kind == "group":
            redone += _number(event, "redone_steps", 0.0)
        elif kind == "recovered":
            number, world = (int(_number(event, name, 0.0)) for name in ("generation", "world_size"))
            steps, total_s = {name: _number(event, name) for name in STEPS}, _number(event, "total_s")
            found.append(Recovery(_time(event), number, world, cause, int(redone), total_s, steps))
            cause, redone = "", 0.0
    return found


def recovery_parts(events: Sequence[Row], imported: tuple[float, float], reached: Sequence[float]) -> dict[str, Any]:
    """What the event `recovered` says: where the time from a failure, resize or launch to the first applied step went.

    The parts add up to `total_s`. `imported` is when the worker's process began and ended its imports (long before, if
    it was a warm one); `reached` is when it entered the training function, was ready, had its first batch, had applied
    its first step.
    """
    last = max((n for n, e in enumerate(events) if e["event"] == "recovered"), default=-1)
    causes = [e for e in events[last + 1 :] if e["event"] in ("launch", "failure", "resize", "preemption")]
    launches = [e for e in causes if e["event"] == "launch"]  # a driver that was killed wrote no event
    cause = (launches[-1:] or causes[:1] or [{"event": "unknown", "time": reached[0]}])[0]
    noticed, entered = cause["time"], max(reached[0], cause["time"])
    detect_s = max(0.0, cause.get("seconds", noticed - cause.get("last_row", noticed)))
    on_the_way = max(0.0, min(imported[1], entered) - max(imported[0], noticed))
    parts = {
        "detect_s": detect_s,
        "reschedule_s": entered - noticed - on_the_way,
        "import_s": on_the_way + reached[1] - entered,
        "first_batch_s": reached[2] - reached[1],
        "first_step_s": reached[3] - reached[2],
    }
    rounded = {name: round(seconds, 3) for name, seconds in parts.items()}
    return {"cause": cause["event"], **rounded, "total_s": round(sum(rounded.values()), 3)}


def _process(event: Row) -> tuple[Any, Any]:
    return event.get("host"), event.get("pid")


def _number(row: Row, key: str, otherwise: float = math.nan) -> float:
    value = row.get(key)
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else otherwise


def _time(row: Row) -> float:
    return _number(row, "time")


def _began(row: Row) -> float:
    return _time(row) - _number(row, "step_s", 0.0)


def from_first_batch(events: Sequence[Row], rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Rows whose seconds are those that the breakdown has as training: a group's first row without the wait for its
    first batch, which is recovery (the event `recovered` says when that batch was there). Everything that is shown of
    times within steps is of these rows."""
    begun = {str(e.get("generation")): _number(e, "began") for e in events if e.get("event") == "recovered"}
    found = []
    for row in rows:
        number = str(row.get("generation"))
        if _time(row) >= begun.get(number, math.nan):
            del begun[number]
            wait_s, step_s = (max(_number(row, key, 0.0), 0.0) for key in ("wait_s", "step_s"))
            row = {**row, "wait_s": 0.0, "step_s": max(step_s - wait_s, 0.0)}
        found.append(dict(row))
    return found


def validation_span(event: Row) -> tuple[float, float]:
    """When training stood still for a validation; its event comes later where scores do."""
    seconds = _number(event, "seconds", 0.0)
    began = _number(event, "began", _time(event) - seconds)
    return began, began + seconds


def _known(row: Row) -> bool:
    return isinstance(row, Mapping) and math.isfinite(_time(row))


class _Line:
    """The time line: the cursor `at`, what it has passed, and the worker group it is in."""

    def __init__(self, events: Sequence[Row], rows: Sequence[Row]) -> None:
        self.events, self.seconds = events, dict.fromkeys((f.name for f in fields(TimeBreakdown)), 0.0)
        self._rows = sorted(rows, key=_time)
        scored = [e for e in events if e.get("event") == "validation"]
        self._validations = sorted(map(validation_span, scored))
        self._thrown_away: set[int] = set()
        kept = math.inf
        for index, event in reversed(list(enumerate(events))):  # a damaged checkpoint takes back what was committed
            if event.get("event") == "group":
                kept = min(kept, _number(event, "samples_seen", math.inf))
            elif event.get("event") == "checkpoint" and _number(event, "samples_seen", 0.0) > kept:
                self._thrown_away.add(index)
        self.at = self.end = math.nan
        self._enter(None)
        if not events and rows:
            self.at, self.end = _began(self._rows[0]), _time(self._rows[-1])
            self._unrecorded(self.end)

    def launch(self, first: int, end: int) -> None:
        """Come to a driver's launch; its time ends with the last sign of life before the next launch."""
        start = _time(self.events[first])
        self.at = start if math.isnan(self.at) else self.at
        until = _time(self.events[end]) if end < len(self.events) else math.inf
        last_row = _number(self.heir(end) or {}, "last_row")  # its row itself is gone
        last = self._last_of(first, end)
        signs = [_time(e) for e in self.events[first:last]] + [last_row if start < last_row < until else start]
        after = bisect_left(self._rows, until, key=_time)
        self.end = max(start, self.at)
        self._go(self.end, "stopped_s")
        self.end = max(self.end, *signs, *map(_time, self._rows[max(after - 1, 0) : after]))
        self._enter(None)

    def _last_of(self, first: int, end: int) -> int:
        """Where a launch's events end: what the next driver tells before its own launch is no sign of life of it."""
        if end < len(self.events):
            driver = _process(self.events[end])
            while end - 1 > first and self.events[end - 1].get("event") in _BEFORE_LAUNCH:
                if _process(self.events[end - 1]) != driver:
                    break
                end -= 1
        return end

    def heir(self, index: int) -> Row | None:
        """The next group that was begun, in this launch or a later one: it decided what was kept."""
        return next((e for e in self.events[index:] if e.get("event") == "group"), None)

    def read(self, index: int) -> None:
        event = self.events[index]
        kind, ours = event.get("event"), event.get("generation") == (self._group or {}).get("generation")
        if kind == "group":
            self.close(_time(event), event)
            self._enter(event)
        elif kind in ("failure", "resize"):
            self._over = True
        elif kind == "recovered" and ours:
            self._go(_number(event, "began", _time(event)), "recovery_s")
            self._begun = True
        elif kind in ("checkpoint", "closed") and ours:  # closed: a group's end after its last checkpoint
            self._begin(_time(event))
            spent = event.get("spent")
            if not isinstance(spent, Mapping) or "mark" not in event:
                self._unrecorded(_time(event))
            elif index in self._thrown_away:
                self._go(_number(event, "mark"), "redone_s")
            else:
                measured = {name: max(_number(spent, name, 0.0), 0.0) for name in _MEASURED}
                self._go(_number(event, "mark"), "other_s", measured)

    def close(self, until: float, heir: Row | None, ended: bool = False) -> None:
        """Leave the group: what it did since its last mark is kept, thrown away or undecided."""
        self._begin(until)
        if self._begun:
            last = max([self.at, *map(_time, self._mine(until))])
            if heir is None:
                self._go(last, "unsaved_s")
            elif "last_row" not in heir:
                self._unrecorded(until)
            else:
                self._unrecorded(last)  # rows that outlive their group are committed, though no event says so
                self._go(_number(heir, "last_row", self.at), "redone_s")
        self._go(until, "other_s" if ended and self._begun and not self._over else "recovery_s")

    def _enter(self, group: Row | None) -> None:
        self._group, self._begun, self._over = group, False, False

    def _begin(self, until: float) -> None:
        """Where no event records a group's first step, take its first row."""
        if not self._begun and (mine := self._mine(until)):
            self._go(_began(mine[0]), "recovery_s")
            self._begun = True

    def _mine(self, until: float) -> list[Row]:
        """Rows of this group between the cursor and `until`."""
        low, high = (bisect_right(self._rows, when, key=_time) for when in (self.at, until))
        number = self._group.get("generation") if self._group else None
        return [row for row in self._rows[low:high] if number is None or row.get("generation") == number]

    def _unrecorded(self, until: float) -> None:
        mine = self._mine(until)
        steps, waits = (sum(max(_number(row, key, 0.0), 0.0) for row in mine) for key in ("step_s", "wait_s"))
        self._go(until, "unrecorded_s", {"productive_s": max(steps - waits, 0.0), "data_wait_s": waits})

    def _go(self, until: float, cause: str, measured: Mapping[str, float] | None = None) -> None:
        """Move the cursor, never back nor past the end. Unmeasured time is charged to `cause`, except validations."""
        gap = max(min(until, self.end) - self.at, 0.0) if until > self.at else 0.0
        measured = dict(measured or {})
        if "validation_s" not in measured:
            low = bisect_right(self._validations, self.at, key=lambda span: span[1])
            high = bisect_left(self._validations, self.at + gap, low, key=lambda span: span[0])
            scored = (min(b, self.at + gap) - max(a, self.at) for a, b in self._validations[low:high])
            measured["validation_s"] = sum(seconds for seconds in scored if seconds > 0)
        total = sum(measured.values())
        scale = min(1.0, gap / total) if total > 0 else 0.0
        for name, seconds in measured.items():
            self.seconds[name] += seconds * scale
        self.seconds[cause] += max(gap - total * scale, 0.0)
        self.at += gap
