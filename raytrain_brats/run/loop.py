"""The training loop: what every worker does.

In: a `Job`; the `Generation` that says where this worker group goes on; the ordered stream of patches.
Out: checkpoints, rows, events. Safe to be killed at any moment and started again at any world size.
"""

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from itertools import chain, islice
from typing import Any

import ray.train
import ray.train.torch
import torch

from raytrain_brats.data.patch import Patch
from raytrain_brats.data.stream import patches
from raytrain_brats.run import checkpoint, ledger
from raytrain_brats.run.job import Job
from raytrain_brats.run.ledger import Generation
from raytrain_brats.run.pulse import Pulse
from raytrain_brats.run.scribe import Scribe
from raytrain_brats.run.step import Learner
from raytrain_brats.run.validate import validate


def train_worker(arguments: dict[str, Any]) -> None:
    """What Ray Train calls on every worker: who it is, its device, its share of the stream."""
    job: Job = arguments["job"]
    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    device = ray.train.torch.get_device()
    if device.type == "cpu":  # in exact mode one: sums within a kernel depend on the number of threads
        share = max(1, len(os.sched_getaffinity(0)) // context.get_local_world_size())
        torch.set_num_threads(1 if job.config.train.reduction == "exact" else share)
    generation = ledger.current(job.run_dir)
    assert generation is not None, "the dataset factory writes it before workers start"
    with Pulse(arguments["run_id"], generation.number, rank, world_size, job.run_dir) as pulse:
        stream = open_ahead(job, generation.samples_seen, arguments["prefetch"])
        train_rank(job, generation, rank, world_size, device, pulse.mark, stream)


def open_ahead(job: Job, seen: int, prefetch: int) -> Callable[[], Iterator[Patch]]:
    """The rank's stream, one stretch a call; the first is begun in a thread, while the model is being set up."""
    opened: Future[tuple[Any, Iterator[Patch]]] = Future()
    begun: list[Any] = []

    def begin() -> None:
        try:
            shard = ray.train.get_dataset_shard("train")
            stream = patches(shard, prefetch)
            first = list(islice(stream, 1)) if seen < job.plan.total else []
            opened.set_result((shard, chain(first, stream)))
        except BaseException as error:  # noqa: BLE001 - raised where the stream is asked for
            opened.set_exception(error)

    def next_stretch() -> Iterator[Patch]:
        shard, stream = opened.result()
        begun.append(shard)
        return stream if len(begun) == 1 else patches(shard, prefetch)

    threading.Thread(target=begin, name="stream", daemon=True).start()
    return next_stretch


def train_rank(
    job: Job,
    generation: Generation,
    rank: int,
    world_size: int,
    device: torch.device,
    mark: Callable[..., None],
    next_stretch: Callable[[], Iterator[Patch]],
) -> None:
    """Train until the plan's last position, or until the run must stop.

    `next_stretch` gives the stream of this rank's patches from the cursor to the end of the stretch it is in, then of
    one whole stretch at each call. `mark` is told each phase as it begins.
    """
    seen, plan, every = generation.samples_seen, job.plan, job.config
    with Scribe(job, generation, rank, world_size, device) as scribe:
        mark("load", seen - 1)
        learner = Learner(job, world_size, device)
        if generation.checkpoint:
            tensors, state = checkpoint.load(job.run_dir, generation.checkpoint)
            learner.restore(tensors, state["learner"])
        scribe.ready()
        if due(seen - plan.global_batch, seen, every.validate_.every_samples) or seen == plan.total:
            score(job, learner, scribe, seen, mark)  # unless the last worker group came to it
        while seen < plan.total and not scribe.stopped:
            stream_start, stretch_end = plan.stretch(seen)
            stream = next_stretch()
            while seen < stretch_end and not scribe.stopped:
                mark("data", seen)
                mine = take(stream, plan.owned(seen, stream_start, rank, world_size))
                wait_s = scribe.clock.charge("data_wait_s")
                result = learner.step(mine, seen, scribe.heard(), mark)
                before, seen = seen, min(seen + plan.global_batch, plan.total)
                scribe.step(before, seen, result, mine, wait_s, wait_s + scribe.clock.charge("productive_s"))

                mark("save")
                scribe.compare(before, seen, learner)
                if due(before, seen, every.checkpoint.every_samples) or seen == plan.total or result.asked:
                    scribe.checkpoint(seen, learner, result.asked)
                scribe.clock.charge("checkpoint_s")
                if due(before, seen, every.validate_.every_samples) or seen == plan.total:
                    score(job, learner, scribe, seen, mark)
            next(stream, None)  # lets Ray Data close this execution, so that the next one is planned


def score(job: Job, learner: Learner, scribe: Scribe, seen: int, mark: Callable[..., None]) -> None:
    """Validate over all ranks, unless that was done before."""
    if seen == 0 or not job.held_out_cases or ledger.validated(job.run_dir, seen):
        return
    mark("validate")
    means = validate(job, learner.network, learner.device, scribe.rank, scribe.world_size, seen, mark)
    scribe.validated(seen, scribe.clock.charge("validation_s"), means)


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
