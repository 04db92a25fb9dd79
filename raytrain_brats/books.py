"""Read the books of a run: the rows of its applied steps and its events, each kept in parts that are never rewritten.

In: a run folder, local or s3://: `metrics/`, `events/`, `generation.json`.
Out: the rows in the order of steps, exactly one a step; the events in the order of time.

Rows: with each checkpoint rank 0 puts one part, `metrics/<first sample>-<last sample>-g<generation>.jsonl`. Names alone
say which parts count (`chain`): beyond the sample from which the current worker group started, its own. On a local disk
`metrics/live-g<generation>.jsonl` shows the steps since the last part; it decides nothing.
Events: each process writes segments of its own, `events/<begin, ms>-<host>-<pid>-<x>.jsonl`, a new one once the last is
large or old. Runs before 2026-12 have one `metrics.jsonl` and one `events.jsonl`, which are read as well.
"""

import json
import math
import re
from bisect import bisect_right
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, TypeVar

from raytrain_brats import storage

Row = dict[str, Any]
T = TypeVar("T")
ROWS, EVENTS, OLD_ROWS, OLD_EVENTS = "metrics", "events", "metrics.jsonl", "events.jsonl"
SEGMENT_BYTES, SEGMENT_S = 1 << 14, 3600.0
"""Beyond this size or age a process begins a new segment of events."""
_TAIL_BYTES = 1 << 16
_SEGMENT = re.compile(r"^\d+-.+\.jsonl$")
_PART = re.compile(r"^(\d{12,})-(\d{12,})-g(\d{4,})\.jsonl$")
_TRIES = 5


@dataclass(frozen=True)
class Part:
    """The rows of the steps from one sample to another, written by one worker group."""

    start: int
    end: int
    generation: int
    bytes: int = field(default=0, compare=False)
    version: str = field(default="", compare=False)

    @property
    def name(self) -> str:
        return f"{self.start:012d}-{self.end:012d}-g{self.generation:04d}.jsonl"


def parts(run_dir: str) -> list[Part]:
    """All that are there, whether they count or not."""
    files = storage.listing(storage.join(run_dir, ROWS)).files
    found = [(match, about) for name, about in files.items() if (match := _PART.match(name))]
    return [Part(int(m[1]), int(m[2]), int(m[3]), *about) for m, about in found]


def chain(found: Sequence[Part], generation: int, seen: int, start: int = 0) -> list[Part]:
    """The parts that count, in order, for a worker group that started from `seen` samples.

    Of parts that start at one sample the youngest group's counts, and of its own the longest. This is the right one: a
    group writes from where it started, and it started only where no older group's rows count any more. Parts of older
    groups count up to `seen`; the last may reach beyond, with rows that do not.
    """
    at_start = {part.start: part for part in sorted(found, key=lambda p: (p.generation, p.end))}
    counted, at = [], start
    while part := at_start.get(at):
        older = part.generation < generation
        if older and at >= seen:
            break
        counted.append(part)
        at = min(part.end, seen) if older else part.end
    return counted


def live(generation: int) -> str:
    """The name of the file that shows a group's newest rows."""
    return f"live-g{generation:04d}.jsonl"


def read_rows(run_dir: str, after: int = 0, torn: list[str] | None = None) -> list[Row]:
    """The applied steps beyond the sample `after`, in order.

    Raises ValueError that names the file for a damaged line; with `torn`, such lines go there instead.
    """
    return _patiently(lambda: _rows(run_dir, after, torn))


def _patiently(read: Callable[[], T]) -> T:
    """Parts are merged now and then: one that was listed may be gone a moment later."""
    for _ in range(_TRIES - 1):
        try:
            return read()
        except FileNotFoundError:
            continue
    return read()


