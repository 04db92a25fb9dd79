"""The journal of a run: applied steps (`metrics.jsonl`), events (`events.jsonl`), where the current group started and
which group may write (`generation.json`). Runs in the controller, workers and the driver.

In: rows of applied steps, events, the decision from which checkpoint a worker group starts.
Out: exactly one row per applied step, whatever was killed; a `Generation` that the stream and all ranks share.

A row counts once the checkpoint that holds its step is committed. When a group starts from samples_seen = c, rows
beyond c are dropped: their steps are lost and will be applied again.
"""

import contextlib
import errno
import json
import logging
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

_logger = logging.getLogger(__name__)
_TAIL_BYTES = 1 << 16
_TAKEN = "another driver has taken {} over; this one ends, and the run goes on there"


@dataclass(frozen=True)
class Generation:
    """One start of a worker group, and the state it starts from. Written by the controller, read by every rank."""

    number: int
    samples_seen: int = 0
    checkpoint: str | None = None
    failures_in_place: int = 0
    """Failures in a row without a new checkpoint in between; too many end the run. A resize is no failure."""
    metrics_bytes: int = 0
    """Length of metrics.jsonl that belongs to the checkpoint."""
    bad_in_epoch: int = 0
    """Samples of the current epoch whose case is invalid."""
    fence: int = 0
    """Number of the newest group that was begun, even if its start is not decided yet: older ones may not write."""
    rolled_back_from: int = -1
    """Position from which steps were not finite."""
    roll_backs: int = 0
    """How often groups were rolled back from there."""
    driver: str = ""
    """Token of the driver's lease: no other driver may begin a group."""


def begin_generation(run_dir: str, driver: str = "") -> Generation:
    """Choose the newest valid checkpoint, record the decision, and drop the rows beyond it.

    Raises RunFailed, and leaves rows and checkpoints as they are, when none is valid although there were some, or when
    another driver took the run over ("" as `driver` does not check).

    A kill may come between any two of these steps, and a group that was replaced may still be writing, so the order is:
    1. Raise the fence: from then on no older group passes `MetricsLog.check`. First, since whatever is read before that
       may change.
    2. Remove checkpoints that a replaced group committed late. Their rows were dropped when the current group began.
    3. Choose the checkpoint. Nothing that counts was removed yet, so a person can restore it if none is valid.
    4. Record the decision. A writer that passed its fence before 1 may still put its manifest; if it comes after 3, the
       record is what tells the next call that it is late (2).
    5. Drop the rows. After 4: were they dropped first and this process killed, the late checkpoint would be chosen next
       time, without its rows.
    """
    content, known = _read(run_dir)
    before = known or Generation(0, driver=driver)
    if driver and before.driver != driver:
        raise RunFailed(_TAKEN.format(run_dir))
    last = 0 if before.number else control.newest(run_dir)  # a person removed generation.json: no number twice
    fence = max(before.number, before.fence, last) + 1
    content = _decide(run_dir, content, replace(before, fence=fence))
    _remove_temporary_files(run_dir)
    _end_torn_line(run_dir)
    for name, seen, generation in checkpoint.committed(run_dir):
        if generation < before.number and seen > before.samples_seen:
            checkpoint.discard(run_dir, name)
    found, damaged = checkpoint.newest_valid(run_dir)
    if damaged:  # they will be removed: one bad read must not cost a good checkpoint
        found, damaged = checkpoint.newest_valid(run_dir)
    status = control.status(run_dir, before.number)
    if status.stopped and before.failures_in_place >= 0:  # else a person has started the run again since
        raise RunFailed(status.stopped)
    if found is None and (damaged or before.checkpoint or status.committed):
        why = "; ".join(f"{name}: {reason}" for name, reason in damaged) or "they are gone"
        raise RunFailed(f"no checkpoint of {run_dir} is valid ({why}); restore them, or give another --run-dir")
    for name, why in damaged:
        event(run_dir, "damaged_checkpoint", name=name, why=why)
        checkpoint.discard(run_dir, name)
    decided = replace(before, number=fence, samples_seen=0, checkpoint=None, failures_in_place=0, fence=fence)
    decided = replace(decided, metrics_bytes=0, bad_in_epoch=0)
    if (first := status.rolled_back_from) >= 0:
        again = before.roll_backs if first == before.rolled_back_from else 0
        decided = replace(decided, rolled_back_from=first, roll_backs=again + 1)
    if found:
        state = {key: found.state[key] for key in ("metrics_bytes", "bad_in_epoch")}
        decided = replace(decided, samples_seen=found.samples_seen, checkpoint=found.name, **state)
    if decided.samples_seen == before.samples_seen:
        decided = replace(decided, failures_in_place=max(0, before.failures_in_place + bool(status.failure)))
    last_row = recent(run_dir)[0][-1:]
    content = _decide(run_dir, content, decided)
    dropped = _cut_metrics(run_dir, decided.metrics_bytes, content)
    facts: dict[str, Any] = {"samples_seen": decided.samples_seen, "checkpoint": decided.checkpoint}
    facts |= {"failures_in_place": decided.failures_in_place, "redone_steps": dropped}
    event(run_dir, "group", generation=decided.number, last_row=last_row[0].get("time") if last_row else None, **facts)
    return decided


