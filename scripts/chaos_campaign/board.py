"""Where a process is just now, in memory that outlives it.

In: marks of the training loop, writes of checkpoints and books.
Out: the phase of each rank's training thread and of its writer thread, also after a SIGKILL.
"""

import mmap
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from raytrain_brats import storage
from raytrain_brats.run import checkpoint
from raytrain_brats.run.rows import MetricsLog

TRAINING = ("start", "load", "data", "forward", "backward", "reduce", "update", "save", "validate", "end")
WRITING = ("checkpoint write", "commit", "rows", "journal", "prune")
PHASES = ("", *TRAINING, *WRITING, "begin", "ready", "gather", "close")
MAIN, WRITER = 0, 1
_FILES = {"tensors.safetensors": "checkpoint write", "state.json": "checkpoint write", "MANIFEST.json": "commit"}
_SLOT = 128


class Board:
    """Anonymous shared memory, so that it is there before the fork and after the death."""

    def __init__(self, ranks: int = 8) -> None:
        self._memory = mmap.mmap(-1, ranks * _SLOT)

    def put(self, rank: int, lane: int, phase: str) -> None:
        number = PHASES.index(phase)
        at = rank * _SLOT + 4 + 2 * number
        struct.pack_into("H", self._memory, at, (struct.unpack_from("H", self._memory, at)[0] + 1) % 65536)
        self._memory[rank * _SLOT + lane] = number

    def get(self, rank: int, lane: int) -> str:
        return PHASES[self._memory[rank * _SLOT + lane]]

    def visits(self, rank: int, phase: str) -> int:
        return int(struct.unpack_from("H", self._memory, rank * _SLOT + 4 + 2 * PHASES.index(phase))[0])

    @contextmanager
    def during(self, rank: int, phase: str) -> Iterator[None]:
        """A part of a phase: afterwards it is the phase before again."""
        lane = MAIN if threading.current_thread() is threading.main_thread() else WRITER
        before = self._memory[rank * _SLOT + lane]
        self.put(rank, lane, phase)
        try:
            yield
        finally:
            self._memory[rank * _SLOT + lane] = before

    def watch_writes(self, rank: int) -> None:
        """From here on this process tells what it writes."""
        write_bytes, prune, show = storage.write_bytes, checkpoint.prune, MetricsLog._show

        def told_write(uri: str, content: bytes | mmap.mmap) -> None:
            rows = "rows" if uri.endswith(".jsonl") else "journal"
            with self.during(rank, _FILES.get(uri.rsplit("/", 1)[-1], rows)):
                write_bytes(uri, content)

        def told_prune(*given: Any) -> None:
            with self.during(rank, "prune"):
                prune(*given)

        def told_show(log: MetricsLog) -> None:
            with self.during(rank, "rows"):
                show(log)

        storage.write_bytes, checkpoint.prune = told_write, told_prune
        MetricsLog._show = told_show  # type: ignore[method-assign, assignment]
