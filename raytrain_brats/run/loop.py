"""The training loop: what every worker does.

In: a `Job`; the `Generation` that says where this worker group goes on; the ordered stream of patches.
Out: checkpoints, rows, events. Safe to be killed at any moment and started again at any world size.
"""

import os
import time
from collections.abc import Iterator
from itertools import islice
from typing import Any

import ray.train
import ray.train.torch
import torch

from raytrain_brats.data.patch import Patch
from raytrain_brats.data.stream import patches
from raytrain_brats.run import checkpoint, ledger
from raytrain_brats.run.job import Job
from raytrain_brats.run.scribe import Scribe
from raytrain_brats.run.step import Learner
from raytrain_brats.run.validate import validate, validated


def train_worker(arguments: dict[str, Any]) -> None:
    """Train until the plan's last position, or until too many samples cannot be read."""
    job: Job = arguments["job"]
    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    device = ray.train.torch.get_device()
    if device.type == "cpu":
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // context.get_local_world_size()))
    generation = ledger.current(job.run_dir)
    assert generation is not None, "the dataset factory writes it before workers start"
    seen, plan, world = generation.samples_seen, job.plan, (rank, world_size)
    with Scribe(job, generation, rank, world_size, device) as scribe:
        learner = Learner(job, world_size, device)
        if generation.checkpoint:
            tensors, state = checkpoint.load(job.run_dir, generation.checkpoint)
            learner.restore(tensors, state["learner"])
        scribe.ready()
        shard = ray.train.get_dataset_shard("train")  # after ready(): waiting for Ray Data counts as first batch
        if due(seen - plan.global_batch, seen, job.config.validate_.every_samples) or seen == plan.total:
            score(job, learner, scribe, seen, *world)  # unless the last worker group came to it
        while seen < plan.total and not scribe.stopped:
            stream_start, stretch_end = plan.stretch(seen)
            stream = patches(shard, job.config.run.prefetch)
            while seen < stretch_end and not scribe.stopped:
                began = time.perf_counter()
                mine = take(stream, plan.owned(seen, stream_start, rank, world_size))
                wait_s = time.perf_counter() - began
                result = learner.step(mine, seen, scribe.heard())
                before, seen = seen, min(seen + plan.global_batch, plan.total)
                scribe.step(before, seen, result, mine, wait_s, time.perf_counter() - began)

                if due(before, seen, job.config.checkpoint.every_samples) or seen == plan.total or result.asked:
                    scribe.checkpoint(seen, learner, result.asked)
                if due(before, seen, job.config.validate_.every_samples) or seen == plan.total:
                    score(job, learner, scribe, seen, *world)
            next(stream, None)  # lets Ray Data close this execution, so that the next one is planned


def score(job: Job, learner: Learner, scribe: Scribe, seen: int, rank: int, world_size: int) -> None:
    """Validate over all ranks, unless that was done before."""
    if seen == 0 or not job.held_out_cases or validated(job.run_dir, seen):
        return
    began = time.perf_counter()
    means = validate(job, learner.network, learner.device, rank, world_size, seen)
    scribe.validated(seen, time.perf_counter() - began, means)


def take(stream: Iterator[Patch], positions: list[int]) -> list[Patch]:
    """The next patches of the stream, which must be exactly those of `positions`: the position guard.

    Raises RuntimeError otherwise; the group then starts again from the newest checkpoint.
    """
    taken = list(islice(stream, len(positions)))
    if [patch.position for patch in taken] != positions:
        raise RuntimeError(f"stream gave positions {[p.position for p in taken]}, the plan says {positions}")
    return taken


def due(before: int, seen: int, every: int) -> bool:
    """Whether a multiple of `every` samples lies in (before, seen]: the same at any number of workers."""
    return before // every != seen // every
