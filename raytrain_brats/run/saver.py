"""Write checkpoints beside the training, each after the rows and events that belong to it. Runs in a worker (rank 0).

In: the state after a step.
Out: a committed checkpoint, told to the group's status; of the older ones those that are kept.
"""

import contextlib
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from functools import partial
from mmap import mmap
from typing import Any

import torch
from torch import Tensor

from raytrain_brats.run import checkpoint, events, gains
from raytrain_brats.run.control import Generation
from raytrain_brats.run.rows import MetricsLog
from raytrain_brats.run.spec import RunSpec

PATIENCE_S = 300.0
"""How long the last checkpoint of a run is retried while the disk is full or the storage unreachable."""


class Writer:
    """Runs one save at a time, in a thread beside the training."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._running: Future[None] | None = None

    def start(self, write: Callable[[], None]) -> None:
        """Run `write` in the background, after the one before; raises that one's exception."""
        self.wait()
        self._running = self._thread.submit(write)

    def busy(self) -> bool:
        return self._running is not None and not self._running.done()

    def soon_free(self, seconds: float) -> bool:
        """Wait so long at most for the running save; whether it has ended."""
        if self._running is not None:
            wait([self._running], seconds)
        return not self.busy()

    def wait(self) -> None:
        """Wait until the running save has ended; raises its exception."""
        running, self._running = self._running, None
        if running is not None:
            running.result()

    def close(self) -> None:
        with contextlib.suppress(Exception):
            self.wait()
        self._thread.shutdown()


@dataclass(frozen=True)
class Save:
    """A checkpoint to be written."""

    samples_seen: int
    tensors: dict[str, Tensor]
    """As they are: they must not change before `Saver.copied` returns."""
    state: dict[str, Any]
    facts: dict[str, Any]
    """Of its event."""
    answer: dict[str, float]
    """What the group's status is to say, once it is committed, to whoever requested it."""
    last: bool = False
    """The run ends with it."""


class Saver(Writer):
    """Saves the checkpoints of one worker group."""

    def __init__(
        self,
        spec: RunSpec,
        generation: Generation,
        log: MetricsLog,
        note: Callable[..., None],
        stop: Callable[[str], None],
    ) -> None:
        """`note` changes the group's status; `stop` is called when the last checkpoint of the run cannot be written."""
        super().__init__()
        self._spec, self._generation, self._log, self._note, self._stop = spec, generation, log, note, stop
        self._best = gains.Keeper(
            spec.run_dir,
            lambda name, why: self._event("damaged_checkpoint", name=name, why=why),
            partial(events.warn, spec.run_dir),
        )
        self._file: mmap | None = None
        self._copied = threading.Event()
        self._copied.set()

    def save(self, save: Save) -> None:
        """Begin to write, after the save before has ended."""
        self.wait()
        on_gpu = {name: tensor for name, tensor in save.tensors.items() if tensor.is_cuda}
        # The device copies faster than this thread could wait for anything, and in the order of its work.
        tensors = save.tensors | {name: tensor.detach().clone() for name, tensor in on_gpu.items()}
        cloned = torch.cuda.Event() if on_gpu else None
        if cloned:
            cloned.record()
        self._copied.clear()
        self.start(partial(self._persist, replace(save, tensors=tensors), cloned))
        if on_gpu:
            self._copied.set()

    def copied(self) -> None:
        """Wait until the tensors of the last save may change. On a CPU the writer copies them while the next step is
        computed; its update waits for that."""
        self._copied.wait()

    def _copy(self, tensors: dict[str, Tensor], cloned: torch.cuda.Event | None) -> None:
        try:
            if cloned is None:
                self._file = checkpoint.tensors_file(tensors, self._file)
                return
            with torch.cuda.stream(torch.cuda.Stream()) as aside:
                cloned.wait(aside)
                self._file = checkpoint.tensors_file(tensors, self._file)
        finally:
            self._copied.set()

    def _persist(self, save: Save, cloned: torch.cuda.Event | None) -> None:
        """If the storage fails, the previous checkpoint stays the newest and the next attempt is the next save; the
        last of a run is retried here."""
        self._copy(save.tensors, cloned)
        until = time.monotonic() + (PATIENCE_S if save.last else 0)
        while True:
            try:
                self._write(save)
                return
            except OSError as error:
                self._event("checkpoint_failed", samples_seen=save.samples_seen, error=str(error))
                if time.monotonic() > until:
                    if save.last:
                        self._stop(f"the last checkpoint cannot be written ({error}); make room, then start again")
                    return
                time.sleep(5)

    def _write(self, save: Save) -> None:
        began, run_dir, number = time.perf_counter(), self._spec.run_dir, self._generation.number
        assert self._file is not None, "it was copied before"
        self._log.flush(save.samples_seen)  # rows first: a committed checkpoint has all of them
        events.flush(run_dir)
        made = checkpoint.save(run_dir, save.samples_seen, number, self._file, save.state, fence=self._log.check)
        seconds = round(time.perf_counter() - began, 3)
        self._note(committed=True, **save.answer)
        self._event("checkpoint", name=made.name, bytes=made.bytes, seconds=seconds, **save.facts)
        events.flush(run_dir)
        self._log.check()  # a replaced group's writer must not remove checkpoints either
        with contextlib.suppress(OSError):  # it is committed; what is too much goes with the next
            settings, since = self._spec.config.checkpoint, self._generation.samples_seen
            checkpoint.prune(run_dir, settings.keep, number, since, self._best if settings.best else lambda _: "")
            self._log.merge()

    def _event(self, kind: str, **facts: Any) -> None:
        events.event(self._spec.run_dir, kind, generation=self._generation.number, **facts)
