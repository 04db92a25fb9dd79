"""Gradients summed along a fixed tree: the same bits at any number of ranks."""

import os
import socket
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import distributed, multiprocessing, nn

from raytrain_brats import augmentation
from raytrain_brats.learn import tree_reduce
from raytrain_brats.learn.batch import Batch
from raytrain_brats.learn.step import differing, weight_hash
from raytrain_brats.run.feed import batch_of
from raytrain_brats.run.worker import train_step_of
from tests.support.steps import CPU, empty, odds, patch, spec

shapes = st.integers(1, 40).flatmap(
    lambda total: st.tuples(st.just(total), st.integers(1, total), st.integers(0, 100), st.integers(0, 10**6))
)


def leaves(total: int, seed: int) -> torch.Tensor:
    """Values of very different sizes: a sum in another order has other bits."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(total, 8, generator=generator) * 10 ** (6 * torch.rand(total, 1, generator=generator))


def folded(values: torch.Tensor, places: list[int]) -> dict[tree_reduce.Node, torch.Tensor]:
    total = len(values)
    return tree_reduce.fold(
        ((tree_reduce.leaf(p, total), values[p].clone()) for p in tree_reduce.order(places, total)), total
    )


@settings(max_examples=300, deadline=None)
@given(shapes)
def test_any_dealing_of_the_places_gives_the_same_bits(shape: tuple[int, int, int, int]) -> None:
    """W ranks with every W-th place, from any turn on: their nodes fold to the very sum of one rank."""
    total, world_size, turn, seed = shape
    values = leaves(total, seed)
    (alone,) = folded(values, list(range(total))).values()
    places = [list(range((turn + rank) % world_size, total, world_size)) for rank in range(world_size)]
    sent = [folded(values, own) for own in places]
    assert [sorted(nodes) for nodes in sent] == [tree_reduce.held(own, total) for own in places]
    ((root, whole),) = tree_reduce.fold((item for nodes in sent for item in nodes.items()), total).items()
    assert root == (1, 0) and torch.equal(whole, alone)
    torch.testing.assert_close(whole, values.double().sum(0).float(), rtol=1e-4, atol=1.0)
    if world_size & (world_size - 1) == 0:  # a power of two: one vector, as an all-reduce would send
        assert all(len(nodes) == 1 for nodes in sent)


@pytest.mark.parametrize("total", [1, 2, 7, 8, 33])
def test_few_partial_sums_wait(total: int) -> None:
    """Places in the order of `order` fold at once: log2(n) + 1 vectors at a time, not n."""
    for count in range(1, total + 1):
        waiting = tree_reduce.held(tree_reduce.order(range(total), total)[:count], total)
        assert len(waiting) <= (total - 1).bit_length() + 1


def _rank(rank: int, world_size: int, port: int, folder: str, augment: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size)
    run_spec = spec("dynunet", optimiser="adamw", reduction="exact", augment=augment)
    train_step = train_step_of(run_spec, world_size, CPU)
    results = []
    for step in range(3):
        turn = (
            rank + step
        ) % world_size  # where the world size does not divide the batch, turns move from step to step
        results.append(train_step.step(rows(step, range(turn, 4, world_size)), 4 * step))
    agree = differing("cpu", train_step.network)
    if rank == world_size - 1:
        flip(train_step.network)
    found = differing("cpu", train_step.network)
    losses = [result.loss for result in results]
    torch.save((train_step.state()[0], losses, agree, found), f"{folder}/{world_size}-{rank}.pt")
    os._exit(0)  # the group's destructor may wait for ever in a forked process; there is nothing left to do


def rows(step: int, places: range) -> Batch:
    """The samples at these places of a global step of four; the one at position 5 cannot be read."""
    positions = [4 * step + place for place in places]
    return batch_of([empty(p, "missing: x") if p == 5 else patch(p) for p in positions], 4 * step, CPU)


def flip(network: nn.Module) -> None:
    """One bit of one weight, the lowest: no loss would tell."""
    weights = next(network.parameters()).detach().view(-1)
    weights.view(torch.int32)[3] ^= 1


@pytest.mark.parametrize("augment", ["light", "full"])
def test_weights_and_losses_are_the_same_bits_at_any_world_size(
    tmp_path: Path, augment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """AdamW on 1, 2 and 3 real ranks, one sample unreadable; then one flipped bit is found, and the rank named. So with
    nnU-Net's augmentation, of which half happens to each sample."""
    monkeypatch.setattr(augmentation, "NNUNET", odds(0.5))  # ranks are forked
    torch.set_num_threads(1)
    train_step = train_step_of(spec("dynunet", optimiser="adamw", reduction="exact", augment=augment), 1, CPU)
    losses = [train_step.step(rows(step, range(4)), 4 * step).loss for step in range(3)]
    alone = train_step.state()[0]
    for world_size in (2, 3):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        given = (world_size, port, str(tmp_path), augment)
        multiprocessing.start_processes(_rank, given, world_size, start_method="fork")
        for rank in range(world_size):
            state, found, agree, wrong = torch.load(tmp_path / f"{world_size}-{rank}.pt")
            assert found == losses and agree == []
            assert wrong == ([0, 1] if world_size == 2 else [2])  # of two nobody can tell which one is right
            if rank < world_size - 1:
                assert state.keys() == alone.keys() and all(torch.equal(state[key], alone[key]) for key in alone)


def test_fast_and_exact_make_the_same_step_but_for_rounding() -> None:
    """Both are the gradient of the mean loss over the batch."""
    states = []
    for reduction in ("fast", "exact"):
        train_step = train_step_of(spec("segresnet", reduction=reduction), 1, CPU)
        train_step.step(batch_of([patch(i) for i in range(4)], 0, CPU), 0)
        states.append(nn.utils.parameters_to_vector(train_step.network.parameters()).detach())
    torch.testing.assert_close(*states, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_hash_sees_every_single_bit(dtype: torch.dtype) -> None:
    """Any bit of any weight, and two weights that changed places."""
    network = nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 2)).to(dtype)
    before = weight_hash(network)
    integers = torch.int32 if dtype == torch.float32 else torch.int16
    for parameter in network.parameters():
        words = parameter.detach().view(-1).view(integers)
        for place in range(words.numel()):
            for bit in range(words.element_size() * 8):
                mask = torch.tensor(1 << bit, dtype=torch.int64).to(integers)
                words[place] ^= mask
                assert weight_hash(network) != before
                words[place] ^= mask
    first = network[0].weight.detach().view(-1)
    first[0], first[1] = first[1].clone(), first[0].clone()
    assert weight_hash(network) != before
