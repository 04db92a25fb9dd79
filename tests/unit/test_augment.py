"""nnU-Net's list on the device: the numbers of plain references, and bits that depend on the sample alone."""

import dataclasses
import math
from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from scipy import ndimage

from raytrain_brats import augmentation, labels
from raytrain_brats.augmentation import Drawn, Odds, cut, drawn
from raytrain_brats.config import Augment
from raytrain_brats.data.sampler import draw
from raytrain_brats.learn import augment as operations
from raytrain_brats.learn.augment import augment
from raytrain_brats.learn.batch import DeviceSample, fully_augmented, make, upload
from tests.support.steps import CPU, OPERATIONS, odds

FULL = Augment(kind="full")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def with_odds(monkeypatch: pytest.MonkeyPatch, given: Odds) -> None:
    monkeypatch.setattr(augmentation, "NNUNET", given)


def drawn_of(seed: int) -> Drawn:
    return drawn(partial(draw, seed))


def head(edge: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Four contrasts of a ball with nested regions, zero outside."""
    random = np.random.RandomState(seed)
    at = np.stack(np.meshgrid(*[np.linspace(-1, 1, edge)] * 3, indexing="ij"))
    from_centre = ((at - random.uniform(-0.2, 0.2, (3, 1, 1, 1))) ** 2).sum(0)
    regions = np.stack([from_centre < r for r in (0.3, 0.15, 0.05)])
    image = random.randn(4, edge, edge, edge) * 0.3 + regions.sum(0) * 0.7 + 0.5
    image = image * ((at**2).sum(0) < 0.8)
    return torch.tensor(image, dtype=torch.float32), torch.tensor(regions, dtype=torch.float32)


# --- what is drawn


def test_one_more_operation_changes_no_other_ones_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """What an operation does to a sample is the same whether all the others happen or none."""
    for seed in range(5):
        with_odds(monkeypatch, odds(1))
        every = dataclasses.asdict(drawn_of(seed))
        for name in OPERATIONS[2:]:
            with_odds(monkeypatch, odds(0, **{name: 1.0}))
            alone = dataclasses.asdict(drawn_of(seed))
            key = {"mirror": "mirrored"}.get(name, name)
            assert alone[key] == every[key] and alone[key]
            assert not any(np.any(value) for other, value in alone.items() if other != key and value is not None)
        with_odds(monkeypatch, odds(0, rotation=1.0))
        turned = np.array(drawn_of(seed).matrix)
        with_odds(monkeypatch, odds(0, scale=1.0))
        scaled = np.array(drawn_of(seed).matrix)
        both = turned @ scaled @ np.diag(1 - 2.0 * np.array(every["mirrored"]))
        np.testing.assert_allclose(both, np.array(every["matrix"]), atol=1e-12)


def test_odds_and_ranges_are_nnunets() -> None:
    """By many samples: how often each operation happens, and between which numbers; half of the factors below 1."""
    found = [drawn_of(seed) for seed in range(4000)]

    def share(happens: Any) -> float:
        return float(np.mean([bool(happens(one)) for one in found]))

    shares = {"noise": 0.1, "blur": 0.2, "brightness": 0.15, "contrast": 0.15, "low_resolution": 0.25}
    for name, wanted in (shares | {"inverted_gamma": 0.1, "gamma": 0.3}).items():
        assert share(lambda one, name=name: getattr(one, name)) == pytest.approx(wanted, abs=0.025), name
    assert share(lambda one: one.matrix is None) == pytest.approx(0.64, abs=0.025)
    assert share(lambda one: one.mirrored[1]) == pytest.approx(0.5, abs=0.025)
    ranges = {"brightness": (0.75, 1.25), "contrast": (0.75, 1.25), "gamma": (0.7, 1.5), "inverted_gamma": (0.7, 1.5)}
    for name, (low, high) in ranges.items():
        factors = np.array([factor for one in found for factor in getattr(one, name)])
        assert low <= factors.min() < low + 0.02 and high - 0.02 < factors.max() <= high
        assert np.mean(factors < 1) == pytest.approx(0.5, abs=0.05)
    for name, (low, high) in {"blur": (0.5, 1.0), "low_resolution": (0.5, 1.0)}.items():
        touched = [v for one in found for v in getattr(one, name)]
        values = np.ravel([v for v in touched if v is not None])
        assert low <= values.min() < low + 0.02 and high - 0.02 < values.max() <= high
        assert len([v for v in touched if v]) / len(touched) == pytest.approx(0.5, abs=0.05)
    assert 0.09 < max(one.noise[1] for one in found if one.noise) <= 0.1
    scales = [abs(np.linalg.det(np.array(one.matrix))) ** (1 / 3) for one in found if one.matrix]
    assert 0.7 - 1e-9 <= min(scales) < 0.75 and 1.35 < max(scales) <= 1.4 + 1e-9


# --- space


def moved_by_scipy(array: torch.Tensor, matrix: Any, size: Any, start: Any, order: int = 1) -> Any:
    half = np.array([(n - 1) / 2 for n in size])
    offset = np.array(start) + half - np.array(matrix) @ half
    given = array.double().numpy()
    return ndimage.affine_transform(given, np.array(matrix), offset, tuple(size), order=order, mode="grid-constant")


def test_rotation_scale_and_mirroring_are_scipys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Voxel by voxel, at any place of the patch; masks where the interpolated mask is above one half, nested."""
    with_odds(monkeypatch, odds(0, rotation=1.0, scale=1.0, mirror=0.5))
    size, start = (18, 22, 20), (5, 2, 7)
    for seed in range(6):
        image, regions = head(30, seed)
        moves = drawn_of(seed)
        found, masks = augment(image, regions, moves, size, start)
        brain = moved_by_scipy(image.any(0).float(), moves.matrix, size, start)
        for channel, made in zip(image, found, strict=True):
            wanted = moved_by_scipy(channel, moves.matrix, size, start) * (brain > 0.5)
            np.testing.assert_allclose(made.numpy(), wanted, atol=2e-5)
        for mask, made in zip(regions, masks, strict=True):
            share = moved_by_scipy(mask, moves.matrix, size, start)
            assert np.array_equal(made.numpy() > 0, share > 0.5) or np.abs(share - 0.5).min() < 1e-5
        assert set(masks.unique().tolist()) <= {0.0, 1.0} and masks[2].any()
        assert all((outer >= inner).all() for outer, inner in pairwise(masks))


def test_a_label_goes_where_the_image_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mask carried as a modality and the same as a region come to the same place, also by mirroring alone."""
    for given in (odds(0, rotation=1.0, scale=1.0, mirror=0.5), odds(0, mirror=0.5)):
        with_odds(monkeypatch, given)
        for seed in range(4):
            _, regions = head(20, seed)
            carried = regions[:1].expand(4, -1, -1, -1) + 1e-3
            image, masks = augment(carried, regions, drawn_of(seed), (20, 20, 20))
            assert ((image[0] > 0.5) == (masks[0] > 0)).float().mean() > 0.999


def test_nothing_drawn_leaves_every_bit() -> None:
    """The patch as it is; through the resampler, where nothing moves, but for rounding."""
    image, regions = head(16)
    found, masks = augment(image, regions, Drawn(), (16, 16, 16))
    assert torch.equal(found, image) and torch.equal(masks, regions)
    still = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))
    found, masks = augment(image, regions, Drawn(still), (9, 8, 7), (3, 4, 5))
    inside = np.s_[:, 3:12, 4:12, 5:12]
    assert torch.equal(masks, regions[inside])
    torch.testing.assert_close(found, image[inside], rtol=0, atol=2e-5)


@pytest.mark.parametrize("case", [(30, 40, 34), (16, 16, 60), (8, 5, 3), (16, 1, 20)])
def test_the_cut_holds_all_that_a_moved_patch_needs(case: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within the case, and the same patch as from the whole case; also where the patch is larger than the case."""
    with_odds(monkeypatch, odds(0, rotation=0.5, scale=1.0))
    random, size = np.random.RandomState(0), (16, 18, 12)
    image = torch.tensor(random.rand(4, *case), dtype=torch.float32)
    regions = (torch.tensor(random.rand(3, *case)) < 0.4).float()
    for seed in range(40):
        origin: Any = tuple(int(random.randint(max(0, c - s) + 1)) for c, s in zip(case, size, strict=True))
        moves = drawn_of(seed)
        needed = cut(moves.matrix, origin, size, case)
        assert all(a >= 0 and n > 0 and a + n <= c for a, n, c in zip(needed.low, needed.shape, case, strict=True))
        inside = (slice(None), *(slice(a, a + n) for a, n in zip(needed.low, needed.shape, strict=True)))
        part = augment(image[inside], regions[inside], moves, size, needed.start)
        whole = augment(image, regions, moves, size, origin)
        torch.testing.assert_close(part[0], whole[0], rtol=0, atol=3e-5)
        assert (part[1] == whole[1]).float().mean() > 0.9999


def test_a_sample_needs_a_tenth_more_than_its_patch() -> None:
    """Of a Task01 case, on average; nnU-Net loads 205^3 for 128^3, four times as much."""
    size, case = (128, 128, 128), (138, 169, 138)
    read = []
    for seed in range(2000):
        numbers = partial(draw, seed)
        origin: Any = tuple(int(u * (c - s + 1)) for u, c, s in zip(numbers("crop", 3), case, size, strict=True))
        read.append(math.prod(cut(drawn(numbers).matrix, origin, size, case).shape) / math.prod(size))
    assert np.mean(read) == pytest.approx(1.10, abs=0.02)


# --- intensities


def test_blur_is_a_convolution_with_mirrored_edges() -> None:
    """Axis by axis, with nnU-Net's number of weights; edges narrower than the weights, too."""
    assert [len(operations.taps(sigma)) for sigma in (0.5, 0.6, 0.75, 0.8, 1.0)] == [3, 5, 5, 5, 7]
    for shape in ((9, 8, 7), (2, 1, 3)):
        channel, sigmas = torch.randn(shape), (0.5, 0.77, 1.0)
        wanted = channel.double().numpy()
        for axis, sigma in enumerate(sigmas):
            wanted = ndimage.correlate1d(wanted, operations.taps(sigma), axis, mode="mirror")
        np.testing.assert_allclose(operations.blurred(channel, sigmas).numpy(), wanted, atol=1e-6)


def test_contrast_and_gamma_are_their_formulas() -> None:
    """In float64 by NumPy: contrast within the old range; gamma, of the negated image too, keeps mean and deviation."""
    channel = head(12)[0][0]
    x = channel.double().numpy()
    made = channel.clone()
    operations.change_contrast(made, 1.2)
    np.testing.assert_allclose(made, np.clip((x - x.mean()) * 1.2 + x.mean(), x.min(), x.max()), atol=1e-6)
    for sign, name in ((1, "gamma"), (-1, "inverted_gamma")):
        image = channel[None].repeat(4, 1, 1, 1)
        operations.change_intensity(image, dataclasses.replace(Drawn(), **{name: (1.3, 0.7, 1.0, 1.5)}))
        for made, power in zip(image, (1.3, 0.7, 1.0, 1.5), strict=True):
            y, span = sign * x, x.max() - x.min()
            y = ((y - y.min()) / span) ** power * span + y.min()
            y = sign * ((y - y.mean()) / y.std(ddof=1) * x.std(ddof=1) + sign * x.mean())
            np.testing.assert_allclose(made, y, atol=3e-6)


def test_low_resolution_is_nearest_down_and_linear_up() -> None:
    channel = torch.randn(12, 9, 10)
    small = [round(n * 0.6) for n in channel.shape]
    picks = [np.floor((np.arange(m) + 0.5) * n / m).astype(int) for m, n in zip(small, channel.shape, strict=True)]
    fewer = channel.double().numpy()[np.ix_(*picks)]
    at = [(np.arange(n) + 0.5) * m / n - 0.5 for m, n in zip(small, channel.shape, strict=True)]
    wanted = ndimage.map_coordinates(fewer, np.meshgrid(*at, indexing="ij"), order=1, mode="nearest")
    np.testing.assert_allclose(operations.at_low_resolution(channel, 0.6), wanted, atol=1e-5)


def test_noise_is_normal_and_a_function_of_key_and_voxel(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hash in integers of any size; mean 0, deviation 1, no neighbour and no other key alike; pieces as a whole."""
    key = 123456789012345
    found = operations.hashed(key, 0, 100_000, CPU).tolist()
    for index in (0, 1, 2, 70_000, 99_999):
        v = (index + key) % 2**32
        for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
            v = (v ^ (v >> shift)) * factor % 2**32
        v = (v ^ (v >> 16) ^ (key >> 32)) * 0x9E3779B1 % 2**32
        assert found[index] % 2**32 == v ^ (v >> 15)
    z, other = (operations.normal(int(draw(seed, "noise", 1)[0] * 2**53), 0, 500_000, CPU) for seed in (7, 8))
    assert abs(z.mean()) < 0.005 and abs(z.std() - 1) < 0.005 and 3 < z.abs().max() < 3.5
    for lag in (1, 64, 4096):
        assert abs((z[lag:] * z[:-lag]).mean()) < 0.01 and abs((z[lag:] * other[:-lag]).mean()) < 0.01
    whole, pieces = torch.zeros(2, 4, 9, 8, 7)
    operations.add_noise(whole, key, 0.05)
    monkeypatch.setattr(operations, "_PIECE", 100)
    operations.add_noise(pieces, key, 0.05)
    assert torch.equal(whole, pieces) and whole.std() == pytest.approx(0.05, rel=0.1)


# --- a sample, whatever is beside it


def sample(seed: int, weight: float = 1.0) -> DeviceSample:
    """What a rank has of a sample of 12^3: integers, and more of them where it is moved."""
    random, numbers = np.random.RandomState(seed), partial(draw, seed)
    needed = cut(drawn(numbers).matrix, (4, 0, 2), (12, 12, 12), (20, 16, 18))
    image = random.randint(1, 300, (4, *needed.shape)) * (random.rand(*needed.shape) < 0.8)
    label = random.randint(0, 4, needed.shape).astype(np.uint8)
    mine, theirs = torch.tensor(image.astype(np.int16)), torch.tensor(label)
    return DeviceSample(seed, mine, theirs, [150.0 + seed] * 4, [80.0] * 4, weight, numbers, needed.start)


def batch(samples: list[DeviceSample]) -> Any:
    _, numbers = upload([], samples, CPU)
    return make(samples, numbers, torch.from_numpy(labels.region_table("msd")), FULL, (12, 12, 12))


def test_a_sample_is_the_same_bits_in_any_batch_order_and_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """With every second operation happening. What was given is as it was."""
    with_odds(monkeypatch, odds(0.5))
    given = [sample(seed) for seed in range(10)]
    before = [one.image_czyx.clone() for one in given]
    together = batch(given)
    alone = [batch([one]) for one in given]
    turned = batch(given[::-1])
    torch.set_num_threads(2)
    threaded = batch(given)
    for number in (0, 1):
        assert torch.equal(together[number], torch.cat([one[number] for one in alone]))
        assert torch.equal(together[number], turned[number].flip(0))
        assert torch.equal(together[number], threaded[number])
    assert all(torch.equal(one.image_czyx, old) for one, old in zip(given, before, strict=True))
    assert torch.isfinite(together[0]).all() and together[2].tolist() == [1.0] * 10


def test_sums_do_not_depend_on_the_number_of_threads() -> None:
    """Where torch would split one long sum among threads."""
    channel = torch.randn(48, 48, 48)
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        changed = channel.clone()
        operations.apply_gamma(changed, 1.3)
        operations.change_contrast(changed, 1.2)
        found.append(changed)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_where_nothing_happens_the_patch_is_normalised(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit as without augmentation; also float16, of which `float` makes a copy."""
    with_odds(monkeypatch, odds(0))
    one, table = sample(3), torch.from_numpy(labels.region_table("msd"))
    for stored in (one.image_czyx, one.image_czyx.half(), one.image_czyx.float()):
        before = stored.clone()
        given = [dataclasses.replace(one, image_czyx=stored)]
        _, numbers = upload([], given, CPU)
        full, off = (make(given, numbers, table, Augment(kind=kind), (12, 12, 12)) for kind in ("full", "off"))
        assert all(torch.equal(a, b) for a, b in zip(full, off, strict=True)) and torch.equal(stored, before)


def test_background_stays_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    """Outside the brain nothing appears, whatever happens; of padding and bad cases zeros come, and no NaN."""
    with_odds(monkeypatch, odds(1, rotation=0.0, scale=0.0, mirror=0.0))
    for seed in range(4):
        one = sample(seed)
        image, _, _ = batch([one])
        outside = ~one.image_czyx.any(0)
        assert outside.any() and not image[0, :, outside].any() and image[0, :, ~outside].all(0).float().mean() > 0.99
    with_odds(monkeypatch, odds(1))
    nothing = torch.zeros(4, 12, 12, 12, dtype=torch.int16), torch.zeros(12, 12, 12, dtype=torch.uint8)
    for weight in (0.0, 1.0):  # a case may be without voxels here
        placeholder = dataclasses.replace(sample(3, weight), image_czyx=nothing[0], label_zyx=nothing[1])
        image, regions, weights = batch([placeholder])
        assert not image.any() and not regions.any() and weights.tolist() == [weight]


def test_mirroring_may_be_switched_off() -> None:
    """`train.augment.flip: false` holds for the list, too: no matrix has a negative determinant."""
    for seed in range(40):
        still = drawn(partial(draw, seed), mirror=False)
        assert not any(still.mirrored) and (still.matrix is None or np.linalg.det(np.array(still.matrix)) > 0)
    one, table = sample(1), torch.from_numpy(labels.region_table("msd"))
    _, numbers = upload([], [one], CPU)
    size = (12, 12, 12)
    mirrored, still_too = (
        fully_augmented(one, numbers[0], table, o, size) for o in (FULL, Augment(kind="full", flip=False))
    )
    assert any(drawn_of(1).mirrored) and not torch.equal(mirrored[0], still_too[0])
