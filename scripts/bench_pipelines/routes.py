"""Our own routes, through Ray Data and Ray Train to one training worker, measured in a process of their own.

In: a prepared or raw set of cases, how many patches to count. Out: a `Run`.

The worker does with each patch what training does first (`alone.CopySink`). Counted from the patch after the warm-up to
the last, over every process of the tree.
"""

import json
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ray
from ray.train import RunConfig, ScalingConfig

from raytrain_brats.data import stream, turns
from raytrain_brats.ray_ext import cluster
from raytrain_brats.ray_ext.internals.train import LocalTrainer
from raytrain_brats.ray_ext.process_group import ProcessGroup
from scripts.bench_pipelines.alone import CopySink, opened, settings
from scripts.bench_pipelines.meter import Meter
from scripts.bench_pipelines.pipelines import Order, Run, counted, enough


def consume(arguments: dict[str, Any]) -> None:
    """The training worker: take the stream's patches as training does; write down when counting began and ended."""
    import torch  # here alone, as in training: neither driver nor controller needs it

    order: Order = arguments["order"]
    torch.set_num_threads(1)
    taker = CopySink(order.patch)
    begun = ended = time.monotonic()
    number = 0
    sampler, size_zyx = arguments["sampler"], arguments["size_zyx"]
    rows = turns.read_ahead(lambda: turns.rank_rows(stream.open_shard(0, 1), sampler), arguments["prefetch"])
    for number, (patch,) in enumerate(turns.rank_steps(rows, sampler, size_zyx, 0, 0, 1), 1):
        taker.take(patch)
        ended = time.monotonic()
        if number == order.warm:
            begun = ended
        if number > order.warm and enough(order, number - order.warm, ended - begun):
            break
    Path(arguments["out"]).write_text(json.dumps([begun, ended, number - order.warm]))


def measure(order: Order) -> Run:
    """Start Ray, stream, count. In a process of its own, whose whole tree is the pipeline."""
    config = settings(order)
    streamed = opened(order, config)
    with Meter() as meter, tempfile.TemporaryDirectory() as folder:
        cluster.connect(prepared=order.pipeline.startswith("store"))
        needed = cluster.measure(config.run, 8)
        out = str(Path(folder) / "counted.json")
        taken = {"sampler": streamed.sampler, "size_zyx": streamed.patch_spec.size_zyx, "prefetch": needed.prefetch}
        LocalTrainer(
            consume,
            backend_config=ProcessGroup(),
            train_loop_config={"order": order, "out": out} | taken,
            scaling_config=ScalingConfig(num_workers=1, resources_per_worker={"CPU": needed.cpus}),
            run_config=RunConfig(storage_path=folder),
            datasets={stream.group_name(0): lambda: stream.dataset(streamed, needed.cpus_per_task, needed.tasks)},
            dataset_config=stream.OrderedSplit(),
        ).fit()
        begun, ended, patches = json.loads(Path(out).read_text())
        ray.shutdown()
    return counted(meter, begun, ended, patches)


if __name__ == "__main__":
    asked = Order(**json.loads(sys.argv[1]))
    Path(sys.argv[2]).write_text(json.dumps(asdict(measure(asked))))
