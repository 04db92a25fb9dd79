"""Our own routes, through Ray Data and Ray Train to one training worker, measured in a process of their own.

In: a prepared or raw set of cases, how many patches to count. Out: a `Run`.

The worker does with each patch what training does first: copies image and label into the device's memory (here a
buffer that is used again). Counted from the patch after the warm-up to the last, over every process of the tree.
"""

import json
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ray
import torch
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from raytrain_brats.benchmark.meter import Meter
from raytrain_brats.benchmark.pipelines import Order, Run, counted
from raytrain_brats.config import Config
from raytrain_brats.data import stream
from raytrain_brats.data.parcel import Cutting
from raytrain_brats.data.plan import Plan
from raytrain_brats.run import cluster
from raytrain_brats.run.job import open_cases


def consume(arguments: dict[str, Any]) -> None:
    """The training worker: take the stream's patches as training does; write down when counting began and ended."""
    order: Order = arguments["order"]
    torch.set_num_threads(1)
    edge = (order.patch,) * 3
    image, label = torch.empty((4, *edge), dtype=torch.int16), torch.empty(edge, dtype=torch.uint8)
    begun = ended = time.monotonic()
    number = 0
    for number, patch in enumerate(stream.patches(ray.train.get_dataset_shard("train"), arguments["prefetch"]), 1):
        if patch.position != number - 1 or patch.weight != 1:
            raise RuntimeError(f"patch {patch.position} ({patch.reason}) in place of {number - 1}")
        image.copy_(torch.from_numpy(patch.image_czyx))
        label.copy_(torch.from_numpy(patch.label_zyx))
        ended = time.monotonic()
        if number == order.warm:
            begun = ended
        if number >= order.warm + order.patches or (number > order.warm and ended - begun > order.seconds):
            break
    Path(arguments["out"]).write_text(json.dumps([begun, ended, number - order.warm]))


def measure(order: Order) -> Run:
    """Start Ray, stream, count. In a process of its own, whose whole tree is the pipeline."""
    config = Config.model_validate(
        {
            "network": {"name": "dynunet"},
            "data": {"patch_xyz": [order.patch] * 3},
            "preprocess": {"spacing_mm": order.spacing_mm},
        }
    )
    known = str(Path(order.work) / "known") if order.pipeline == "raw" else ""
    data, store = (order.source, "") if order.pipeline == "raw" else ("", order.source)
    manifest, source = open_cases(config, data, store, known)
    # batches of one: no padding; as good as endless
    plan = Plan(0, len(manifest.cases), 1, config.data.patches_per_case, config.data.window_cases, 100_000)
    cutting = Cutting(config.data.patch_xyz, config.data.foreground_share)
    with Meter() as meter, tempfile.TemporaryDirectory() as folder:
        cluster.connect()
        needed = cluster.measure(config.run, 8)
        out = str(Path(folder) / "counted.json")
        TorchTrainer(
            consume,
            train_loop_config={"order": order, "prefetch": needed.prefetch, "out": out},
            scaling_config=ScalingConfig(num_workers=1, resources_per_worker={"CPU": needed.cpus}),
            run_config=RunConfig(storage_path=folder),
            datasets={
                "train": lambda: stream.dataset(
                    plan, manifest.cases, source, cutting, 0, needed.cpus_per_task, needed.tasks
                )
            },
            dataset_config=stream.OrderedSplit(),
        ).fit()
        begun, ended, patches = json.loads(Path(out).read_text())
        ray.shutdown()
    return counted(meter, begun, ended, patches)


if __name__ == "__main__":
    asked = Order(**json.loads(sys.argv[1]))
    Path(sys.argv[2]).write_text(json.dumps(asdict(measure(asked))))
