"""What the stream costs at many ranks: consumers that only take, as threads on this machine, in a process of its own.

In: a prepared or raw set of full-size cases, a number of ranks. Out: bytes and CPU time a patch, the store's peak.

Two cores cannot load cases for 64 GPUs. So bytes and CPU time of all processes are counted with the cases loaded, as
fast as this machine does it, and the coordinators' time with stand-ins: the rows and read tasks that the pipeline would
make of full-size cases for so many ranks, with a few voxels each, taken as fast as GPUs would, as far as two cores can.
"""

import bisect
import itertools
import json
import os
import sys
import threading
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import ray

from raytrain_brats.data import stream
from raytrain_brats.data.manifest import Case
from raytrain_brats.data.patch import PatchSpec, decode
from raytrain_brats.data.preprocess import Prepared
from raytrain_brats.data.store import Source
from raytrain_brats.data.turns import StreamSpec
from raytrain_brats.errors import RunFailed
from raytrain_brats.ray_ext import cluster
from raytrain_brats.ray_ext.internals import core
from scripts.bench_pipelines.alone import opened, settings
from scripts.bench_pipelines.meter import Meter
from scripts.bench_pipelines.pipelines import Order

GPU_PATCHES_PER_S, PATCHES_PER_S = 70, 1024
"""What an H100 takes; what all ranks take of stand-ins at most. (A consumer that waits polls 100 times a second, in
the coordinator's process: the time of one that starves is not that of the stream.)"""
STAND_IN_CPUS = 16
"""For tasks that take no time. With two, the coordinators would wait for a free one at each iteration."""
NODE_RANKS = 8
STORE_MB = 8000
"""Object store, of which 64 ranks hold some cases each."""


@dataclass(frozen=True)
class Taken:
    """One measurement: milliseconds of CPU time a patch, of all processes together and by what the process is."""

    cases_per_row: int
    patches: int
    patches_per_s: float
    mb_per_patch: float
    cpu_ms_per_patch: float
    object_store_peak_mb: float
    cpu_ms_by_process: dict[str, float]


@dataclass(frozen=True)
class StandIn(Source):
    """A case that takes no time to load."""

    prepared: Any

    def load(self, case: Case) -> Prepared:
        found: Prepared = self.prepared
        return found


def stand_ins_per_s(workers: int) -> float:
    return min(GPU_PATCHES_PER_S * workers, PATCHES_PER_S)


def stand_ins(streamed: StreamSpec) -> StreamSpec:
    """The same cases in the same rows and tasks, which follow from the cases' bytes, without their voxels."""
    prepared = streamed.source.load(streamed.cases[0])
    assert prepared.label_zyx is not None
    few = (slice(12),) * 3
    small = replace(
        prepared, image_czyx=prepared.image_czyx[(slice(None), *few)].copy(), label_zyx=prepared.label_zyx[few].copy(),
        foreground_counts=(),
    )  # fmt: skip
    cases = tuple(replace(case, bytes=streamed.case_bytes) for case in streamed.cases)
    source = StandIn(streamed.source.root, streamed.source.convention, streamed.source.spacing_mm, small)
    return replace(streamed, cases=cases, source=source, patch_spec=PatchSpec((8, 8, 8), 0.0), store_bytes=1 << 50)


@ray.remote(num_cpus=0)
class Consumers:
    """The ranks of one node, a thread each, which take rows and keep nothing of them."""

    def __init__(self) -> None:
        self._rows: list[tuple[float, int, int]] = []

    def begin(self, shares: list[Any], patches_per_s: float) -> None:
        for share in shares:
            threading.Thread(target=self._take, args=(share, patches_per_s), daemon=True).start()

    def _take(self, share: Any, patches_per_s: float) -> None:
        while True:
            for table in share.iter_batches(batch_size=1, batch_format="pyarrow", prefetch_batches=0):
                patches = len(decode(table)[1])
                self._rows.append((time.monotonic(), patches, table.nbytes))
                del table
                time.sleep(patches / patches_per_s)

    def rows(self) -> list[tuple[float, int, int]]:
        """(when, patches, bytes) of each row so far."""
        return list(self._rows)


def measure(order: Order, workers: int, loaded: bool) -> Taken:
    streamed = replace(opened(order, settings(order)), store_bytes=STORE_MB * 10**6)
    streamed = replace(streamed, sampler=replace(streamed.sampler, global_batch=max(8, workers)))
    streamed = streamed if loaded else stand_ins(streamed)
    with Meter() as meter:
        os.environ.update(cluster.ENVIRONMENT)
        ray.init(
            address="local",
            num_cpus=None if loaded else STAND_IN_CPUS,
            include_dashboard=False,
            object_store_memory=STORE_MB * 10**6,
            log_to_driver=False,
        )
        made = {stream.group_name(group): stream.dataset(streamed, 1.0) for group in range(stream.groups(workers))}
        shares = stream.OrderedSplit().configure(made, workers)
        mine = [shares[rank][stream.group_name(stream.group_of(rank, workers))] for rank in range(workers)]
        nodes = [mine[first : first + NODE_RANKS] for first in range(0, workers, NODE_RANKS)]
        consumers = [Consumers.remote() for _ in nodes]  # type: ignore[attr-defined]
        pace = 1e9 if loaded else stand_ins_per_s(workers) / workers
        ray.get([consumer.begin.remote(node, pace) for consumer, node in zip(consumers, nodes, strict=True)])
        rows, peak, began = list[tuple[float, int, int]](), 0, time.monotonic()
        while sum(row[1] for row in rows) < order.warm + order.patches:
            if time.monotonic() > began + order.seconds:
                raise RunFailed(f"{workers} ranks had {len(rows)} rows after {order.seconds:g} s")
            time.sleep(0.3)
            peak = max(peak, core.stored_bytes())
            rows = sorted(row for found in ray.get([c.rows.remote() for c in consumers]) for row in found)
        ray.shutdown()
        time.sleep(0.2)
    taken = list(itertools.accumulate(row[1] for row in rows))
    low, high = (bisect.bisect_left(taken, wanted) for wanted in (order.warm, order.warm + order.patches))
    begun, ended, patches = rows[low][0], rows[high][0], taken[high] - taken[low]
    spent = {kind: round(1e3 * cpu_s / patches, 3) for kind, cpu_s in meter.spent(begun, ended).items()}
    return Taken(
        streamed.cases_per_row(workers),
        patches,
        round(patches / (ended - begun), 1),
        round(sum(row[2] for row in rows[low + 1 : high + 1]) / patches / 1e6, 2),
        round(sum(spent.values()), 2),
        round(peak / 1e6),
        spent,
    )


if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    from scripts.bench_pipelines import consumers  # by its name, under which data tasks find it too

    workers, loaded = asked.pop("workers"), asked.pop("loaded")
    Path(sys.argv[2]).write_text(json.dumps(asdict(consumers.measure(Order(**asked), workers, loaded))))
