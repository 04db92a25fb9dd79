"""What bit-equal weights cost: steps with `reduction: exact` against `fast` (DDP), alternated in the same processes.
And what it costs to compare the ranks' weights by their hash.

In: nothing but the options. Out: a table and docs/benchmarks/reduction.json.

Run as `.venv/bin/python scripts/bench_reduction.py [--steps N] [--out FILE]` after `scripts/venv dev`, on an idle
machine.
Patches are random numbers made before; augmentation is on; one torch thread a rank; gloo on one machine.
"""

import argparse
import json
import os
import platform
import socket
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import distributed, multiprocessing

from raytrain_brats import config
from raytrain_brats.data.patch import Patch
from raytrain_brats.learn import tree_reduce
from raytrain_brats.learn.step import differing
from raytrain_brats.run.feed import batch_of
from raytrain_brats.run.spec import RunSpec, sampler_of
from raytrain_brats.run.worker import train_step_of

GLOBAL_BATCH, EDGE = 8, 32


def spec(reduction: str) -> RunSpec:
    settings = config.load("demo", (f"train.reduction={reduction}", f"train.global_batch={GLOBAL_BATCH}"))
    fields: dict[str, Any] = dict.fromkeys(RunSpec.__dataclass_fields__)
    source = type("Source", (), {"convention": "msd"})()
    return RunSpec(**fields | {"config": settings, "sampler": sampler_of(settings, 24), "source": source})


def patch(position: int) -> Patch:
    random = np.random.RandomState(position)
    image = random.randint(0, 300, (4, EDGE, EDGE, EDGE)).astype(np.int16)
    label = random.choice(4, (EDGE, EDGE, EDGE)).astype(np.uint8)
    return Patch(position, position, "", 1.0, "", image, label, [150.0] * 4, [80.0] * 4)


def rank_main(rank: int, world_size: int, port: int, steps: int, folder: str) -> None:
    torch.set_num_threads(1)
    if world_size > 1:
        distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size)
    learners = {kind: train_step_of(spec(kind), world_size, torch.device("cpu")) for kind in ("fast", "exact")}
    spent: dict[str, list[tuple[float, float]]] = {kind: [] for kind in (*learners, "compare")}
    for step in range(steps):
        mine = [patch(step * GLOBAL_BATCH + place) for place in range(rank, GLOBAL_BATCH, world_size)]
        for kind in ("fast", "exact") if step % 2 else ("exact", "fast"):
            if world_size > 1:
                distributed.barrier()
            cpu, wall = time.process_time(), time.perf_counter()
            learners[kind].step(batch_of(mine, step * GLOBAL_BATCH, torch.device("cpu")), step * GLOBAL_BATCH)
            spent[kind].append((time.process_time() - cpu, time.perf_counter() - wall))
        if world_size > 1:
            cpu, wall = time.process_time(), time.perf_counter()
            assert not differing("cpu", learners["fast"].network)
            spent["compare"].append((time.process_time() - cpu, time.perf_counter() - wall))
    Path(f"{folder}/{rank}.json").write_text(json.dumps({kind: rows[2:] for kind, rows in spent.items()}))
    if world_size > 1:
        distributed.destroy_process_group()


def measure(world_size: int, steps: int) -> dict[str, float]:
    """Medians over steps of the CPU seconds of all ranks, and of the slowest rank's wall seconds."""
    with tempfile.TemporaryDirectory() as folder, socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        multiprocessing.start_processes(  # type: ignore[attr-defined]
            rank_main, (world_size, port, steps, folder), world_size, start_method="fork"
        )
        ranks = [json.loads(Path(f"{folder}/{rank}.json").read_text()) for rank in range(world_size)]
    result: dict[str, float] = {}
    for kind in ("fast", "exact", "compare") if world_size > 1 else ("fast", "exact"):
        of_steps = list(zip(*(rank[kind] for rank in ranks), strict=True))
        result[f"{kind}_cpu_s"] = statistics.median(sum(cpu for cpu, _ in step) for step in of_steps)
        result[f"{kind}_wall_s"] = statistics.median(max(wall for _, wall in step) for step in of_steps)
    places = [list(range(rank, GLOBAL_BATCH, world_size)) for rank in range(world_size)]
    others = (world_size - 1) / world_size
    sent = max(len(tree_reduce.held(own, GLOBAL_BATCH)) for own in places) * others + others
    return result | {"exact_vectors_sent": sent, "all_reduce_vectors_sent": 2 * others}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--steps", type=int, default=30)
    options.add_argument("--out", type=Path, default=Path("docs/benchmarks/reduction.json"))
    given = options.parse_args()
    table = {}
    every = config.load("demo").run.compare_weights_steps
    print("ranks  exact/fast: CPU   wall   gradient vectors a rank sends: exact  ring all-reduce   weights compared")
    for world_size in (1, 2, 3, 4):
        row = table[world_size] = measure(world_size, given.steps)
        ratio = {what: row[f"exact_{what}_s"] / row[f"fast_{what}_s"] for what in ("cpu", "wall")}
        vectors = f"{row['exact_vectors_sent']:.2f}  {row['all_reduce_vectors_sent']:.2f}"
        if world_size > 1:
            row["compare_share"] = row["compare_wall_s"] / (every * row["fast_wall_s"])
        compared = f"{row.get('compare_share', 0):.2%} of the time"
        print(f"{world_size:5}  {ratio['cpu']:15.2f}  {ratio['wall']:5.2f}   {vectors:>37}   {compared}", flush=True)
    cpu = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line), "")
    machine = f"{os.cpu_count()} cores, {cpu.split(': ')[-1] or platform.processor()}"
    about = {"machine": machine, "date": time.strftime("%Y-%m-%d"), "recipe": "demo", "global_batch": GLOBAL_BATCH}
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(about | {"steps": given.steps, "world_sizes": table}, indent=1) + "\n")


if __name__ == "__main__":
    main()
