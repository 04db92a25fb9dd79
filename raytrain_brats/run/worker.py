"""The training loop. Runs in a worker.

In: a `RunSpec`; the `Generation` that says where this worker group goes on; the ordered stream of patches.
Out: checkpoints, rows, events. Safe to be killed at any moment and started again at any world size.
"""

import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from functools import partial
from itertools import chain, islice
from typing import Any

import ray.train
import ray.train.torch
import torch

from raytrain_brats.data.patch import Patch
from raytrain_brats.data.sampler import draw, fingerprint
from raytrain_brats.data.stream import patches
from raytrain_brats.learn.augment import DRAWS
from raytrain_brats.learn.batch import Batch, TensorSample
from raytrain_brats.learn.step import TrainStep
from raytrain_brats.run import checkpoint, journal
from raytrain_brats.run.heartbeat import Heartbeat
from raytrain_brats.run.journal import Generation
from raytrain_brats.run.phase_timer import PhaseTimer
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
    timer = PhaseTimer()
    with Heartbeat(timer, arguments["run_id"], generation.number, rank, world_size, spec.run_dir):
        stream = open_ahead(spec, generation.samples_seen, arguments["prefetch"])
        train_rank(spec, generation, rank, world_size, device, timer, stream)


def open_ahead(spec: RunSpec, seen: int, prefetch: int) -> Callable[[], Iterator[Patch]]:
    """The rank's stream, one segment a call; the first is begun in a thread, while the model is being set up."""
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
    timer: PhaseTimer,
    next_segment: Callable[[], Iterator[Patch]],
) -> None:
    """Train until the sampler's last position, or until the run must stop.

    `next_segment` gives the stream of this rank's patches from the cursor to the end of the segment it is in, then of
    one whole segment at each call.
    """
    seen, sampler, every = generation.samples_seen, spec.sampler, spec.config
    with RunRecorder(spec, generation, rank, world_size, device, timer) as recorder:
        timer.enter("load", seen - 1)
        train_step = train_step_of(spec, world_size, device)
        if generation.checkpoint:
            tensors, state = checkpoint.load(spec.run_dir, generation.checkpoint)
            train_step.restore(tensors, state["learner"])
        recorder.ready()
        if due(seen - sampler.global_batch, seen, every.validate_.every_samples) or seen == sampler.total:
            score(spec, train_step, recorder, seen)  # unless the last worker group came to it
        while seen < sampler.total and not recorder.stopped:
            stream_start, segment_end = sampler.segment(seen)
            stream = next_segment()
            while seen < segment_end and not recorder.stopped:
                timer.enter("data", seen)
                mine = take(stream, sampler.rank_positions(seen, stream_start, rank, world_size))
                result = train_step.step(batch_of(mine, seen), seen, recorder.poll(), timer.enter)
                before, seen = seen, min(seen + sampler.global_batch, sampler.total)

                timer.enter("save")
                recorder.step(before, seen, result, mine)
                recorder.compare(before, seen, train_step)
                if due(before, seen, every.checkpoint.every_samples) or seen == sampler.total or result.asked:
                    recorder.checkpoint(seen, train_step, result.asked)
                if due(before, seen, every.validate_.every_samples) or seen == sampler.total:
                    score(spec, train_step, recorder, seen)
            next(stream, None)  # lets Ray Data close this execution, so that the next one is planned


def train_step_of(spec: RunSpec, world_size: int, device: torch.device) -> TrainStep:
    """The network and all that is trained with it, at its first weights."""
    return TrainStep(spec.config, spec.sampler.total, spec.source.convention, world_size, device)


def score(spec: RunSpec, train_step: TrainStep, recorder: RunRecorder, seen: int) -> None:
    """Validate over all ranks, unless that was done before."""
    if seen == 0 or not spec.held_out_cases or journal.validated(spec.run_dir, seen):
        return
    began, enter = time.perf_counter(), partial(recorder.timer.enter, "validate")
    enter()
    means = validate(spec, train_step.network, train_step.device, recorder.rank, recorder.world_size, seen, enter)
    recorder.validated(seen, time.perf_counter() - began, means)


def take(stream: Iterator[Patch], positions: list[int]) -> list[Patch]:
    """The next patches of the stream, which must be exactly those of `positions`: the position guard.

    Raises RuntimeError otherwise; the group then starts again from the newest checkpoint.
    """
    taken = list(islice(stream, len(positions)))
    if [patch.position for patch in taken] != positions:
        raise RuntimeError(f"stream gave positions {[p.position for p in taken]}, the sampler says {positions}")
    return taken


def batch_of(patches: list[Patch], samples_seen: int) -> Batch:
    """A rank's patches of one step as tensors, copied: blocks of the object store are read-only, and freed by this."""
    samples = tuple(
        TensorSample(
            place=p.position - samples_seen,
            image_czyx=torch.tensor(p.image_czyx),
            label_zyx=torch.tensor(p.label_zyx),
            mean_c=torch.tensor(p.mean),
            std_c=torch.tensor(p.std),
            weight=p.weight,
            augment_draws=draw(p.seed, "augment", DRAWS),
        )
        for p in patches
    )
    bad = sum(bool(p.reason) for p in patches)
    return Batch(samples, bad, sum(fingerprint(p.position, p.case_id, p.seed) for p in patches))


def due(before: int, seen: int, every: int) -> bool:
    """Whether a multiple of `every` samples lies in (before, seen]: the same at any number of workers."""
    return before // every != seen // every