def _rows(run_dir: str, after: int, torn: list[str] | None) -> list[Row]:
    now, kept, shown = _counted(run_dir)
    rows: list[Row] = []
    if not kept and (old := _content(storage.join(run_dir, OLD_ROWS))):
        rows = _parsed(storage.join(run_dir, OLD_ROWS), old, torn, last_torn=True)
    wanted = [part for part in kept if part.end > after]
    uris = [storage.join(run_dir, ROWS, part.name) for part in wanted]
    for part, uri, content in zip(wanted, uris, _map(storage.read_bytes, uris), strict=True):
        mine = _parsed(uri, content, torn)
        if torn is None and (not mine or mine[-1]["samples_seen"] != part.end):
            raise ValueError(f"{uri} is damaged: its last row is not that of sample {part.end}")
        rows += [row for row in mine if part.generation >= now[0] or row["samples_seen"] <= now[1]]
    return [row for row in rows + shown if row.get("samples_seen", after + 1) > after]


def _counted(run_dir: str) -> tuple[tuple[int, int], list[Part], list[Row]]:
    """((number, start) of the current group, parts that count, rows shown beyond them).

    In this order: rows leave the live file once a part holds them, so whatever is missing there is in the list.
    """
    try:
        decided = json.loads(_content(storage.join(run_dir, "generation.json")) or b"{}")
        now = int(decided["number"]), int(decided["samples_seen"])
    except (ValueError, KeyError, TypeError):
        now = -1, 0  # no group is current: all parts that follow each other count
    shown, uri = [], storage.join(run_dir, ROWS, live(now[0]))
    if not storage.is_s3(run_dir):
        shown = _parsed(uri, _content(uri) or b"", [])
    kept = chain(parts(run_dir), *now)
    end = kept[-1].end if kept and kept[-1].generation >= now[0] else now[1]
    return now, kept, [row for row in shown if row["samples_seen"] > end]


def read_events(run_dir: str, torn: list[str] | None = None) -> list[Row]:
    """All events; lines that are torn are left out, or go to `torn`."""
    return _events(run_dir, _segments(run_dir), torn)


def recent(run_dir: str) -> tuple[list[Row], list[Row]]:
    """The last hundreds of rows and events: enough for a progress line, at a cost that does not grow with the run."""
    return _patiently(lambda: _recent_rows(run_dir)), _events(run_dir, _newest(_segments(run_dir)), [])


def _recent_rows(run_dir: str) -> list[Row]:
    now, kept, shown = _counted(run_dir)
    if not kept and not shown:
        return _parsed(OLD_ROWS, _end_of(storage.join(run_dir, OLD_ROWS)) or b"", [])
    rows: list[Row] = []
    left = _TAIL_BYTES
    for part in reversed(kept):
        if left <= 0:
            break
        uri = storage.join(run_dir, ROWS, part.name)
        mine = _parsed(uri, _tail(uri, part.bytes, part.version), [])
        rows = [row for row in mine if part.generation >= now[0] or row["samples_seen"] <= now[1]] + rows
        left -= part.bytes
    return rows + shown


@lru_cache(maxsize=64)
def _tail(uri: str, _bytes: int, _version: str) -> bytes:
    """Kept: parts never change, and a progress line asks again and again. Raises FileNotFoundError."""
    if (tail := _end_of(uri)) is None:
        raise FileNotFoundError(uri)
    return tail


def _end_of(uri: str) -> bytes | None:
    """The last whole lines; None when there is no such file."""
    try:
        tail = storage.read_tail(uri, _TAIL_BYTES)
    except FileNotFoundError:
        return None
    return tail if len(tail) < _TAIL_BYTES else tail.partition(b"\n")[2]


Segment = tuple[str, int, str]


def _segments(run_dir: str) -> list[Segment]:
    """(name, bytes, version), in the order in which they were begun; other files there are a person's."""
    files = storage.listing(storage.join(run_dir, EVENTS)).files
    return sorted((name, *about) for name, about in files.items() if _SEGMENT.match(name))


def _newest(segments: list[Segment]) -> list[Segment]:
    """Those that may hold one of the newest events: a process begins a new segment after a while."""
    chosen: list[Segment] = []
    size, since = 0, -math.inf
    for segment in reversed(segments):
        begun = int(segment[0].partition("-")[0]) / 1e3
        if size >= _TAIL_BYTES and begun < since:
            break
        since = begun - SEGMENT_S if not chosen else since
        chosen.insert(0, segment)
        size += segment[1]
    return chosen


