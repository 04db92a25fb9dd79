"""What the stream costs at many ranks: consumers that only take, as actors on this machine, in a process of its own.

In: a prepared or raw set of full-size cases, a number of ranks. Out: bytes and CPU time a patch, the store's peak.

The rows are those that the pipeline would send to so many ranks on machines with room for them. Counted over every
process of the tree, from the row with which all ranks together have the warm-up to the one with the patches to count.
"""

import bisect
import itertools
import json
import os
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import ray

from raytrain_brats.data import stream
from raytrain_brats.data.boxes import decode
from raytrain_brats.errors import RunFailed
from raytrain_brats.ray_ext import cluster
from raytrain_brats.ray_ext.internals import core
from scripts.bench_pipelines.alone import opened, settings
from scripts.bench_pipelines.meter import Meter
from scripts.bench_pipelines.pipelines import Order

STORE_MB = 8000
"""Object store: a turn of 64 ranks may be on its way."""


@dataclass(frozen=True)
class Taken:
    """One measurement. Milliseconds are CPU time of all processes, or of the coordinators alone."""

    workers: int
    route: str
    cases_per_row: int
    patches: int
    wall_s: float
    mb_per_patch: float
    coordinator_ms_per_patch: float
    cpu_ms_per_patch: float
    object_store_peak_mb: float
    cpu_ms_by_process: dict[str, float]


@ray.remote(num_cpus=0, max_concurrency=2)
class Consumer:
    """Takes rows and keeps nothing of them."""

    def __init__(self) -> None:
        self._rows: list[tuple[float, int, int]] = []

    def take(self, shard: Any) -> None:
        while True:
            for table in shard.iter_batches(batch_size=1, batch_format="pyarrow", prefetch_batches=0):
                self._rows.append((time.monotonic(), len(decode(table)[1]), table.nbytes))

    def rows(self) -> list[tuple[float, int, int]]:
        """(when, patches, bytes) of each row so far."""
        return self._rows


def measure(order: Order, workers: int) -> Taken:
    streamed = opened(order, settings(order))
    batch = max(8, workers)
    sampler = replace(streamed.sampler, global_batch=batch)
    streamed = replace(streamed, sampler=sampler, store_bytes=1 << 50)  # as on machines with room for many ranks
    with Meter() as meter:
        os.environ.update(cluster.ENVIRONMENT)
        ray.init(
            address="local", include_dashboard=False, object_store_memory=STORE_MB * 10**6, logging_level="ERROR",
            log_to_driver=False,
        )  # fmt: skip
        made = {stream.group_name(group): stream.dataset(streamed, 1.0) for group in range(stream.groups(workers))}
        shares = stream.OrderedSplit().configure(made, workers)
        consumers = [Consumer.remote() for _ in shares]
        ray.get([consumer.rows.remote() for consumer in consumers])
        for rank, consumer in enumerate(consumers):
            consumer.take.remote(shares[rank][stream.group_name(stream.group_of(rank, workers))])
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
        workers,
        order.pipeline,
        streamed.cases_per_row(workers),
        patches,
        round(ended - begun, 2),
        round(sum(row[2] for row in rows[low + 1 : high + 1]) / patches / 1e6, 2),
        spent.get("SplitCoordinator", 0.0),
        round(sum(spent.values()), 2),
        round(peak / 1e6),
        spent,
    )


if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    workers = asked.pop("workers")
    Path(sys.argv[2]).write_text(json.dumps(asdict(measure(Order(**asked), workers))))
