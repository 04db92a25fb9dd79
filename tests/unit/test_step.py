"""One global step: the update of one worker with the whole batch, however the batch is dealt."""

import dataclasses
import os
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import distributed, multiprocessing, nn

from raytrain_brats import labels
from raytrain_brats.data.patch import Patch
from raytrain_brats.data.sampler import draw
from raytrain_brats.learn import micro_batch
from raytrain_brats.learn.batch import DRAWS, augment, normalise, to_regions
from raytrain_brats.learn.model import build_network, sample_losses
from raytrain_brats.learn.step import TrainStep
from raytrain_brats.run import checkpoint
from raytrain_brats.run.feed import batch_of
from raytrain_brats.run.spec import RunSpec
from raytrain_brats.run.worker import train_step_of
from raytrain_brats.schedule import learning_rate
from tests.support.steps import CPU, NETWORKS, empty, patch, spec


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Any:
    """Tiny networks: more threads than cores to spare only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def weights(train_step: TrainStep) -> torch.Tensor:
    return nn.utils.parameters_to_vector(train_step.network.parameters()).detach()


def stepped(batch: list[Patch]) -> torch.Tensor:
    train_step = train_step_of(spec(), 1, CPU)
    train_step.step(batch_of(batch, 0, CPU), 0)
    return weights(train_step)


def by_hand(batch: list[Patch], run_spec: RunSpec) -> tuple[torch.Tensor, float]:
    """Gradient of the mean loss over the whole batch, by autograd, and that loss."""
    network = build_network(run_spec.config)
    options, table = run_spec.config.train.augment, torch.from_numpy(labels.region_table("msd"))
    draws = [draw(p.seed, "augment", DRAWS) for p in batch]
    axes = [[axis for axis in (1, 2, 3) if options.flip and mine[axis - 1] < 0.5] for mine in draws]
    image = torch.stack([torch.tensor(p.image_czyx).float().flip(a) for p, a in zip(batch, axes, strict=True)])
    label = torch.stack([torch.tensor(p.label_zyx)[None].flip(a)[0] for p, a in zip(batch, axes, strict=True)])
    mean, std = (torch.tensor(np.stack([getattr(p, name) for p in batch])).float() for name in ("mean", "std"))
    x, y = augment(normalise(image, mean, std), torch.tensor(draws), options), to_regions(label, table)
    loss = sample_losses(network(x), y).mean()
    loss.backward()  # type: ignore[no-untyped-call]
    return nn.utils.parameters_to_vector([p.grad for p in network.parameters() if p.grad is not None]), loss.item()


@pytest.mark.parametrize("network", NETWORKS)
def test_step_is_the_gradient_of_the_mean_loss(network: str) -> None:
    """One SGD step moves the weights by rate * (1 + momentum) * gradient of the batch's mean loss (Nesterov)."""
    run_spec, batch = spec(network), [patch(i) for i in range(4)]
    train_step = train_step_of(run_spec, 1, CPU)
    before = weights(train_step)
    result = train_step.step(batch_of(batch, 0, CPU), 0)
    gradient, loss = by_hand(batch, run_spec)
    rate = learning_rate(run_spec.config.train.optimiser, 0, run_spec.sampler.total)
    decayed = gradient + run_spec.config.train.optimiser.weight_decay * before
    assert result.loss == pytest.approx(loss, abs=1e-6) and result.bad == 0 and result.learning_rate == rate
    torch.testing.assert_close(weights(train_step), before - rate * 1.99 * decayed, rtol=0, atol=1e-6)


def test_gradients_are_clipped_as_one_batch() -> None:
    """The clip norm applies to the mean gradient of the whole batch, whatever the micro-batch."""
    batch = [patch(i) for i in range(4)]
    gradient, _ = by_hand(batch, spec())
    limit = float(gradient.norm()) / 3
    found = []
    for size in (1, 4):
        train_step = train_step_of(spec(micro_batch=size, clip_norm=limit), 1, CPU)
        before = weights(train_step)
        train_step.step(batch_of(batch, 0, CPU), 0)
        found.append((before - weights(train_step)).norm() / (0.01 * 1.99))
    assert [float(norm) for norm in found] == pytest.approx([limit, limit], rel=1e-3)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_neither_micro_batches_nor_rows_of_weight_zero_change_the_update(size: int) -> None:
    """Any micro-batch gives the same weights; an unreadable case leaves the step of the other three, and is counted."""
    real = [patch(i) for i in range(3)]
    for batch, bad in ((real, 0), ([real[0], empty(9, "missing: gone"), *real[1:]], 1)):
        train_step = train_step_of(spec(micro_batch=size), 1, CPU)
        result = train_step.step(batch_of(batch, 0, CPU), 0)
        torch.testing.assert_close(weights(train_step), stepped(real), rtol=0, atol=2e-6)
        assert (result.loss, result.bad) == (pytest.approx(by_hand(real, spec())[1], abs=1e-6), bad)


