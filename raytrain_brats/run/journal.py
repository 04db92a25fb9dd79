"""The run folder's books: what was applied (`metrics.jsonl`), what happened (`events.jsonl`), who may write.

In: rows of applied steps, events, the decision from where a worker group goes on.
Out: one row per applied step, whatever died; a `Generation` that the stream and all ranks share.

A row counts once the checkpoint that holds its step is committed. When a group starts from samples_seen = c, rows
beyond c are dropped: their steps are lost and will be done again.
"""

import contextlib
import errno
import json
import os
import socket
import threading
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from raytrain_brats import storage
from raytrain_brats.errors import RunFailed
from raytrain_brats.run import checkpoint, control
from raytrain_brats.run.run_dir import Document, RunDir

_TAIL_BYTES = 1 << 16
_TAKEN = "another driver has taken {} over; this one ends, and the run goes on there"


@dataclass(frozen=True)
class Generation:
    """One start of a worker group: where it goes on. Written by the controller, read by every rank."""

    number: int
    samples_seen: int = 0
    checkpoint: str | None = None
    failures_in_place: int = 0
    """Failures in a row without a new checkpoint: then restarting is no use. A resize is none."""
    metrics_bytes: int = 0
    """Length of metrics.jsonl that belongs to the checkpoint."""
    bad_in_epoch: int = 0
    """Samples of the running epoch that could not be read."""
    fence: int = 0
    """Number of the newest group that was begun, decided or not: older ones may not write."""
    rolled_back_from: int = -1
    """Position at which steps ceased to be finite, and how often groups came back to it."""
    roll_backs: int = 0
    driver: str = ""
    """Token of the driver's lease: no other driver may begin a group."""


def begin_generation(run_dir: str, driver: str = "") -> Generation:
    """Choose the newest valid checkpoint, cut the books back to it, and record the decision.

    Raises RunFailed, and leaves books and checkpoints as they are, when none is valid although there were some, or when
    the run is not this `driver`'s any more ("" does not ask).
    """
    content, known = _read(run_dir)
    before = known or Generation(0, driver=driver)
    if driver and before.driver != driver:
        raise RunFailed(_TAKEN.format(run_dir))
    fence = max(before.number, before.fence) + 1
    # First of all: from here on no older group passes its fence.
    content = _decide(run_dir, content, replace(before, fence=fence))
    _sweep(run_dir)
    _end_torn_line(run_dir)

    def late(generation: int, seen: int) -> bool:  # committed by a group that had been replaced: its rows are gone
        return generation < before.number and seen > before.samples_seen

    for name, seen, generation in checkpoint.committed(run_dir):
        if late(generation, seen):
            checkpoint.discard(run_dir, name)
    found, damaged = checkpoint.newest_valid(run_dir)
    happened = control.status(run_dir, before.number)
    if found is None and (damaged or before.checkpoint or happened.committed):
        why = "; ".join(f"{name}: {reason}" for name, reason in damaged) or "they are gone"
        raise RunFailed(f"no checkpoint of {run_dir} is valid ({why}); restore them, or give another --run-dir")
    for name, why in damaged:
        event(run_dir, "damaged_checkpoint", name=name, why=why)
        checkpoint.discard(run_dir, name)
    decided = replace(before, number=fence, samples_seen=0, checkpoint=None, failures_in_place=0, fence=fence)
    decided = replace(decided, metrics_bytes=0, bad_in_epoch=0)
    if (first := happened.rolled_back_from) >= 0:
        again = before.roll_backs if first == before.rolled_back_from else 0
        decided = replace(decided, rolled_back_from=first, roll_backs=again + 1)
    if found:
        books = {key: found.state[key] for key in ("metrics_bytes", "bad_in_epoch")}
        decided = replace(decided, samples_seen=found.samples_seen, checkpoint=found.name, **books)
    if decided.samples_seen == before.samples_seen:
        decided = replace(decided, failures_in_place=max(0, before.failures_in_place + bool(happened.failure)))
    last_row = recent(run_dir)[0][-1:]
    # Before the cut: from here on a commit that was amid its fence is late, its rows may go.
    content = _decide(run_dir, content, decided)
    dropped = _cut_metrics(run_dir, decided.metrics_bytes, content)
    facts: dict[str, Any] = {"samples_seen": decided.samples_seen, "checkpoint": decided.checkpoint}
    facts |= {"failures_in_place": decided.failures_in_place, "redone_steps": dropped}
    event(run_dir, "group", generation=decided.number, last_row=last_row[0].get("time") if last_row else None, **facts)
    return decided


