"""The training loop. Runs in a worker.

In: a `RunSpec`; the `Generation` from which this worker group starts; the ordered stream of patches.
Out: checkpoints, rows, events. It may be killed at any moment and started again at any world size.
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
    """Ray Train's train function, called on every worker: find rank, device and stream, then train."""
    spec: RunSpec = arguments["spec"]
    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    device = ray.train.torch.get_device()
    if device.type == "cpu":  # exact mode needs one thread: sums within a kernel depend on the number of threads
        share = max(1, len(os.sched_getaffinity(0)) // context.get_local_world_size())
        torch.set_num_threads(1 if spec.config.train.reduction == "exact" else share)
    generation = journal.current(spec.run_dir)
    assert generation is not None, "the dataset factory writes it before workers start"
    timer = PhaseTimer()
    with Heartbeat(timer, arguments["run_id"], generation.number, rank, world_size, spec.run_dir):
        stream = open_ahead(spec, generation.samples_seen, arguments["prefetch"])
        train_rank(spec, generation, rank, world_size, device, timer, stream)


def open_ahead(spec: RunSpec, seen: int, prefetch: int) -> Callable[[], Iterator[Patch]]:
    """The rank's stream, one segment a call; a thread begins the first while the model is set up."""
    opened: Future[tuple[Any, Iterator[Patch]]] = Future()
    begun: list[Any] = []

    def begin() -> None:
        try:
            shard = ray.train.get_dataset_shard("train")
            stream = patches(shard, prefetch)
            first = list(islice(stream, 1)) if seen < spec.sampler.total else []
            opened.set_result((shard, chain(first, stream)))
        except BaseException as error:  # noqa: BLE001 - raised again by `next_segment`
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

    `next_segment` returns this rank's patches from the cursor to the end of its segment, then of one whole segment at
    each call.
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
            validate_once(spec, train_step, recorder, seen)  # the last group may have been killed before it did
        while seen < sampler.total and not recorder.stopped:
            stream_start, segment_end = sampler.segment(seen)
            stream = next_segment()
            while seen < segment_end and not recorder.stopped:
                timer.enter("data", seen)
                mine = take(stream, sampler.rank_positions(seen, stream_start, rank, world_size))
                timer.enter("forward")  # with the copying of the batch, which waits for nobody
                result = train_step.step(batch_of(mine, seen), seen, recorder.poll(), timer.enter)
                before, seen = seen, min(seen + sampler.global_batch, sampler.total)

                timer.enter("save")
                recorder.step(before, seen, result, mine)
                recorder.compare(before, seen, train_step)
                if due(before, seen, every.checkpoint.every_samples) or seen == sampler.total or result.asked:
                    recorder.checkpoint(seen, train_step, result.asked)
                if due(before, seen, every.validate_.every_samples) or seen == sampler.total:
                    validate_once(spec, train_step, recorder, seen)
            next(stream, None)  # reaches the end, so that Ray Data closes this execution and plans the next


def train_step_of(spec: RunSpec, world_size: int, device: torch.device) -> TrainStep:
    """The network, optimiser and loss scaler at their initial state."""
    return TrainStep(spec.config, spec.sampler.total, spec.source.convention, world_size, device)


def validate_once(spec: RunSpec, train_step: TrainStep, recorder: RunRecorder, seen: int) -> None:
    """Validate over all ranks, unless an earlier group has done so at this sample."""
    if seen == 0 or not spec.held_out_cases or journal.validated(spec.run_dir, seen):
        return
    began, enter = time.perf_counter(), partial(recorder.timer.enter, "validate")
    enter()
    means = validate(spec, train_step, recorder.rank, seen, enter)
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
    """A rank's patches of one step as tensors. Copied, because the object store's blocks are read-only and can be freed
    then."""
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
    """Whether (before, seen] holds a multiple of `every`; it depends on samples alone, so all world sizes agree."""
    return before // every != seen // every