def test_the_micro_batch_is_what_memory_holds() -> None:
    """`auto`: the rank's share of the step where it fits, never less than one; without a GPU two; in `exact` one."""
    gb = 1 << 30
    assert micro_batch.fitting(share=16, free=78 * gb, total=80 * gb, weights=0, sample=2 * gb) == 16
    assert micro_batch.fitting(share=16, free=15 * gb, total=16 * gb, weights=gb // 4, sample=2 * gb) == 4
    assert micro_batch.fitting(share=4, free=3 * gb, total=16 * gb, weights=0, sample=2 * gb) == 1
    for world_size, reduction, expected in ((1, "fast", 2), (2, "fast", 2), (4, "fast", 1), (1, "exact", 1)):
        train_step = train_step_of(spec(micro_batch="auto", reduction=reduction), 1, CPU)
        train_step.world_size = world_size
        assert micro_batch.choose(train_step)["samples"] == train_step.micro_batch == expected


def _frozen_state(train_step: TrainStep) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in train_step.state()[0].items()}


@pytest.mark.parametrize("optimiser", ["adamw", "sgd"])
def test_a_step_without_samples_changes_nothing(optimiser: str) -> None:
    """Only placeholders: weights and optimiser state stay bit for bit (no decay, no momentum), the loss is None."""
    train_step = train_step_of(spec(optimiser=optimiser), 1, CPU)
    train_step.step(batch_of([patch(i) for i in range(4)], 0, CPU), 0)
    before = _frozen_state(train_step)
    result = train_step.step(batch_of([empty(4), empty(5, "missing: x"), empty(6), empty(7)], 4, CPU), 4)
    after = train_step.state()[0]
    assert result.loss is None and result.bad == 1
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_step_that_is_not_finite_changes_nothing(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A NaN in the loss, or only in a gradient, reaches neither the weights nor the optimiser."""
    train_step = train_step_of(spec(optimiser="adamw"), 1, CPU)
    train_step.step(batch_of([patch(i) for i in range(4)], 0, CPU), 0)
    before = _frozen_state(train_step)
    bad = patch(4)
    if where == "loss":
        bad = dataclasses.replace(bad, std=np.full(4, np.nan, np.float32))
    else:
        first = next(train_step.network.parameters())
        first.register_hook(lambda gradient: gradient * float("inf"))
    train_step.step(batch_of([bad, *(patch(i) for i in range(5, 8))], 4, CPU), 4)
    assert all(torch.equal(before[key], tensor) for key, tensor in train_step.state()[0].items())


@pytest.mark.parametrize("optimiser", ["adamw", "sgd"])
def test_a_restored_learner_goes_on_bit_for_bit(optimiser: str, tmp_path: Path) -> None:
    """State through a checkpoint on disk, into a learner of another history: the next steps are the very same."""
    run_spec = spec(optimiser=optimiser)
    train_step, other = train_step_of(run_spec, 1, CPU), train_step_of(run_spec, 1, CPU)
    for start in (0, 4):
        train_step.step(batch_of([patch(start + i) for i in range(4)], start, CPU), start)
    made = checkpoint.save(str(tmp_path), 8, 1, *train_step.state())
    other.step(batch_of([patch(50 + i) for i in range(4)], 0, CPU), 0)
    other.restore(*checkpoint.load(str(tmp_path), made.name))
    for start in (8, 12):
        batch = batch_of([patch(start + i) for i in range(4)], start, CPU)
        results = [one.step(batch, start) for one in (train_step, other)]
        assert results[0] == results[1]
    first, second = train_step.state(), other.state()
    assert first[0].keys() == second[0].keys() and all(torch.equal(first[0][k], second[0][k]) for k in first[0])
    assert [group["lr"] for group in first[1]["param_groups"]] == [group["lr"] for group in second[1]["param_groups"]]


def _rank(rank: int, port: int, folder: str) -> None:
    """Both cases in one process group: starting one costs seconds."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    for name, (network, size, shares) in CASES.items():
        train_step = train_step_of(spec(network, size), 2, CPU)
        results = [train_step.step(batch_of([_row(n) for n in shares[rank]], start, CPU), start) for start in (0, 4)]
        torch.save((weights(train_step), [(r.loss, r.bad) for r in results]), f"{folder}/{name}-{rank}.pt")
    os._exit(0)  # the group's destructor may wait for ever in a forked process; there is nothing left to do


def _row(number: int) -> Patch:
    return empty(-number, "missing: x") if number < 0 else patch(number)


# name: network, micro-batch, positions of rank 0 and 1; a negative one is a case that cannot be read
CASES: dict[str, tuple[str, int, tuple[list[int], list[int]]]] = {
    "3+1": ("segresnet", 1, ([0, 1, 2], [3])),
    "3+2": ("dynunet", 2, ([0, 1, 2], [3, 4])),
    "2+2-bad": ("segresnet", 1, ([0, -1], [-2, 3])),
    "2+0": ("segresnet", 2, ([0, 1], [-1, -2])),
}


def test_two_ranks_make_the_step_of_one(tmp_path: Path) -> None:
    """Uneven shares over DDP give the weights and losses of one worker with the whole batch, the same on both ranks."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    multiprocessing.start_processes(_rank, (port, str(tmp_path)), 2, start_method="fork")
    for name, (network, _, shares) in CASES.items():
        alone = train_step_of(spec(network, 8), 1, CPU)
        batch = [_row(n) for share in shares for n in share]
        expected = [alone.step(batch_of(batch, start, CPU), start) for start in (0, 4)]
        ranks = [torch.load(tmp_path / f"{name}-{rank}.pt") for rank in (0, 1)]
        assert torch.equal(ranks[0][0], ranks[1][0]), name
        torch.testing.assert_close(ranks[0][0], weights(alone), rtol=0, atol=1e-5, msg=name)
        for _, found in ranks:
            assert found == [(pytest.approx(r.loss, abs=1e-5), r.bad) for r in expected]