def _decide(run_dir: str, before: bytes | None, generation: Generation) -> bytes:
    """Put generation.json in place of what was read. Raises RunFailed when another driver was there in between."""
    content = json.dumps(asdict(generation)).encode()
    if not RunDir(run_dir).generation.swap(before, content):
        raise RunFailed(_TAKEN.format(run_dir))
    return content


def _sweep(run_dir: str) -> None:
    """Remove what controllers left beside the books that were killed amid a write; nobody else writes these whole."""
    if not storage.is_s3(run_dir):
        for name in (".generation.json", ".metrics.jsonl", "groups/.*.json"):
            for path in Path(run_dir).glob(f"{name}.*.tmp"):
                path.unlink(missing_ok=True)


def _cut_metrics(run_dir: str, length: int, decision: bytes) -> int:
    """Leave the first `length` bytes; the number of rows that went.

    Raises RunFailed when there are fewer, and when `decision` is not in force any more: a later group's rows are safe,
    as nothing is cut but what was read before that was asked.
    """
    while True:
        content = Document(RunDir(run_dir).metrics).read()
        if _read(run_dir)[0] != decision:
            raise RunFailed(_TAKEN.format(run_dir))
        kept = (content or b"")[:length]
        if len(kept) < length:
            raise RunFailed(f"{RunDir(run_dir).metrics} is shorter than at the last checkpoint; restore it")
        if content == kept or storage.swap(RunDir(run_dir).metrics, content, kept):
            return len((content or b"")[length:].splitlines())


def take_over(run_dir: str, driver: str = "") -> None:
    """A person started the run again: earlier failures in place no longer count; from now on it is this driver's."""
    _end_torn_line(run_dir)
    for last in (False, False, True):  # the driver before us may still be beginning a group: at most twice
        content, before = _read(run_dir)
        try:
            if before or driver:
                _decide(run_dir, content, replace(before or Generation(0), failures_in_place=-1, driver=driver))
            return
        except RunFailed:
            if last:
                raise


def current(run_dir: str) -> Generation | None:
    return _read(run_dir)[1]


def _read(run_dir: str) -> tuple[bytes | None, Generation | None]:
    """generation.json as it is and as it reads; None when there is none."""
    document = RunDir(run_dir).generation
    content = document.read()
    try:
        return content, None if content is None else Generation(**json.loads(content))
    except (ValueError, TypeError) as error:
        raise RunFailed(
            f"{document.uri} is damaged ({error}); remove it: the checkpoints say where to go on"
        ) from error


_untold: dict[str, str] = {}
_telling = threading.Lock()


def event(run_dir: str, kind: str, **facts: Any) -> None:
    """Add one line to events.jsonl, at once and for good; when the storage fails, with the next that gets through.

    Nothing hangs on an event being there, so a full disk or an outage must not end what it tells of.
    """
    about = {"event": kind, "time": time.time(), "mono_s": time.monotonic()}
    row = about | {"host": socket.gethostname(), "pid": os.getpid()} | facts
    uri = RunDir(run_dir).events
    with _telling:
        lines = _untold.pop(uri, "") + json.dumps(row) + "\n"
        try:
            storage.append(uri, lines)
        except OSError as error:
            _untold[uri] = "\n" + lines.lstrip("\n")  # a part may have been written: readers pass over a torn line
            print(f"{kind}: not written to events.jsonl yet ({error})", flush=True)


def read_rows(run_dir: str) -> list[dict[str, Any]]:
    """The applied steps, in order."""
    return _lines(RunDir(run_dir).metrics)


def read_events(run_dir: str) -> list[dict[str, Any]]:
    return _lines(RunDir(run_dir).events, torn_lines=True)


