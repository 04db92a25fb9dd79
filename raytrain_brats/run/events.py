"""Write a run's events: what happened, for people, reports and Prometheus. Runs in any process.

In: events of this process.
Out: lines in segments of its own below `events/` (read by `books`); no two processes write one object.

On a disk a line is appended; on S3, which cannot append, the segment, at most some 16 KB, is put again. The driver and
the controller write at once. A worker writes in a thread (`in_background`): no step waits for the storage.
"""

import contextlib
import json
import logging
import os
import re
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

from raytrain_brats import storage
from raytrain_brats.books import SEGMENT_BYTES, SEGMENT_S
from raytrain_brats.run.repeated import Repeated
from raytrain_brats.run.run_dir import RunDir

_logger = logging.getLogger(__name__)
_MOST_WAITING = 10_000
"""Lines kept while the storage is away; later ones are dropped."""
_EVERY_S = 1.0
"""On S3 a worker puts the events of this long at once; what could not be written is tried again so often."""

Line = str | Callable[[], str]
"""A late one is made by whoever writes it."""


class _Log:
    """This process's events of one run folder."""

    def __init__(self, run_dir: str) -> None:
        self._folder = RunDir(run_dir).events
        self._lock, self._storing = threading.Lock(), threading.Lock()
        self._waiting: list[Line] = []
        self.writer: Repeated | None = None
        """The thread that stores what is added; without one, whoever adds does."""
        self._uri, self._text, self._bytes, self._begun = "", "", 0, 0.0

    def add(self, kind: str, line: Line) -> None:
        with self._lock:
            if len(self._waiting) < _MOST_WAITING:
                self._waiting.append(line)
        if self.writer:
            if not storage.is_s3(self._folder):  # there the events of a second are put at once
                self.writer.wake()
            return
        try:
            self.store()
        except OSError as error:
            _logger.warning("%s: not written to events/ yet (%s)", kind, error)

    def store(self) -> None:
        """Write what waits. Raises OSError; then it waits on."""
        with self._storing:
            with self._lock:
                waiting = list(self._waiting)
            if not waiting:
                return
            lines = [line if isinstance(line, str) else _made(line) for line in waiting]
            with self._lock:
                self._waiting[: len(lines)] = lines
            if not self._uri or self._bytes > SEGMENT_BYTES or time.time() > self._begun + SEGMENT_S:
                self._begin_segment()
            self._put("".join(lines))
            with self._lock:
                del self._waiting[: len(lines)]

    def _begin_segment(self) -> None:
        self._text, self._bytes, self._begun = "", 0, time.time()
        host = re.sub(r"[^A-Za-z0-9.-]", "_", socket.gethostname())
        name = f"{int(1e3 * self._begun):013d}-{host}-{os.getpid()}-{uuid.uuid4().hex[:4]}.jsonl"
        self._uri = storage.join(self._folder, name)

    def _put(self, text: str) -> None:
        try:
            if storage.is_s3(self._uri):
                storage.write_bytes(self._uri, (self._text + text).encode())
                self._text += text
            else:
                storage.append(self._uri, text)
        except OSError:
            # On S3 the whole segment is put again, whether it arrived or not; a full disk may have taken a part of it.
            if not storage.is_s3(self._uri):
                try:
                    os.truncate(self._uri, self._bytes)
                except OSError:
                    self._uri = ""
            raise
        self._bytes += len(text)


def _made(line: Callable[[], str]) -> str:
    try:
        return line()
    except Exception:
        _logger.exception("an event is left out")
        return ""


_logs: dict[tuple[int, str], _Log] = {}


def _log(run_dir: str) -> _Log:
    """By process: one that was forked has its own segments."""
    key = os.getpid(), storage.normal(run_dir)
    return _logs.get(key) or _logs.setdefault(key, _Log(run_dir))


def event(run_dir: str, kind: str, **facts: Any) -> None:
    """Add one event; where the storage fails, it is kept and written with the next one.

    Never raises OSError: no decision depends on an event, so a full disk or an outage must not end the caller.
    """
    _log(run_dir).add(kind, json.dumps(_about(kind) | facts) + "\n")


def event_from(run_dir: str, kind: str, facts: Callable[[], dict[str, Any]], **more: Any) -> None:
    """An event whose facts are found by whoever writes it: in a worker not by the step."""
    about = _about(kind)
    _log(run_dir).add(kind, lambda: json.dumps(about | more | facts()) + "\n")


def _about(kind: str) -> dict[str, Any]:
    about = {"event": kind, "time": time.time(), "mono_s": time.monotonic()}
    return about | {"host": socket.gethostname(), "pid": os.getpid()}


def warn(run_dir: str, text: str) -> None:
    """Report what a person must act on: in this process's log, and as an event that the driver prints."""
    _logger.warning("%s", text)
    event(run_dir, "warning", text=text)


def flush(run_dir: str) -> None:
    """Write what this process has told so far, in the caller's thread. Never raises OSError."""
    with contextlib.suppress(OSError):
        _log(run_dir).store()


@contextlib.contextmanager
def in_background(run_dir: str, patience_s: float = 5.0) -> Iterator[None]:
    """Within, `event` only hands over. At the end all is written, or given up after `patience_s`."""
    log = _log(run_dir)
    try:
        with Repeated("events", log.store, _EVERY_S, patience_s) as log.writer:
            yield
    finally:
        if log.writer and not log.writer.alive:
            log.writer = None
            flush(run_dir)  # what was added while the thread wrote for the last time
