"""Stream the sampler's cases to the training workers with Ray Data, each patch exactly once, in the sampler's order.

In: a `StreamSpec`.
Out: Ray Datasets of one-row blocks, a split that deals these to the ranks in turn; on a rank its share (`turns` reads).
Runs in Ray Train's controller (`dataset`, `OrderedSplit`), data tasks (`_read`) and workers (`open_shard`).

One read task loads a few dealt cases and yields rows (`patch`). The split deals blocks in turn, so a turn holds one row
for every rank, even an empty one. Each execution of a dataset streams one segment of the turns; a rank reads rows in a
thread, so that it has some of the next segment before it needs them. An invalid case travels too, without voxels.
"""

import time
from collections.abc import Iterator
from functools import partial
from itertools import islice
from typing import Any

import pyarrow as pa
import ray
from ray.data import DataContext, Datasource
from ray.data.block import BlockMetadata
from ray.data.datasource import ReadTask
from ray.train import DataConfig

from raytrain_brats.data.manifest import Case
from raytrain_brats.data.patch import Buffer, PatchSpec, row_table
from raytrain_brats.data.sampler import Sampler
from raytrain_brats.data.store import Source
from raytrain_brats.data.turns import StreamSpec
from raytrain_brats.ray_ext.internals.data import ExecutionCallback, execution_index, poll_rarely

RANKS = "raytrain_brats.ranks"
"""Key in the dataset's context: (ranks that it serves, world size), known only once the workers are."""
GROUP_RANKS, FEW_RANKS = 32, 8
"""Ranks of one dataset: its coordinator, one Python process, needs some 5 ms a row, and 32 GPUs want 560 cases a
second. Up to the second number its scheduler iterates more often."""
HELD = "raytrain_brats.held"
"""Likewise: shares of the object store that the cases of a step hold on the ranks, and what waits for each rank."""
STORE_SHARES, LEAST_SHARE = (0.5, 0.3), 0.1
"""Of the object store, for rows that no rank has taken yet: with one or two ranks, and with more; less where the ranks
hold more of it. With half of it for many, rows went to disk; with less for one, it waited for rows."""