def recent(run_dir: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The last rows and events, some hundreds: what a progress line needs, at a cost that does not grow."""
    books = []
    for uri in (RunDir(run_dir).metrics, RunDir(run_dir).events):
        try:
            tail = storage.read_tail(uri, _TAIL_BYTES)
        except FileNotFoundError:
            tail = b""
        lines = tail.splitlines()[1 if len(tail) == _TAIL_BYTES else 0 :]  # the first may be cut
        books.append(_parsed(uri, lines, torn_lines=True))
    return books[0], books[1]


def last_row_time(run_dir: str) -> float | None:
    """When the last step on record was applied; None on S3, where rows come late."""
    rows = recent(run_dir)[0]
    return float(rows[-1]["time"]) if rows and not storage.is_s3(run_dir) else None


def _lines(uri: str, torn_lines: bool = False) -> list[dict[str, Any]]:
    return _parsed(uri, (Document(uri).read() or b"").splitlines(), torn_lines)


def _parsed(uri: str, lines: list[bytes], torn_lines: bool) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            if not torn_lines and number != len(lines):  # only the last line may be torn, by a crash
                raise ValueError(f"{uri}: line {number} is damaged: {error}") from error
    return rows


def _end_torn_line(run_dir: str) -> None:
    """Close an event that a crash cut off, or the next one would join it."""
    uri = RunDir(run_dir).events
    if not (Document(uri).read() or b"\n").endswith(b"\n"):
        storage.append(uri, "\n")  # never rewritten: workers that are dying may still add to it


class MetricsLog:
    """Rank 0's pen: rows show up at once on a local disk; on S3, which cannot append, with each checkpoint."""

    def __init__(self, run_dir: str, generation: Generation) -> None:
        self._run_dir, self._generation, self._uri = run_dir, generation, RunDir(run_dir).metrics
        self._lock = threading.Lock()
        self._waiting: list[str] = []
        self.bytes = generation.metrics_bytes
        """Length of the file with every row added so far."""

    def add(self, row: dict[str, Any]) -> None:
        line = json.dumps(row) + "\n"
        with self._lock:
            self.bytes += len(line)
            self._waiting.append(line)
        if not storage.is_s3(self._uri):
            self.check()
            with contextlib.suppress(OSError):  # disk full: with the next row, and before the next commit at the latest
                self._put()

    def _put(self, sync: bool = False) -> None:
        """Write what waits. A part that a full disk cut off is taken back, so the file always ends with a row."""
        with self._lock:
            lines = "".join(self._waiting).encode()
            file = os.open(self._uri, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            try:
                end, length = self.bytes - len(lines), os.fstat(file).st_size
                if length != end:
                    self.check()
                    if length < end:
                        raise RuntimeError(f"{self._uri} was cut by somebody else")
                    os.ftruncate(file, end)  # a replaced group had passed its fence just before, and wrote after all
                if os.write(file, lines) != len(lines):
                    os.ftruncate(file, end)
                    raise OSError(errno.ENOSPC, "only a part could be written; the disk is full", self._uri)
                self._waiting.clear()
                if sync:
                    os.fsync(file)
                    storage.sync_folder(Path(self._uri).parent)  # the file may be new
            finally:
                os.close(file)

    def check(self) -> None:
        """The fence. Raises RuntimeError when a later worker group has begun: this one must not write any more."""
        now = current(self._run_dir)
        if now is None or now.fence != self._generation.number:
            raise RuntimeError(f"worker group {self._generation.number} was replaced by a later one")

    def flush(self) -> None:
        """Every row added so far is durable afterwards; called before a checkpoint is committed."""
        self.check()
        if not storage.is_s3(self._uri):
            self._put(sync=True)
            return
        with self._lock:
            lines = list(self._waiting)
            start = self.bytes - sum(map(len, lines))
        # An outage may hold this up for minutes, in which a later group begins: then the length is another.
        try:
            storage.append(self._uri, "".join(lines), start)
        except FileExistsError as error:
            raise RuntimeError(f"another worker group has written: {error}") from error
        with self._lock:
            del self._waiting[: len(lines)]


def validated(run_dir: str, seen: int) -> bool:
    """Whether the validation at `seen` samples is on record: a kill may have come between it and the checkpoint."""
    return storage.exists(RunDir(run_dir).validation(seen))
