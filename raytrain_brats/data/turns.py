"""What the rows of one rank hold, and its patches of each step made of them. Needs no Ray. Runs in the controller and
data tasks (`StreamSpec`), and in workers.

In: a sampler, the training cases, their source, the step from which a run goes on; rows, however they came.
Out: rows made in this process; a rank's patches, step by step, each exactly once and in the sampler's order.
"""

import contextlib
import queue
import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import pyarrow as pa

from raytrain_brats.data.manifest import Case
from raytrain_brats.data.patch import Patch, PatchSpec, ViewOf, decode, empty_patch, row_table
from raytrain_brats.data.preprocess import Triple
from raytrain_brats.data.sampler import Sampler
from raytrain_brats.data.store import Source

T = TypeVar("T")

SEGMENT_TASKS = 1024
"""Read tasks of one Ray Data execution: each costs 1.2 ms before the first row, and each execution about 1 s in which
nothing is streamed."""
ROW_BYTES, ROW_CASES, TASK_BYTES, TASK_CASES = 1 << 20, 8, 1 << 25, (4, 64)
"""Small cases are grouped, up to so many bytes a row and a task, since each costs milliseconds however small it is. A
task holds 4 cases at least and two rows of several; a row of large cases up to 8, growing with the number of ranks."""
CLOSED_S = 0.5
"""A reading thread notices this late that its consumer is gone."""


@dataclass(frozen=True)
class StreamSpec:
    """What is streamed; pickled into the datasets."""

    sampler: Sampler
    cases: tuple[Case, ...]
    source: Source
    patch_spec: PatchSpec
    step: int
    """The first step."""
    store_bytes: int
    """Ray's object store over all nodes: it bounds the rows on their way."""
    segment_tasks: int = SEGMENT_TASKS
    task_cases: tuple[int, int] = TASK_CASES

    @cached_property
    def case_bytes(self) -> int:
        """About what a case weighs: its files, or the one patch that travels at least."""
        files = sum(case.bytes for case in self.cases) // len(self.cases)
        return max(1, files, self.patch_spec.patch_bytes)

    def cases_per_row(self, world_size: int) -> int:
        # More ranks take more rows a second, and the coordinators' time is per row. The bound keeps eight rows for each
        # rank, on their way and being trained, within the object store; a case's box is no larger than its patches.
        wanted = max(min(ROW_CASES, -(-world_size // 4)), ROW_BYTES // self.case_bytes)
        most = self.store_bytes // (8 * world_size * self.sampler.patches_per_case * self.patch_spec.patch_bytes)
        return max(1, min(wanted, most))

    def rows_per_task(self, cases_per_row: int) -> int:
        low, high = self.task_cases
        wanted = max(low, min(high, TASK_BYTES // self.case_bytes))
        return max(1 if cases_per_row == 1 else 2, wanted // cases_per_row)


def tables(spec: StreamSpec, rank: int, world_size: int) -> Iterator[pa.Table]:
    """The rows of one rank, made in this process: what Ray Data sends, without it."""
    size, cases = spec.cases_per_row(world_size), dict(enumerate(spec.cases))
    for turn in spec.sampler.turns(spec.step, world_size, size):
        row = spec.sampler.row(spec.step, turn, rank, world_size, size)
        yield row_table(spec.source, row, cases, spec.patch_spec)


def rank_rows(
    shard: Any, sampler: Sampler, place: Callable[[Any], ViewOf] | None = None
) -> Iterator[tuple[int, list[Patch]]]:
    """(`until`, patches) of each row of a rank's share, execution after execution, to the end of the run; `place` as
    in `decode`."""
    until = 0
    while until < sampler.dealt:
        before = until
        for table in shard.iter_batches(batch_size=1, batch_format="pyarrow", prefetch_batches=0):
            until, patches = decode(table, place)
            del table
            yield until, patches
            del patches  # only the consumer holds the row: with its last patch it leaves the object store
        if until == before:
            raise RuntimeError(f"the stream ended after {until} of {sampler.dealt} dealt cases")


def rank_steps(
    rows: Iterator[tuple[int, list[Patch]]], sampler: Sampler, size_zyx: Triple, step: int, rank: int, world_size: int
) -> Iterator[list[Patch]]:
    """The rank's patches of each step from `step` on, by position.

    Raises RuntimeError when the rows do not bring exactly what the sampler says: the position guard. The group then
    starts again from the newest checkpoint.
    """
    held: dict[int, Patch] = {}
    until = 0
    for now in range(step, sampler.steps):
        # By the whole step, not the rank's part of it: so all ranks read equally many rows before a step. If one waited
        # for the next execution and another did not, Ray Data would wait for the second for ever.
        while until < min(sampler.oldest(now) + sampler.global_batch, sampler.dealt):
            until, patches = next(rows)
            held |= {patch.position: patch for patch in patches}
            del patches
        samples = [sampler.sample(position) for position in sampler.rank_positions(now, rank, world_size)]
        if missing := [s.position for s in samples if s.case is not None and s.position not in held]:
            raise RuntimeError(f"the stream has no positions {missing} for rank {rank}; it holds {sorted(held)}")
        yield [
            empty_patch(s.position, s.seed, "", "", size_zyx) if s.case is None else held.pop(s.position)
            for s in samples
        ]
    more = next(rows, None)  # also reaches the end, so that Ray Data closes the execution
    if held or more:
        raise RuntimeError(f"the stream has more than the sampler: {more}, positions {sorted(held)}")


def read_ahead(make: Callable[[], Iterator[T]], ahead: int) -> Iterator[T]:
    """Iterate in a thread that begins at once, and is up to `ahead` items before its consumer; it ends with it."""
    waiting: queue.Queue[Any] = queue.Queue(ahead)
    closed, end = threading.Event(), object()

    def put(item: Any, error: BaseException | None = None) -> None:
        while not closed.is_set():
            with contextlib.suppress(queue.Full):
                waiting.put((item, error), timeout=CLOSED_S)
                break

    def read() -> None:
        try:
            for item in make():
                put(item)
                del item
                if closed.is_set():
                    return
            put(end)
        except BaseException as error:  # noqa: BLE001 - raised again in the consumer
            put(end, error)

    def items() -> Iterator[T]:
        while True:
            item, error = waiting.get()
            if error:
                raise error
            if item is end:
                return
            yield item
            del item

    threading.Thread(target=read, name="stream", daemon=True).start()
    consumer = items()
    weakref.finalize(consumer, closed.set)  # also of one that never began
    return consumer
