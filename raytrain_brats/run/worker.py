"""The training loop: what every worker does.

In: a `RunSpec`; the `Generation` that says where this worker group goes on; the ordered stream of patches.
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
from raytrain_brats.learn.step import TrainStep
from raytrain_brats.run import checkpoint, journal
from raytrain_brats.run.heartbeat import Heartbeat
from raytrain_brats.run.journal import Generation
from raytrain_brats.run.recorder import RunRecorder
from raytrain_brats.run.spec import RunSpec
from raytrain_brats.run.validate import validate


def train_worker(arguments: dict[str, Any]) -> None:
    """What Ray Train calls on every worker: who it is, its device, its share of the stream."""
    spec: RunSpec = arguments["spec"]
    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    device = ray.train.torch.get_device()
    if device.type == "cpu":  # in exact mode one: sums within a kernel depend on the number of threads
        share = max(1, len(os.sched_getaffinity(0)) // context.get_local_world_size())
        torch.set_num_threads(1 if spec.config.train.reduction == "exact" else share)
    generation = journal.current(spec.run_dir)
    assert generation is not None, "the dataset factory writes it before workers start"
    with Heartbeat(arguments["run_id"], generation.number, rank, world_size, spec.run_dir) as pulse:
        stream = open_ahead(spec, generation.samples_seen, arguments["prefetch"])
        train_rank(spec, generation, rank, world_size, device, pulse.mark, stream)


def open_ahead(spec: RunSpec, seen: int, prefetch: int) -> Callable[[], Iterator[Patch]]:
    """The rank's stream, one stretch a call; the first is begun in a thread, while the model is being set up."""
    opened: Future[tuple[Any, Iterator[Patch]]] = Future()
    begun: list[Any] = []

    def begin() -> None:
        try:
            shard = ray.train.get_dataset_shard("train")
            stream = patches(shard, prefetch)
            first = list(islice(stream, 1)) if seen < spec.sampler.total else []
            opened.set_result((shard, chain(first, stream)))
        except BaseException as error:  # noqa: BLE001 - raised where the stream is asked for
            opened.set_exception(error)

    def next_segment() -> Iterator[Patch]:
        shard, stream = opened.result()
        begun.append(shard)
        return stream if len(begun) == 1 else patches(shard, prefetch)

    threading.Thread(target=begin, name="stream", daemon=True).start()
    return next_segment


def train_rank(
    spec: RunSpec,
    generation: Generation,
    rank: int,
    world_size: int,
    device: torch.device,
    mark: Callable[..., None],
    next_segment: Callable[[], Iterator[Patch]],
) -> None:
    """Train until the plan's last position, or until the run must stop.

    `next_segment` gives the stream of this rank's patches from the cursor to the end of the stretch it is in, then of
    one whole stretch at each call. `mark` is told each phase as it begins.
    """
    seen, sampler, every = generation.samples_seen, spec.sampler, spec.config
    with RunRecorder(spec, generation, rank, world_size, device) as recorder:
        mark("load", seen - 1)
        train_step = TrainStep(spec, world_size, device)
        if generation.checkpoint:
            tensors, state = checkpoint.load(spec.run_dir, generation.checkpoint)
            train_step.restore(tensors, state["learner"])
        recorder.ready()
        if due(seen - sampler.global_batch, seen, every.validate_.every_samples) or seen == sampler.total:
            score(spec, train_step, recorder, seen, mark)  # unless the last worker group came to it
        while seen < sampler.total and not recorder.stopped:
            stream_start, segment_end = sampler.segment(seen)
            stream = next_segment()
            while seen < segment_end and not recorder.stopped:
                mark("data", seen)
                mine = take(stream, sampler.rank_positions(seen, stream_start, rank, world_size))
                wait_s = recorder.clock.charge("data_wait_s")
                result = train_step.step(mine, seen, recorder.poll(), mark)
                before, seen = seen, min(seen + sampler.global_batch, sampler.total)
                recorder.step(before, seen, result, mine, wait_s, wait_s + recorder.clock.charge("productive_s"))

                mark("save")
                recorder.compare(before, seen, train_step)
                if due(before, seen, every.checkpoint.every_samples) or seen == sampler.total or result.asked:
                    recorder.checkpoint(seen, train_step, result.asked)
                recorder.clock.charge("checkpoint_s")
                if due(before, seen, every.validate_.every_samples) or seen == sampler.total:
                    score(spec, train_step, recorder, seen, mark)
            next(stream, None)  # lets Ray Data close this execution, so that the next one is planned


def score(spec: RunSpec, train_step: TrainStep, recorder: RunRecorder, seen: int, mark: Callable[..., None]) -> None:
    """Validate over all ranks, unless that was done before."""
    if seen == 0 or not spec.held_out_cases or journal.validated(spec.run_dir, seen):
        return
    mark("validate")
    means = validate(spec, train_step.network, train_step.device, recorder.rank, recorder.world_size, seen, mark)
    recorder.validated(seen, recorder.clock.charge("validation_s"), means)


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
