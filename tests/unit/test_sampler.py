"""The sampler is a pure function, and whatever the workers do every position is owned exactly once."""

import random
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from itertools import accumulate

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raytrain_brats.data import sampler as samplers
from raytrain_brats.data.sampler import Sampler, draw

SAMPLERS = st.builds(
    Sampler,
    seed=st.integers(0, 2**40),
    cases=st.integers(1, 23),
    global_batch=st.integers(1, 12),
    patches_per_case=st.integers(1, 8),
    epochs=st.integers(1, 3),
)
LENGTHENED = st.builds(
    lambda sampler, more, last: replace(
        sampler, epochs=sampler.epochs + sum(more) + last, earlier=tuple(accumulate((sampler.epochs, *more)))
    ),
    SAMPLERS,
    st.lists(st.integers(1, 3), max_size=2),
    st.integers(1, 3),
)
GOLDEN = Sampler(seed=7, cases=5, global_batch=4, patches_per_case=2, epochs=2)
GOLDEN_CASES = [None, None, 1, 3, 1, 3, 2, 0, 2, 0, 4, 4, 4, 4, 3, 1, 3, 1, 2, 0, 2, 0, None, None]
GOLDEN_SEEDS = [2826043238853933318, 635815354598459440, 3620588671500061701]
GOLDEN_DRAWS = [0.8917307533183713, 0.11083683747143369, 0.3506650755762033, 0.5611737983858193]