class CaseDatasource(Datasource):
    """One group's rows; every execution of the dataset asks for read tasks and gets those of the next segment."""

    def __init__(self, spec: "StreamSpec | ray.ObjectRef[StreamSpec]") -> None:
        super().__init__()
        self._spec = spec

    def get_name(self) -> str:
        return "Cases"

    def estimate_inmemory_data_size(self) -> int | None:
        return None

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: DataContext | None = None
    ) -> list[ReadTask]:
        if data_context is None:  # Ray Data counts tasks and looks at one, beside the executions
            return [ReadTask(list, BlockMetadata(0, 0, None, None))]
        spec = self._spec if isinstance(self._spec, StreamSpec) else ray.get(self._spec)
        sampler = spec.sampler
        ranks, world_size = data_context.get_config(RANKS)
        cases_per_row = spec.cases_per_row(world_size)
        size = spec.rows_per_task(cases_per_row)
        turns = sampler.turns(spec.step, world_size, cases_per_row)
        length = max(1, spec.segment_tasks * size // len(ranks))
        begin = execution_index(data_context) * length
        places = (
            (spec.step, turn, rank, world_size, cases_per_row)
            for turn in turns[begin : begin + length]
            for rank in ranks
        )
        tasks = []
        while chosen := list(islice(places, size)):
            tasks.append(_task(spec, chosen))
        return tasks


Place = tuple[int, int, int, int, int]
"""Arguments of `Sampler.row`. The samples of a row are computed by the task: for a whole segment they take seconds, for
which every worker would wait."""


def _task(spec: StreamSpec, places: list[Place]) -> ReadTask:
    sampler = spec.sampler
    needed = {sampler.case(dealt) for place in places for dealt in sampler.row_dealt(*place)}
    cases = {index: spec.cases[index] for index in needed}
    about = BlockMetadata(None, len(places) * spec.case_bytes, None, None)
    return ReadTask(partial(_read, spec.source, sampler, places, cases, spec.patch_spec), about)


_buffer = Buffer()


def _read(
    source: Source, sampler: Sampler, places: list[Place], cases: dict[int, Case], patch_spec: PatchSpec
) -> Iterator[pa.Table]:
    # One buffer a process is enough: a process runs one task at a time, and Ray has copied a table to the object store
    # before it asks for the next.
    for place in places:
        yield row_table(source, sampler.row(*place), cases, patch_spec, _buffer)


class SchedulerThrottle(ExecutionCallback):
    """Lets Ray Data's scheduler iterate not more often than every `period_s`.

    An iteration costs 4 ms. The scheduler waits until a read task has output; when all have output and no consumer has
    room for it, as whenever loading is faster than training, it iterates without a pause: 0.6 of a core, and a CPU run
    on two cores at half its speed.
    """

    period_s, _before = 0.03, 0.0

    def on_execution_step(self, executor: Any) -> None:
        time.sleep(max(0.0, self._before + self.period_s - time.monotonic()))
        self._before = time.monotonic()


class RareSchedulerThrottle(SchedulerThrottle):
    """For many ranks: each iteration deals many rows, and there are many data tasks, so none waits for a single one."""

    period_s = 0.1

    def on_execution_step(self, executor: Any) -> None:
        if not self._before:
            poll_rarely(self.period_s / 2)
        super().on_execution_step(executor)


def dataset(
    spec: StreamSpec,
    cpus_per_task: float,
    tasks: int | None = None,
    nodes: dict[str, str] | None = None,
    then_nodes: dict[str, str] | None = None,
) -> Any:
    """A Ray Dataset that streams the rows of a group of ranks, which `OrderedSplit` decides.

    `tasks`: how many read tasks run at a time (None: as many as Ray Data finds CPUs and object store for); `nodes`:
    labels of the nodes they run on (None: any); `then_nodes`: of those where they run when the former have no free CPU.
    """
    fallback: Any = {"fallback_strategy": [{"label_selector": then_nodes}]} if then_nodes else {}
    # By reference: a dataset is pickled several times on its way, and the cases of a large set are megabytes.
    made = ray.data.read_datasource(
        CaseDatasource(ray.put(spec)),
        override_num_blocks=1,
        num_cpus=cpus_per_task,
        concurrency=tasks,
        ray_remote_args=fallback,
    )  # more blocks than there are read tasks would be made by splitting rows
    box = spec.patch_spec.box_bytes / max(1, spec.store_bytes)
    made.context.set_config(HELD, (spec.sampler.global_batch * box, 2 * box))
    made.context.target_max_block_size = 1  # one row a block: the split deals blocks
    made.context.execution_options.preserve_order = True
    made.context.execution_options.label_selector = nodes or None
    made.context.memory_usage_poll_interval_s = None  # reading a process's memory map costs as much as a patch
    made.context.execution_no_progress_timeout_s = 6 * 3600  # during a long validation nobody takes a row
    return made


def group_name(group: int) -> str:
    return f"train-{group}"


def groups(world_size: int) -> int:
    """Datasets that serve so many ranks."""
    return -(-world_size // GROUP_RANKS)


def group_of(rank: int, world_size: int) -> int:
    return rank * groups(world_size) // world_size


def group_ranks(group: int, world_size: int) -> list[int]:
    return [rank for rank in range(world_size) if group_of(rank, world_size) == group]


class OrderedSplit(DataConfig):
    """Deal rows to ranks in turn. Ray's own split makes shares equal by dropping rows, and forgets the order."""

    def configure(self, datasets: Any, world_size: int, *_: Any, **__: Any) -> list[dict[str, Any]]:
        shares: list[dict[str, Any]] = [dict.fromkeys(datasets) for _ in range(world_size)]
        for group in range(groups(world_size)):
            if (name := group_name(group)) in datasets:
                ranks = group_ranks(group, world_size)
                context = datasets[name].context
                context.set_config(RANKS, (ranks, world_size))
                throttle = SchedulerThrottle if len(ranks) <= FEW_RANKS else RareSchedulerThrottle
                context.custom_execution_callback_classes = [throttle]
                live, waiting = context.get_config(HELD)
                share = min(STORE_SHARES[world_size > 2], 1 - live - world_size * waiting)
                context.override_object_store_memory_limit_fraction = max(LEAST_SHARE, share) / groups(world_size)
                for rank, share in zip(ranks, datasets[name].streaming_split(len(ranks), equal=False), strict=True):
                    shares[rank][name] = share
                # Ray ends the executions that rank 0 has a share of. It does not read this one.
                shares[0][name] = shares[ranks[0]][name]
        return shares


def open_shard(rank: int, world_size: int) -> Any:
    """The rank's share, in a worker. Ray makes a dataset's shares when rank 0 asks for its own."""
    mine = group_of(rank, world_size)
    asked = range(groups(world_size)) if rank == 0 else [mine]
    return {group: ray.train.get_dataset_shard(group_name(group)) for group in asked}[mine]
