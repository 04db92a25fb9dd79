"""Stream the sampler's patches to the training workers with Ray Data, in order, each position exactly once.

In: a sampler, the training cases, their source, a cursor. Runs in Ray Train's controller, data tasks and workers.
Out: a Ray Dataset of one-row blocks in position order; a split that deals them to the ranks in turn; patches.

One read task decodes one window of cases and yields its patches in position order. The first execution of the
dataset streams from the cursor to the end of its segment, each later one a whole segment. Every position yields a
patch: one of an invalid case has weight zero, since a missing row would shift all later ones to other ranks.
"""

import time
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import pyarrow as pa
import ray
from ray.data import DataContext, Datasource
from ray.data.block import BlockMetadata
from ray.data.datasource import ReadTask
from ray.train import DataConfig

from raytrain_brats.data.boxes import Buffer, Item, PatchSpec, decode, rank_tables
from raytrain_brats.data.manifest import Case
from raytrain_brats.data.patch import Patch
from raytrain_brats.data.sampler import Sampler
from raytrain_brats.data.store import Source
from raytrain_brats.ray_ext.internals.data import ExecutionCallback, execution_index

WORLD_SIZE = "raytrain_brats.world_size"
"""Key in the dataset's context: for how many ranks read tasks make tables, known only once the workers are."""
BUSY_LOOP_S, PAUSE_S = 0.01, 0.03
"""An iteration of Ray Data's scheduling loop shorter than the first is followed by a pause of the second."""


class PositionSource(Datasource):
    """Positions as a Ray datasource; every execution of the dataset asks for read tasks and gets the next segment's."""

    def __init__(
        self, sampler: Sampler, cases: tuple[Case, ...], source: Source, patch_spec: PatchSpec, cursor: int
    ) -> None:
        super().__init__()
        self.sampler, self.cases, self.source, self.patch_spec, self.cursor = sampler, cases, source, patch_spec, cursor

    def get_name(self) -> str:
        return "Positions"

    def estimate_inmemory_data_size(self) -> int | None:
        return None

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: DataContext | None = None
    ) -> list[ReadTask]:
        low, high = self.sampler.segment(self.cursor)
        for _ in range(execution_index(data_context)):
            low, high = self.sampler.segment(high)
        world_size = data_context.get_config(WORLD_SIZE, 1) if data_context is not None else 1
        return [self._task(positions, world_size) for positions in self.sampler.windows(low, high)]

    def _task(self, positions: range, world_size: int) -> ReadTask:
        samples = [self.sampler.sample(p) for p in positions]
        items = [(s, None if s.case is None else self.cases[s.case]) for s in samples]
        x, y, z = self.patch_spec.patch_xyz
        about = BlockMetadata(None, len(items) * x * y * z * 9, None, None)
        return ReadTask(partial(_read, self.source, items, self.patch_spec, world_size), about)


class SchedulerThrottle(ExecutionCallback):
    """Sleep briefly when Ray Data's scheduler busy-loops.

    The scheduler waits until a read task has output. When all have output and no consumer has room for it, as whenever
    loading is faster than training, it iterates without a pause: 0.6 of a core, and a CPU run on two cores at half its
    speed.
    """

    _before = 0.0

    def on_execution_step(self, executor: Any) -> None:
        if time.monotonic() - self._before < BUSY_LOOP_S:
            time.sleep(PAUSE_S)
        self._before = time.monotonic()


_buffer = Buffer()


def _read(source: Source, items: list[Item], patch_spec: PatchSpec, world_size: int) -> Iterator[pa.Table]:
    # One buffer a process is enough: a process runs one task at a time, and Ray has copied a table to the object store
    # before it asks for the next.
    return rank_tables(source, items, patch_spec, world_size, _buffer)


def dataset(
    sampler: Sampler,
    cases: tuple[Case, ...],
    source: Source,
    patch_spec: PatchSpec,
    cursor: int,
    cpus_per_task: float,
    tasks: int | None = None,
    nodes: dict[str, str] | None = None,
) -> Any:
    """The ordered Ray Dataset of all positions from `cursor` on.

    `tasks`: how many read tasks run at a time (None: as many as Ray Data finds CPUs and object store for); `nodes`:
    labels of the nodes they run on (None: any).
    """
    positions = PositionSource(sampler, cases, source, patch_spec, cursor)
    windows = len(sampler.windows(*sampler.segment(cursor)))
    made = ray.data.read_datasource(
        positions, override_num_blocks=max(1, windows), num_cpus=cpus_per_task, concurrency=tasks
    )
    made.context.target_max_block_size = 1  # one row a block: the split deals blocks
    made.context.execution_options.preserve_order = True
    made.context.execution_options.label_selector = nodes or None
    made.context.custom_execution_callback_classes = [SchedulerThrottle]
    made.context.memory_usage_poll_interval_s = None  # reading a process's memory map costs as much as a patch
    made.context.execution_no_progress_timeout_s = 6 * 3600  # during a long validation nobody takes a row
    return made


class OrderedSplit(DataConfig):
    """Deal rows to ranks in turn. Ray's own split makes shares equal by dropping rows, and forgets the order."""

    def configure(self, datasets: Any, world_size: int, *_: Any, **__: Any) -> list[dict[str, Any]]:
        shares: list[dict[str, Any]] = [{} for _ in range(world_size)]
        for name, ds in datasets.items():
            ds.context.set_config(WORLD_SIZE, world_size)
            for rank, share in enumerate(ds.streaming_split(world_size, equal=False)):
                shares[rank][name] = share
        return shares


def patches(shard: Any, prefetch: int) -> Iterator[Patch]:
    """The patches of a rank's share for one execution (one segment)."""
    return decoded(shard.iter_batches(batch_size=1, batch_format="pyarrow", prefetch_batches=prefetch))


def decoded(tables: Iterable[pa.Table]) -> Iterator[Patch]:
    """The patches of a rank's tables, by position."""
    held: list[Patch] = []
    for table in tables:
        left, found = decode(table)
        held += found
        if not left:
            held.sort(key=lambda patch: -patch.position)
            while held:  # keep no reference to a patch that was yielded: the last one of a table frees the table
                yield held.pop()