def _events(run_dir: str, segments: list[Segment], torn: list[str] | None) -> list[Row]:
    uri, damaged = storage.join(run_dir, OLD_EVENTS), [] if torn is None else torn
    old = [] if segments else [_parsed(uri, _content(uri) or b"", damaged)]
    uris = [storage.join(run_dir, EVENTS, name) for name, _, _ in segments]
    contents = _map(lambda n: _segment(uris[n], *segments[n][1:]), range(len(uris)))
    return _in_order(old + [_parsed(u, c, damaged) for u, c in zip(uris, contents, strict=True)])


@lru_cache(maxsize=512)
def _segment(uri: str, _bytes: int, _version: str) -> bytes:
    """Kept, as most do not change any more; 8 MB at most."""
    return storage.read_bytes(uri)


Place = tuple[float, float, int]
"""(time, group, 0 before its begin, 1 its begin, 2 later)."""
_FIRST, _LAST = (-math.inf, 0.0, 0), (math.inf, math.inf, 0)


def _in_order(sources: list[list[Row]]) -> list[Row]:
    """By time, a process's own events as it wrote them. Clocks of hosts differ a little, so what a worker group tells
    stands between the event that began it and the one that began the next."""
    if len(sources) < 2:
        return sources[0] if sources else []
    begun = _begun(sources)
    numbers = [*begun]
    placed: list[tuple[Place, int, int, Row]] = []
    for source, events in enumerate(sources):
        at, low = -math.inf, _FIRST  # an event's lower bound is also one of all that its process told later
        places: list[Place] = []
        highs: list[Place] = []
        for event in events:
            at, number, high = max(at, event.get("time", at)), event.get("generation"), _LAST
            if isinstance(number, int) and number in begun:
                begins = event.get("event") == "group"
                low = max(low, (begun[number], number, 1 if begins else 2))
                following = numbers[bisect_right(numbers, number) :][:1]
                high = low if begins else min(((begun[n], n, 0) for n in following), default=_LAST)
            places.append(max((at, math.inf, 2), low))
            highs.append(high)
        highest = _LAST  # and its upper bound one of all earlier ones
        for n in reversed(range(len(events))):
            highest = min(highest, highs[n])
            placed.append((min(places[n], highest), source, n, events[n]))
    return [event for *_, event in sorted(placed, key=lambda p: p[:3])]


def _begun(sources: list[list[Row]]) -> dict[int, float]:
    """{group: when it began}, never before the group before it: a driver may go on with a run on a machine whose clock
    is behind. Then, when the one before told its last event."""
    found, told = dict[int, float](), dict[int, float]()
    for event in (event for events in sources for event in events if isinstance(event.get("generation"), int)):
        number, at = event["generation"], event.get("time", -math.inf)
        told[number] = max(at, told.get(number, at))
        if event.get("event") == "group" and "time" in event:
            found[number] = at
    begun: dict[int, float] = {}
    for number in sorted(found):
        before = max(begun.values(), default=-math.inf)
        later = found[number] >= before
        begun[number] = found[number] if later else max(before, *(told[n] for n in begun))
    return begun


def _content(uri: str) -> bytes | None:
    try:
        return storage.read_bytes(uri)
    except FileNotFoundError:
        return None


def _map(read: Callable[[Any], bytes], keys: Sequence[Any]) -> list[bytes]:
    """Many small objects at once: on S3 each takes tens of milliseconds."""
    if len(keys) < 2:
        return [read(key) for key in keys]
    with ThreadPoolExecutor(16) as pool:
        return list(pool.map(read, keys))


def _parsed(uri: str, content: bytes, torn: list[str] | None, last_torn: bool = False) -> list[Row]:
    """The rows; damaged lines go to `torn`. Without it, only a last one that a crash cut off is left out."""
    rows, lines = [], content.splitlines()
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError("no row")
            rows.append(row)
        except ValueError as error:
            if torn is not None:
                torn.append(f"{uri}: line {number}")
            elif not (last_torn and number == len(lines)):
                raise ValueError(f"{uri}: line {number} is damaged: {error}") from error
    return rows