def _decide(run_dir: str, before: bytes | None, generation: Generation) -> bytes:
    """Replace generation.json by compare-and-swap. Raises RunFailed when another driver wrote it in between."""
    content = json.dumps(asdict(generation)).encode()
    if not RunDir(run_dir).generation.swap(before, content):
        raise RunFailed(_TAKEN.format(run_dir))
    return content


def _remove_temporary_files(run_dir: str) -> None:
    """Remove temporary files of controllers that were killed while they wrote; nobody else writes these files so."""
    if not storage.is_s3(run_dir):
        for name in (".generation.json", ".metrics.jsonl", "groups/.*.json"):
            for path in Path(run_dir).glob(f"{name}.*.tmp"):
                path.unlink(missing_ok=True)


def _cut_metrics(run_dir: str, length: int, decision: bytes) -> int:
    """Keep the first `length` bytes; returns the number of rows that were dropped.

    Raises RunFailed when there are fewer, and when `decision` is not the current one any more. A later group's rows are
    safe: the swap replaces only the content that was read before the decision was checked.
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
    """Reset the failure counter for a manual restart and take ownership of the run."""
    _end_torn_line(run_dir)
    for last in (False, False, True):  # the previous driver may still begin a group, which writes at most twice
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
    """(content, parsed content) of generation.json; None when there is none."""
    document = RunDir(run_dir).generation
    content = document.read()
    return content, document.parsed(content, Generation)


_unwritten: dict[str, str] = {}
_writing = threading.Lock()


def event(run_dir: str, kind: str, **facts: Any) -> None:
    """Append one line to events.jsonl; where the storage fails, it is kept and written with the next event.

    Never raises OSError: no decision depends on an event, so a full disk or an outage must not end the caller.
    """
    about = {"event": kind, "time": time.time(), "mono_s": time.monotonic()}
    row = about | {"host": socket.gethostname(), "pid": os.getpid()} | facts
    uri = RunDir(run_dir).events
    with _writing:
        lines = _unwritten.pop(uri, "") + json.dumps(row) + "\n"
        try:
            storage.append(uri, lines)
        except OSError as error:
            _unwritten[uri] = "\n" + lines.lstrip("\n")  # a part may have been written; readers skip a torn line
            _logger.warning("%s: not written to events.jsonl yet (%s)", kind, error)


def warn(run_dir: str, text: str) -> None:
    """Report what a person must act on: in this process's log, and as an event that the driver prints."""
    _logger.warning("%s", text)
    event(run_dir, "warning", text=text)


def read_rows(run_dir: str) -> list[dict[str, Any]]:
    """The applied steps, in order."""
    return _lines(RunDir(run_dir).metrics)


def read_events(run_dir: str) -> list[dict[str, Any]]:
    return _lines(RunDir(run_dir).events, torn_lines=True)


def recent(run_dir: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The last hundreds of rows and events: enough for a progress line, at a cost that does not grow with the run."""
    found = []
    for uri in (RunDir(run_dir).metrics, RunDir(run_dir).events):
        try:
            tail = storage.read_tail(uri, _TAIL_BYTES)
        except FileNotFoundError:
            tail = b""
        lines = tail.splitlines()[1 if len(tail) == _TAIL_BYTES else 0 :]  # the first may be incomplete
        found.append(_parsed(uri, lines, torn_lines=True))
    return found[0], found[1]


def last_row_time(run_dir: str) -> float | None:
    """When the last step in the rows was applied; None on S3, where rows are written late."""
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
    """End an event's line that a crash truncated, or the next event would be appended to it."""
    uri = RunDir(run_dir).events
    if not (Document(uri).read() or b"\n").endswith(b"\n"):
        storage.append(uri, "\n")  # appended, not rewritten: dying workers may still append


class MetricsLog:
    """Writes rank 0's rows: at once on a local disk; on S3, which cannot append, with each checkpoint."""

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
            with contextlib.suppress(OSError):  # disk full: tried again with the next row and before the next commit
                self._put()

    def _put(self, sync: bool = False) -> None:
        """Write the waiting rows. A part that a full disk wrote is removed, so the file always ends with a row."""
        with self._lock:
            lines = "".join(self._waiting).encode()
            file = os.open(self._uri, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            try:
                end, length = self.bytes - len(lines), os.fstat(file).st_size
                if length != end:
                    self.check()
                    if length < end:
                        raise RuntimeError(f"{self._uri} was cut by somebody else")
                    os.ftruncate(file, end)  # rows of a replaced group that had passed its fence just before
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
        """The fence. Raises RuntimeError when a later worker group has begun, after which this one must not write."""
        now = current(self._run_dir)
        if now is None or now.fence != self._generation.number:
            raise RuntimeError(f"worker group {self._generation.number} was replaced by a later one")

    def flush(self) -> None:
        """Make every row added so far durable; called before the commit of a checkpoint, which counts them."""
        self.check()
        if not storage.is_s3(self._uri):
            self._put(sync=True)
            return
        with self._lock:
            lines = list(self._waiting)
            start = self.bytes - sum(map(len, lines))
        # An outage may delay this for minutes, in which a later group may begin: then the file has another length.
        try:
            storage.append(self._uri, "".join(lines), start)
        except FileExistsError as error:
            raise RuntimeError(f"another worker group has written: {error}") from error
        with self._lock:
            del self._waiting[: len(lines)]


def validated(run_dir: str, seen: int) -> bool:
    """Whether the validation at `seen` samples was written: a kill may have come between it and the checkpoint."""
    return storage.exists(RunDir(run_dir).validation(seen))
