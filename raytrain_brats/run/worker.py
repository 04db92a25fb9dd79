"""The training loop. Runs in a worker.

In: a `RunSpec`; the `Generation` from which this worker group starts; its patches of each step.
Out: checkpoints, rows, events. It may be killed at any moment and started again at any world size.
"""

import os
from collections.abc import Iterator
from functools import partial
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch

from raytrain_brats.data import resident
from raytrain_brats.data.patch import Patch
from raytrain_brats.data.stream import open_shard
from raytrain_brats.learn import micro_batch
from raytrain_brats.learn.step import TrainStep
from raytrain_brats.run import checkpoint, control, initial
from raytrain_brats.run.cadence import CHECKPOINT, END, VALIDATE
from raytrain_brats.run.checkpoint_request import HOLD, SAVE
from raytrain_brats.run.control import Generation
from raytrain_brats.run.feed import batch_of, open_steps
from raytrain_brats.run.heartbeat import heartbeat
from raytrain_brats.run.phase_timer import PhaseTimer
from raytrain_brats.run.rank import Rank
from raytrain_brats.run.recorder import RunRecorder
from raytrain_brats.run.spec import RunSpec


def train_worker(arguments: dict[str, Any]) -> None:
    """Ray Train's train function, called on every worker: find rank, device and stream, then train."""
    spec: RunSpec = ray.get(arguments["spec"])
    context = ray.train.get_context()
    rank = Rank(context.get_world_rank(), context.get_world_size(), ray.train.torch.get_device())
    if rank.device.type == "cpu":  # exact mode needs one thread: sums within a kernel depend on the number of threads
        cores = max(1, len(os.sched_getaffinity(0)) // context.get_local_world_size())
        threads = 1 if spec.config.train.reduction == "exact" else spec.config.run.threads_per_worker or cores
        torch.set_num_threads(threads)
    generation = control.current(spec.run_dir)
    assert generation is not None, "the dataset factory writes it before workers start"
    timer = PhaseTimer()
    with heartbeat(timer, arguments["run_id"], generation.number, rank, spec.run_dir):
        step = generation.samples_seen // spec.sampler.global_batch
        share = partial(open_shard, rank.number, rank.world_size)
        stream = open_steps(spec, step, rank, arguments["prefetch"], lambda: ray.get(arguments["cases"]), share)
        train_rank(spec, generation, rank, timer, stream)
        del stream  # a run that ended early has not read it to its end
        resident.leave(spec.dataset_identity)


def train_rank(
    spec: RunSpec, generation: Generation, rank: Rank, timer: PhaseTimer, stream: Iterator[list[Patch]]
) -> None:
    """Train to the sampler's last position, or until the run must stop. `stream` gives the rank's patches of a step."""
    seen, sampler = generation.samples_seen, spec.sampler
    with RunRecorder(spec, generation, rank, timer) as recorder:
        timer.enter("load", seen - 1)
        train_step = train_step_of(spec, rank.world_size, rank.device)
        train_step.own_work_until = timer.own_work_until
        if generation.checkpoint:
            tensors, state = checkpoint.load(spec.run_dir, generation.checkpoint)
            train_step.restore(tensors, state["learner"])
            recorder.resume(state)
        elif spec.initial:
            train_step.begin_with(initial.load(spec.run_dir, spec.initial))
        if spec.config.train.micro_batch == "auto":
            recorder.chosen("micro_batch", micro_batch.choose(train_step))
        if recorder.ready():
            recorder.validate(seen, train_step)
        while seen < sampler.total and not recorder.stopped:
            timer.enter("data", seen)
            mine = next(stream)
            timer.enter("forward")
            batch, asked = batch_of(mine, seen, rank.device), recorder.poll(seen)
            launched = train_step.launch(batch, seen, asked, timer.enter)
            before, seen = seen, seen + sampler.global_batch

            timer.enter("save")
            due = recorder.step(before, seen, launched, mine)
            recorder.compare(before, seen, train_step)
            scored = due & VALIDATE if spec.config.checkpoint.best else 0  # as it was scored: it may be the best
            if due & (CHECKPOINT | SAVE | HOLD | END) or scored or seen == sampler.total:
                recorder.checkpoint(seen, train_step, due)
            if due & END:
                recorder.end_early(seen)
            elif due & VALIDATE:
                recorder.validate(seen, train_step)
        recorder.gather_scores()
        if not recorder.stopped:
            next(stream, None)  # reaches the end: there must be no more


def train_step_of(spec: RunSpec, world_size: int, device: torch.device) -> TrainStep:
    """The network, optimiser and loss scaler at their initial state."""
    return TrainStep(spec.config, spec.sampler.total, spec.source.convention, world_size, device)
