"""Stream the plan's patches to the training workers with Ray Data, in order, each position exactly once.

In: a plan, the training cases, their source, a cursor.
Out: a Ray Dataset of one-row blocks in position order; a split that deals them to the ranks in turn; patches.

One read task decodes one window of cases and yields its patches in position order. The first execution of the
dataset streams from the cursor to the end of its stretch, each later one a whole stretch. Every position yields a row:
a case that is refused becomes a row of weight zero, since a missing row would shift all later ones to other ranks.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import ray
from ray.data import DataContext, Datasource
from ray.data.block import BlockMetadata
from ray.data.datasource import ReadTask
from ray.train import DataConfig

from raytrain_brats.data.manifest import Case
from raytrain_brats.data.nifti import Refused
from raytrain_brats.data.patch import Patch, cut, placeholder
from raytrain_brats.data.plan import Plan, Sample
from raytrain_brats.data.store import Source, binary_column, binary_value


@dataclass(frozen=True)
class Cutting:
    """How patches are cut; travels with every read task, so it is small."""

    patch_xyz: tuple[int, int, int]
    foreground_share: float


def window_patches(source: Source, items: list[tuple[Sample, Case | None]], cutting: Cutting) -> Iterator[Patch]:
    """The patches of one window in the order of `items`; each case is loaded once.

    Total over bad cases: Refused becomes a placeholder. OSError (storage down) is raised: that is no property of
    the case, and the run must stop rather than train without it.
    """
    loaded: dict[str, Any] = {}
    for sample, case in items:
        if case is None:
            yield placeholder(sample, "", "", cutting.patch_xyz)
            continue
        if case.id not in loaded:
            try:
                loaded[case.id] = source.load(case)
            except Refused as error:
                loaded[case.id] = error
        prepared = loaded[case.id]
        if isinstance(prepared, Refused):
            reason = f"{prepared.reason}: {prepared.detail}"
            yield placeholder(sample, case.id, reason, cutting.patch_xyz)
        else:
            yield cut(prepared, sample, case.id, cutting.patch_xyz, cutting.foreground_share)


def to_block(patch: Patch) -> pa.Table:
    """One row. Voxels travel as bytes: their dtype may differ from case to case."""
    return pa.table(
        {
            "position": [patch.position],
            "seed": [patch.seed],
            "case_id": [patch.case_id],
            "weight": [patch.weight],
            "reason": [patch.reason],
            "dtype": [patch.image_czyx.dtype.name],
            "shape": [list(patch.image_czyx.shape)],
            "image": binary_column(patch.image_czyx),
            "label": binary_column(patch.label_zyx),
            "mean": [patch.mean.tolist()],
            "std": [patch.std.tolist()],
        }
    )


def from_block(table: pa.Table) -> Patch:
    """The patch of a one-row block; its arrays are read-only views into the block."""
    row = table.drop_columns(["image", "label"]).to_pylist()[0]
    shape = tuple(row["shape"])
    return Patch(
        row["position"],
        row["seed"],
        row["case_id"],
        row["weight"],
        row["reason"],
        binary_value(table, "image", np.dtype(row["dtype"])).reshape(shape),
        binary_value(table, "label", np.uint8).reshape(shape[1:]),
        np.array(row["mean"], np.float32),
        np.array(row["std"], np.float32),
    )


class PositionSource(Datasource):
    """Positions as a Ray datasource; every execution of the dataset asks anew and gets the next stretch."""

    def __init__(self, plan: Plan, cases: tuple[Case, ...], source: Source, cutting: Cutting, cursor: int) -> None:
        super().__init__()
        self.plan, self.cases, self.source, self.cutting, self.cursor = plan, cases, source, cutting, cursor

    def get_name(self) -> str:
        return "Positions"

    def estimate_inmemory_data_size(self) -> int | None:
        return None

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: DataContext | None = None
    ) -> list[ReadTask]:
        # _execution_idx is private to Ray Data; should it ever change its meaning, the position guard of the
        # training loop stops the run.
        execution = data_context._execution_idx if data_context is not None else 0
        low, high = self.plan.stretch(self.cursor)
        for _ in range(execution):
            low, high = self.plan.stretch(high)
        return [self._task(positions) for positions in self.plan.windows(low, high)]

    def _task(self, positions: range) -> ReadTask:
        samples = [self.plan.sample(p) for p in positions]
        items = [(s, None if s.case is None else self.cases[s.case]) for s in samples]
        x, y, z = self.cutting.patch_xyz
        about = BlockMetadata(len(items), len(items) * x * y * z * 9, None, None)
        return ReadTask(partial(_read, self.source, items, self.cutting), about)


def _read(source: Source, items: list[tuple[Sample, Case | None]], cutting: Cutting) -> Iterator[pa.Table]:
    for patch in window_patches(source, items, cutting):
        yield to_block(patch)


def dataset(
    plan: Plan, cases: tuple[Case, ...], source: Source, cutting: Cutting, cursor: int, cpus_per_task: float
) -> Any:
    """The ordered Ray Dataset of all positions from `cursor` on."""
    positions = PositionSource(plan, cases, source, cutting, cursor)
    tasks = len(plan.windows(*plan.stretch(cursor)))
    made = ray.data.read_datasource(
        positions, override_num_blocks=max(1, tasks), ray_remote_args={"num_cpus": cpus_per_task}
    )
    made.context.target_max_block_size = 1  # one row a block: the split deals blocks, not rows
    made.context.execution_options.preserve_order = True
    made.context.execution_no_progress_timeout_s = 6 * 3600  # a long validation is no hang of the stream
    return made


class OrderedSplit(DataConfig):
    """Deal rows to ranks in turn. Ray's own split makes shares equal by dropping rows, and forgets the order."""

    def configure(self, datasets: Any, world_size: int, *_: Any, **__: Any) -> list[dict[str, Any]]:
        shares: list[dict[str, Any]] = [{} for _ in range(world_size)]
        for name, ds in datasets.items():
            for rank, share in enumerate(ds.streaming_split(world_size, equal=False)):
                shares[rank][name] = share
        return shares


def patches(shard: Any, prefetch: int) -> Iterator[Patch]:
    """The patches of a rank's share for one execution (one stretch)."""
    for table in shard.iter_batches(batch_size=1, batch_format="pyarrow", prefetch_batches=prefetch):
        yield from_block(table)
