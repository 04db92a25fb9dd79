"""The plan is a pure function, and whatever the workers do every position is owned exactly once."""

import random
import subprocess
import sys
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raytrain_brats.data import sampler as samplers
from raytrain_brats.data.sampler import Sampler, draw

PLANS = st.builds(
    Sampler,
    seed=st.integers(0, 2**40),
    cases=st.integers(1, 23),
    global_batch=st.integers(1, 12),
    patches_per_case=st.integers(1, 4),
    window_cases=st.integers(1, 6),
    epochs=st.integers(1, 3),
)
GOLDEN = Sampler(seed=7, cases=5, global_batch=4, patches_per_case=2, window_cases=2, epochs=2)
GOLDEN_CASES = [3, 1, 1, 3, 2, 0, 2, 0, 4, 4, None, None, 4, 4, 3, 3, 1, 2, 1, 2, 0, 0, None, None]
GOLDEN_SEEDS = [7089096769078773697, 6655374852024758778, 7765383604278369866]
GOLDEN_DRAWS = [0.8917307533183713, 0.11083683747143369, 0.3506650755762033, 0.5611737983858193]


@settings(deadline=None, max_examples=60)
@given(PLANS, st.randoms(use_true_random=False), st.integers(1, 5))
def test_every_position_is_owned_once_through_random_resizes(
    sampler: Sampler, dice: random.Random, windows: int
) -> None:
    """Worlds of 1..G come and go at any step: each step's shares are disjoint, whole, even, and the rows as dealt."""
    seen: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(samplers, "SEGMENT_WINDOWS", windows)
        while len(seen) < sampler.total:
            world, stop = dice.randint(1, sampler.global_batch), dice.randint(len(seen) + 1, sampler.total)
            while len(seen) < stop:  # this group of workers streams segment after segment, then is resized
                low, high = sampler.segment(len(seen))
                queues = [list(range(low + rank, high, world)) for rank in range(world)]  # rows dealt in turn
                for start in range(low, min(high, stop), sampler.global_batch):
                    shares = [sampler.rank_positions(start, low, rank, world) for rank in range(world)]
                    dealt = [[queue.pop(0) for _ in share] for queue, share in zip(queues, shares, strict=True)]
                    assert shares == dealt
                    assert max(map(len, shares)) - min(map(len, shares)) <= 1
                    step = sorted(p for share in shares for p in share)
                    assert step == list(range(start, start + sampler.global_batch))
                    seen += step
    assert seen == list(range(sampler.total))


def test_every_world_size_up_to_the_batch_has_work_for_all() -> None:
    """No rank is idle at any W from 1 to G, from any start of the stream."""
    sampler = Sampler(0, 40, 12, 3, 4, 2)
    for world in range(1, 13):
        for stream_start in range(0, sampler.total, sampler.global_batch):
            for start in range(stream_start, sampler.total, sampler.global_batch):
                shares = [sampler.rank_positions(start, stream_start, rank, world) for rank in range(world)]
                assert sorted(p for share in shares for p in share) == list(range(start, start + 12))
                assert min(map(len, shares)) == 12 // world


@settings(deadline=None, max_examples=80)
@given(PLANS)
def test_an_epoch_holds_every_case_and_patch_once_and_pads_at_its_end(sampler: Sampler) -> None:
    """Each epoch: every case k times with k seeds of its own, then only padding, fewer than one global batch."""
    seeds = []
    for epoch in range(sampler.epochs):
        start = epoch * sampler.epoch_length
        samples = [sampler.sample(p) for p in range(start, start + sampler.epoch_length)]
        real, padding = samples[: sampler.epoch_samples], samples[sampler.epoch_samples :]
        assert Counter(s.case for s in real) == dict.fromkeys(range(sampler.cases), sampler.patches_per_case)
        assert [s.case for s in padding] == [None] * len(padding)
        assert len(padding) < sampler.global_batch
        assert [(s.position, s.epoch) for s in samples] == [(start + i, epoch) for i in range(len(samples))]
        seeds += [s.seed for s in samples]
    assert len(set(seeds)) == sampler.total == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)


@settings(deadline=None, max_examples=80)
@given(PLANS, st.data())
def test_windows_cut_the_stretch_and_need_few_cases(sampler: Sampler, data: st.DataObject) -> None:
    """windows() partitions [low, high) exactly; one window needs at most `window_cases` cases of one epoch."""
    low = data.draw(st.integers(0, sampler.total))
    high = data.draw(st.integers(low, sampler.total))
    windows = sampler.windows(low, high)
    assert [p for window in windows for p in window] == list(range(low, high))
    for window in windows:
        samples = [sampler.sample(p) for p in window]
        assert len({s.case for s in samples} - {None}) <= sampler.window_cases
        assert len({s.epoch for s in samples}) == 1
    assert len(sampler.windows(0, sampler.total)) == sampler.epochs * -(-sampler.cases // sampler.window_cases)


@settings(deadline=None, max_examples=60)
@given(PLANS, st.integers(1, 4), st.data())
def test_stretches_chain_from_any_step_to_the_end(sampler: Sampler, windows: int, data: st.DataObject) -> None:
    """From any step boundary the stretches follow each other to `total`, each ending a global step."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(samplers, "SEGMENT_WINDOWS", windows)
        cursor = sampler.global_batch * data.draw(st.integers(0, sampler.total // sampler.global_batch - 1))
        while cursor < sampler.total:
            low, high = sampler.segment(cursor)
            assert low == cursor < high <= sampler.total
            assert high % sampler.global_batch == 0
            assert len(sampler.windows(low, high)) <= windows + 2 + 2 * (
                sampler.global_batch // sampler.window_samples + 1
            )
            cursor = high
    assert cursor == sampler.total


def test_pinned_samples_and_draws() -> None:
    """Values that must never change: a resumed run of an older version would silently train on another order."""
    assert [GOLDEN.sample(p).case for p in range(24)] == GOLDEN_CASES
    assert [GOLDEN.sample(p).seed for p in (0, 11, 12)] == GOLDEN_SEEDS
    assert draw(3, "crop", 10)[::3] == GOLDEN_DRAWS


def test_a_fresh_process_gives_the_same_samples() -> None:
    """Neither the hash seed nor what was asked before matters, nor the order of asking."""
    code = "from raytrain_brats.data.sampler import Sampler; p = {!r}; print([p.sample(i) for i in range(23, -1, -1)])"
    fresh = subprocess.run([sys.executable, "-c", code.format(GOLDEN)], capture_output=True, text=True, check=True)
    assert fresh.stdout.strip() == str([GOLDEN.sample(i) for i in range(23, -1, -1)])


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    """Every epoch and every seed shuffles anew, and case order is not kept within a window."""
    orders = set()
    for seed in range(4):
        sampler = Sampler(seed, 50, 5, 2, 4, 4)
        orders |= {tuple(sampler.sample(e * 100 + i).case for i in range(100)) for e in range(4)}
    assert len(orders) == 16
    first = [sampler.sample(i).case for i in range(8)]
    assert any(first[i] != first[i + 1] for i in range(0, 8, 2)), "patches of one case are mixed among others"


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