@settings(deadline=None, max_examples=100)
@given(SAMPLERS)
def test_every_case_is_shown_in_successive_steps_and_once_a_patch(sampler: Sampler) -> None:
    """Each dealt case k times, in k successive steps, once a step, with k seeds of its own; each epoch every case; all
    else is padding, of which there is less than k steps at either end."""
    batch, k = sampler.global_batch, sampler.patches_per_case
    shown = [sampler.sample(p) for p in range(sampler.total)]
    steps: dict[tuple[int, int], list[int]] = {}
    for sample in shown:
        if sample.case is not None:
            steps.setdefault((sample.epoch, sample.case), []).append(sample.position // batch)
    wanted = {(epoch, case) for epoch in range(sampler.epochs) for case in range(sampler.cases)}
    assert steps.keys() == wanted
    assert all(found == list(range(found[0], found[0] + k)) for found in steps.values())
    assert [s.position for s in shown] == list(range(sampler.steps * batch))
    assert len({s.seed for s in shown}) == sampler.total
    assert all(0 <= s.seed < 2**63 for s in shown)
    padded = [s.position // batch for s in shown if s.case is None]
    assert all(step < k or step >= sampler.steps - k for step in padded)
    firsts = [min(found) for found in steps.values()]
    assert max(Counter(firsts).values()) <= -(-batch // k), "as even as integers are: G / k new cases a step"
    assert sorted(firsts) == sorted(sampler.start(n) for n in range(sampler.dealt))


@settings(deadline=None, max_examples=60)
@given(LENGTHENED)
def test_a_lengthened_run_is_one_list_that_begins_with_the_shorter_one(sampler: Sampler) -> None:
    """No position of the shorter run changes, padding included; each epoch still shows every case k times, in k
    successive steps; a part ends and the next begins with less than k steps that hold padding."""
    shorter = replace(sampler, epochs=sampler.earlier[-1], earlier=sampler.earlier[:-1])
    batch, k = sampler.global_batch, sampler.patches_per_case
    shown = [sampler.sample(p) for p in range(sampler.total)]
    assert shown[: shorter.total] == [shorter.sample(p) for p in range(shorter.total)]
    assert [s.position for s in shown] == list(range(sampler.steps * batch))
    steps: dict[tuple[int, int], list[int]] = {}
    for sample in shown:
        if sample.case is not None:
            steps.setdefault((sample.epoch, sample.case), []).append(sample.position // batch)
    assert steps.keys() == {(epoch, case) for epoch in range(sampler.epochs) for case in range(sampler.cases)}
    assert all(found == list(range(found[0], found[0] + k)) for found in steps.values())
    assert len({s.seed for s in shown}) == sampler.total
    padded = {s.position // batch for s in shown[shorter.total :] if s.case is None}
    assert all(step < shorter.steps + k or step >= sampler.steps - k for step in padded)
    alone = replace(shorter, epochs=sampler.epochs - shorter.epochs, earlier=())
    assert sampler.steps - shorter.steps - alone.steps in (0, 1, -1), "as long as a run of these epochs alone"


@settings(deadline=None, max_examples=60)
@given(SAMPLERS | LENGTHENED, st.integers(1, 9), st.randoms(use_true_random=False))
def test_through_random_resizes_each_position_arrives_once_at_its_rank(
    sampler: Sampler, size: int, dice: random.Random
) -> None:
    """Worlds of 1..G come and go at any step. Before each step every rank reads rows until it has what the step shows,
    all ranks equally many; then it holds exactly its positions, and no rank is without one."""
    step = 0
    while step < sampler.steps:
        world, stop = dice.randint(1, sampler.global_batch), dice.randint(step + 1, sampler.steps)
        turns = iter(sampler.turns(step, world, size))
        held: list[set[int]] = [set() for _ in range(world)]
        until, begun = 0, step
        for now in range(step, stop):
            while until < min(sampler.oldest(now) + sampler.global_batch, sampler.dealt):
                turn = next(turns)
                for rank in range(world):
                    row = sampler.row(begun, turn, rank, world, size)
                    until = row.until
                    assert len(row.cases) <= size
                    for case, samples in row.cases:
                        assert all(s == sampler.sample(s.position) and s.case == case for s in samples)
                        assert samples
                        held[rank] |= {s.position for s in samples}
            shares = [sampler.rank_positions(now, rank, world) for rank in range(world)]
            first = now * sampler.global_batch
            assert sorted(p for share in shares for p in share) == list(range(first, first + sampler.global_batch))
            assert min(map(len, shares)) == sampler.global_batch // world
            assert max(map(len, shares)) - min(map(len, shares)) <= 1
            for share, mine in zip(shares, held, strict=True):
                real = {p for p in share if sampler.sample(p).case is not None}
                assert real <= mine
                mine -= real
        if stop == sampler.steps:
            assert next(turns, None) is None
            assert not any(held)
        step = stop


@settings(deadline=None, max_examples=60)
@given(SAMPLERS | LENGTHENED, st.data())
def test_a_row_brings_what_is_left_of_a_case_and_turns_have_one_for_each_rank(
    sampler: Sampler, data: st.DataObject
) -> None:
    """From any step on, at any world size: the rows of all turns hold every later position that shows a case, once, and
    rank r only dealt cases n = r mod W."""
    step = data.draw(st.integers(0, sampler.steps - 1))
    world, size = data.draw(st.integers(1, sampler.global_batch)), data.draw(st.integers(1, 9))
    found = Counter[int]()
    for turn in sampler.turns(step, world, size):
        assert turn % world == 0
        for rank in range(world):
            for _, samples in sampler.row(step, turn, rank, world, size).cases:
                found.update(s.position for s in samples)
                for s in samples:
                    now, place = divmod(s.position, sampler.global_batch)
                    assert (sampler.oldest(now) + place) % world == rank
    later = range(step * sampler.global_batch, sampler.total)
    assert found == Counter(p for p in later if sampler.sample(p).case is not None)


@settings(deadline=None, max_examples=100)
@given(LENGTHENED, st.integers(1, 5), st.integers(1, 3), st.data())
def test_the_cases_of_a_row_are_known_without_its_samples(
    sampler: Sampler, world_size: int, size: int, data: st.DataObject
) -> None:
    """Read tasks are planned by them: the same cases, in the same order."""
    step = data.draw(st.integers(0, sampler.steps - 1))
    for turn in sampler.turns(step, world_size, size):
        for rank in range(world_size):
            place = (step, turn, rank, world_size, size)
            planned = [sampler.case(dealt) for dealt in sampler.row_dealt(*place)]
            assert planned == [case for case, _ in sampler.row(*place).cases]
    with pytest.raises(IndexError):
        sampler.case(sampler.dealt)


def test_pinned_samples_and_draws() -> None:
    """Values that must never change: a resumed run of an older version would silently train on another order."""
    assert [GOLDEN.sample(p).case for p in range(GOLDEN.total)] == GOLDEN_CASES
    assert [GOLDEN.sample(p).seed for p in (0, 3, 11)] == GOLDEN_SEEDS
    assert draw(3, "crop", 10)[::3] == GOLDEN_DRAWS


def test_a_fresh_process_gives_the_same_samples() -> None:
    """Neither the hash seed nor what was asked before matters, nor the order of asking."""
    code = "from raytrain_brats.data.sampler import Sampler; p = {!r}; print([p.sample(i) for i in range(23, -1, -1)])"
    fresh = subprocess.run([sys.executable, "-c", code.format(GOLDEN)], capture_output=True, text=True, check=True)
    assert fresh.stdout.strip() == str([GOLDEN.sample(i) for i in range(23, -1, -1)])


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    """Every epoch and every seed shuffles anew."""
    orders = set()
    for seed in range(4):
        sampler = Sampler(seed, 50, 5, 1, 4)
        orders |= {tuple(sampler.sample(e * 50 + i).case for i in range(50)) for e in range(4)}
    assert len(orders) == 16


def test_the_first_step_and_a_batch_hold_different_cases() -> None:
    """A step's samples are of different cases wherever there are as many cases as samples."""
    sampler = Sampler(3, 12, 6, 4, 2)
    for step in range(sampler.steps):
        shown = [sampler.sample(step * 6 + place) for place in range(6)]
        dealt = [(s.epoch, s.case) for s in shown if s.case is not None]
        assert len(set(dealt)) == len(dealt)


def test_positions_outside_the_run_are_refused() -> None:
    """A position below 0 or at `total` is an IndexError, never a wrapped-round sample."""
    for position in (-1, GOLDEN.total):
        with pytest.raises(IndexError, match="outside"):
            GOLDEN.sample(position)


@settings(deadline=None)
@given(st.integers(0, 2**63 - 1), st.sampled_from(["crop", "flip"]), st.integers(0, 20))
def test_draws_are_in_the_half_open_interval(seed: int, purpose: str, count: int) -> None:
    """`count` numbers in [0, 1); fewer are a prefix of more; another purpose gives others."""
    numbers = draw(seed, purpose, count)
    assert len(numbers) == count
    assert all(0 <= n < 1 for n in numbers)
    assert draw(seed, purpose, count + 9)[:count] == numbers
    assert not set(numbers) & set(draw(seed, purpose + "2", count))


def test_a_draw_never_rounds_up_to_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """The greatest digest gives a number below 1: int(number * n) is always a valid index."""
    monkeypatch.setattr(
        samplers.hashlib, "blake2b", lambda *_, **__: type("H", (), {"digest": lambda _: b"\xff" * 64})()
    )
    assert max(draw(0, "crop", 8)) < 1
