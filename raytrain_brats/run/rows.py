"""Write the rows of applied steps: a part with each checkpoint, in `metrics/`, which `books` reads. Runs in a worker
(rank 0 writes) and in the controller (`settle`).

In: rows of rank 0; the sample from which a new worker group starts.
Out: parts that are never rewritten, so that bytes written a checkpoint do not grow with the run.

A part is there before the checkpoint that counts it, so that a committed checkpoint has its rows. Its name says which
group wrote it: what a replaced group writes late, or wrote beyond the checkpoint, does not count (`books.chain`).
Small parts are merged now and then, or a long run would have a hundred thousand objects to list: the merged one first,
then the small ones go, so that a kill in between leaves both, of which the longer counts.
"""

import contextlib
import errno
import json
import os
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raytrain_brats import books, storage
from raytrain_brats.books import Part
from raytrain_brats.errors import RunFailed
from raytrain_brats.run.control import Generation, current
from raytrain_brats.run.run_dir import RunDir

MERGE_BYTES, MERGE_PARTS = 1 << 20, 64
"""Parts are merged when they are so large together, or so many."""
CLOSED_BYTES = 1 << 18
"""A part of this size stays; a smaller one is merged again with what follows."""


class MetricsLog:
    """Rank 0's rows of one worker group, behind its fence. On a local disk they can be seen at once, on S3, which
    cannot append, with each checkpoint."""

    def __init__(self, run_dir: str, generation: Generation) -> None:
        self._run_dir, self._generation, self._end = run_dir, generation.number, generation.samples_seen
        self._lock = threading.Lock()
        self._waiting: list[tuple[int, str]] = []
        self._shown = 0
        """Waiting rows that are in the live file."""
        self._small: list[tuple[Part, str]] = []

    def check(self) -> None:
        """The fence. Raises RuntimeError when a later worker group has begun, after which this one must not write."""
        now = current(self._run_dir)
        if now is None or now.fence != self._generation:
            raise RuntimeError(f"worker group {self._generation} was replaced by a later one")

    def add(self, row: dict[str, Any]) -> None:
        """Keep the row of the next step; `samples_seen` in it says which."""
        with self._lock:
            self._waiting.append((row["samples_seen"], json.dumps(row) + "\n"))
        if not storage.is_s3(self._run_dir):
            self.check()
            with contextlib.suppress(OSError):  # disk full: shown with the next row or in the next part
                self._show()

    def _show(self) -> None:
        """Append to the live file, which starts anew after each part. A part that a full disk wrote is removed."""
        path = Path(_uri(self._run_dir, books.live(self._generation)))
        path.parent.mkdir(parents=True, exist_ok=True)
        with self._lock:
            lines = "".join(line for _, line in self._waiting[self._shown :]).encode()
            file = os.open(path, os.O_WRONLY | os.O_CREAT | (os.O_APPEND if self._shown else os.O_TRUNC), 0o644)
            try:
                end = os.fstat(file).st_size
                if os.write(file, lines) != len(lines):
                    os.ftruncate(file, end)
                    raise OSError(errno.ENOSPC, "only a part could be written; the disk is full", str(path))
                self._shown = len(self._waiting)
            finally:
                os.close(file)

    def flush(self, seen: int | None = None) -> None:
        """Put the rows up to the sample `seen` (all by default) as one part, durably. Raises OSError."""
        self.check()
        with self._lock:
            rows = [row for row in self._waiting if seen is None or row[0] <= seen]
        if not rows:
            return
        part, text = Part(self._end, rows[-1][0], self._generation), "".join(line for _, line in rows)
        storage.write_bytes(_uri(self._run_dir, part.name), text.encode())
        with self._lock:
            del self._waiting[: len(rows)]
            self._shown = 0
        self._end = part.end
        # A large part ends what may be merged, as in `plan`: the late merge of a group that was replaced meanwhile must
        # not begin where a part that counts does.
        self._small = [] if len(text) >= CLOSED_BYTES else [*self._small, (part, text)]

    def merge(self) -> None:
        """Put small parts together, if they are many by now. Raises OSError."""
        small, size = self._small, sum(len(text) for _, text in self._small)
        if len(small) < MERGE_PARTS and size < MERGE_BYTES:
            return
        self._small = []
        if len(small) > 1:
            self.check()
            merged = Part(small[0][0].start, small[-1][0].end, self._generation)
            text = "".join(text for _, text in small)
            storage.write_bytes(_uri(self._run_dir, merged.name), text.encode())
            self._small = [(merged, text)] if size < CLOSED_BYTES else []
            for part, _ in small:
                storage.delete(_uri(self._run_dir, part.name))


def _uri(run_dir: str, name: str) -> str:
    return storage.join(RunDir(run_dir).metrics, name)


@dataclass(frozen=True)
class Plan:
    """The rows from which a new group goes on."""

    generation: int
    kept: tuple[Part, ...]
    found: tuple[Part, ...]
    merged: tuple[Part, bytes] | None
    """What takes the place of the small parts at the end."""


def plan(run_dir: str, generation: int, seen: int) -> Plan:
    """Read what a group that starts from `seen` samples needs; nothing is changed.

    Raises RunFailed unless the rows of all these samples are there.
    """
    for _ in range(5):
        found = books.parts(run_dir)
        kept, tail = books.chain(found, generation, seen), list[Part]()
        if (end := kept[-1].end if kept else 0) < seen:
            raise RunFailed(f"{RunDir(run_dir).metrics} ends at sample {end:,}, the checkpoint at {seen:,}; restore it")
        while kept and (kept[-1].bytes < CLOSED_BYTES or kept[-1].end > seen):
            tail.insert(0, kept.pop())
        try:
            text = b"".join(_up_to(run_dir, part, seen) for part in tail)
        except FileNotFoundError:  # a replaced group has merged it just now
            continue
        merged = (Part(tail[0].start, seen, generation), text) if tail else None
        return Plan(generation, tuple(kept), tuple(found), merged)
    raise RunFailed(f"{RunDir(run_dir).metrics} changes all the time; end the workers that still write there")


def _up_to(run_dir: str, part: Part, seen: int) -> bytes:
    """A part's rows up to the sample `seen`."""
    uri = _uri(run_dir, part.name)
    lines = storage.read_bytes(uri).splitlines(keepends=True)
    try:
        ends = [json.loads(line)["samples_seen"] for line in lines]
    except (ValueError, KeyError, TypeError) as error:
        raise RunFailed(f"{uri} is damaged ({error}); restore it") from error
    if ends[-1:] != [part.end]:
        raise RunFailed(f"{uri} is shorter than its name says; restore it")
    return b"".join(line for line, end in zip(lines, ends, strict=True) if end <= seen)


def settle(run_dir: str, plan: Plan) -> None:
    """Merge the small parts at the end, and remove what does not count.

    The merged part is the new group's, so that it counts more than any that a replaced group may still put; it ends
    where the group starts, also where an older part reaches beyond.
    """
    if plan.merged:
        part, text = plan.merged
        storage.write_bytes(_uri(run_dir, part.name), text)
    for part in plan.found:
        if part.generation < plan.generation and part not in plan.kept:
            storage.delete(_uri(run_dir, part.name))
    if not storage.is_s3(run_dir):
        folder = Path(RunDir(run_dir).metrics)
        for path in [*folder.glob("live-g*.jsonl"), *folder.glob(".*.tmp")]:  # of groups that were killed
            path.unlink(missing_ok=True)
