"""The training loop. Runs in a worker.

In: a `RunSpec`; the `Generation` from which this worker group starts; its patches of each step.
Out: checkpoints, rows, events. It may be killed at any moment and started again at any world size.
"""

import os
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch

from raytrain_brats.data.patch import Patch
from raytrain_brats.data.sampler import draw, fingerprint
from raytrain_brats.learn.batch import Batch, DeviceSample
from raytrain_brats.learn.step import TrainStep
from raytrain_brats.run import checkpoint, journal
from raytrain_brats.run.cadence import CHECKPOINT, VALIDATE
from raytrain_brats.run.checkpoint_request import HOLD, SAVE
from raytrain_brats.run.feed import open_steps, tensor
from raytrain_brats.run.heartbeat import heartbeat
from raytrain_brats.run.journal import Generation
from raytrain_brats.run.phase_timer import PhaseTimer
from raytrain_brats.run.rank import Rank
from raytrain_brats.run.recorder import RunRecorder
from raytrain_brats.run.spec import RunSpec
from raytrain_brats.run.validate import validate


def train_worker(arguments: dict[str, Any]) -> None:
    """Ray Train's train function, called on every worker: find rank, device and stream, then train."""
    spec: RunSpec = ray.get(arguments["spec"])
    context = ray.train.get_context()
    rank = Rank(context.get_world_rank(), context.get_world_size(), ray.train.torch.get_device())
    if rank.device.type == "cpu":  # exact mode needs one thread: sums within a kernel depend on the number of threads
        share = max(1, len(os.sched_getaffinity(0)) // context.get_local_world_size())
        torch.set_num_threads(1 if spec.config.train.reduction == "exact" else share)
    generation = journal.current(spec.run_dir)
    assert generation is not None, "the dataset factory writes it before workers start"
    timer = PhaseTimer()
    with heartbeat(timer, arguments["run_id"], generation.number, rank, spec.run_dir):
        step = generation.samples_seen // spec.sampler.global_batch
        stream = open_steps(spec, step, rank, arguments["prefetch"], lambda: ray.get(arguments["cases"]))
        train_rank(spec, generation, rank, timer, stream)


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
        if recorder.ready():
            validate_once(spec, train_step, recorder, seen)
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
            if due & (CHECKPOINT | SAVE | HOLD) or seen == sampler.total:
                recorder.checkpoint(seen, train_step, due)
            if due & VALIDATE:
                validate_once(spec, train_step, recorder, seen)
        if not recorder.stopped:
            next(stream, None)  # reaches the end: there must be no more


def train_step_of(spec: RunSpec, world_size: int, device: torch.device) -> TrainStep:
    """The network, optimiser and loss scaler at their initial state."""
    return TrainStep(spec.config, spec.sampler.total, spec.source.convention, world_size, device)


def validate_once(spec: RunSpec, train_step: TrainStep, recorder: RunRecorder, seen: int) -> None:
    """Validate over all ranks."""
    began = time.perf_counter()
    recorder.timer.enter("validate")
    means = validate(spec, train_step, recorder.rank.number, seen, recorder.timer.enter)
    recorder.validated(seen, time.perf_counter() - began, means)


def batch_of(patches: list[Patch], samples_seen: int, device: torch.device) -> Batch:
    """A rank's patches of one step as the network's side wants them. Nothing is copied: voxels are where they train."""
    samples = tuple(
        DeviceSample(
            place=p.position - samples_seen,
            image_czyx=tensor(p.image_czyx, device),
            label_zyx=tensor(p.label_zyx, device),
            mean_c=p.mean,
            std_c=p.std,
            weight=p.weight,
            draws=partial(draw, p.seed),
            start_zyx=p.start_zyx,
        )
        for p in patches
    )
    bad = sum(bool(p.reason) for p in patches)
    return Batch(samples, bad, sum(fingerprint(p.position, p.case_id, p.seed) for p in patches))
