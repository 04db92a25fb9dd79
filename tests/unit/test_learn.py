"""Network, loss, augmentation, inference and metrics: no coupling of samples, and the numbers of plain references."""

from typing import Any

import numpy as np
import pytest
import torch
from monai.transforms.intensity.array import NormalizeIntensity
from scipy import ndimage
from scipy.spatial.distance import cdist

from raytrain_brats import labels
from raytrain_brats.config import Augment, Config, Optimiser, parse, patch_divisor
from raytrain_brats.learn import model
from raytrain_brats.learn.batch import DRAWS, DeviceSample, augment, finish, gather, normalise, to_regions, upload
from raytrain_brats.learn.inference import probabilities, to_masks
from raytrain_brats.schedule import learning_rate
from raytrain_brats.scoring import metrics

NETWORKS: dict[str, dict[str, Any]] = {
    "segresnet": {"name": "segresnet", "init_filters": 8, "blocks_down": [1, 1, 1], "blocks_up": [1, 1]},
    "dynunet": {"name": "dynunet", "filters": [4, 8, 8]},
    "heads": {"name": "dynunet", "filters": [4, 8, 8], "heads": 1},
    "mednext": {"name": "mednext", "init_filters": 4, "blocks": [1, 1, 1], "expansion": [2, 3, 4], "heads": 2},
    "unet": {"name": "unet", "channels": [4, 8, 8]},
}
RNG = np.random.RandomState(0)


def config(network: str, seed: int = 0) -> Config:
    return parse({"network": NETWORKS[network], "train": {"seed": seed}}, "test")


def test_loss_of_a_sample_does_not_depend_on_its_batch_mates() -> None:
    """The losses of a batch are those of its samples one by one."""
    logits, regions = torch.randn(5, 3, 4, 5, 6), (torch.rand(5, 3, 4, 5, 6) < 0.3).float()
    regions[1] = 0
    alone = torch.cat([model.sample_losses(logits[i : i + 1], regions[i : i + 1]) for i in range(5)])
    torch.testing.assert_close(model.sample_losses(logits, regions), alone, rtol=1e-5, atol=0)


def test_loss_is_soft_dice_plus_cross_entropy() -> None:
    """The loss equals the formula written in numpy, for float16 logits too, computed in float32."""
    logits = torch.randn(2, 3, 4, 4, 4).half()
    regions = (torch.rand(2, 3, 4, 4, 4) < 0.3).float()
    x, t = logits.double().numpy(), regions.double().numpy()
    p, voxels = 1 / (1 + np.exp(-x)), (2, 3, 4)
    overlap = (2 * (p * t).sum(voxels) + 1e-5) / ((p**2).sum(voxels) + (t**2).sum(voxels) + 1e-5)
    entropy = -(t * np.log(p) + (1 - t) * np.log(1 - p))
    expected = (1 - overlap).mean(1) + entropy.mean((1, 2, 3, 4))
    losses = model.sample_losses(logits, regions)
    assert losses.dtype == torch.float32
    np.testing.assert_allclose(losses.numpy(), expected, rtol=1e-5)


@pytest.mark.parametrize("name", NETWORKS)
def test_initial_weights_are_a_function_of_the_seed(name: str) -> None:
    """The same seed gives the same weights, another one others; the process's own random state stays as it was."""
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first, again, other = (model.build_network(config(name, seed)).state_dict() for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert any(not torch.equal(first[key], other[key]) for key in first)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("training", [True, False])
def test_network_does_not_couple_samples(name: str, training: bool) -> None:
    """(b, 4, z, y, x) becomes (b, 3, z, y, x), and a sample's logits are the same alone and in a batch; heads beside
    them at half the size each, in training only."""
    assert patch_divisor(config(name)) == 4
    network, batch = model.build_network(config(name)).train(training), torch.randn(3, 4, 8, 12, 16)
    batch[1] *= 50
    with torch.no_grad():
        together, *alone = (network(batch[i:j]) for i, j in ((0, 3), (0, 1), (1, 2), (2, 3)))
    heads = NETWORKS[name].get("heads", 0) if training else 0
    assert isinstance(together, list) == bool(heads)
    outputs = [[made] if isinstance(made, torch.Tensor) else made for made in (together, *alone)]
    assert [o.shape for o in outputs[0]] == [(3, 3, 8 >> n, 12 >> n, 16 >> n) for n in range(1 + heads)]
    for whole, *parts in zip(*outputs, strict=True):
        torch.testing.assert_close(whole, torch.cat(parts), rtol=1e-4, atol=1e-5)


def test_normalise_equals_monai() -> None:
    """With an image's own statistics it is NormalizeIntensity(nonzero, channel_wise), an empty channel included."""
    image = RNG.randint(-5, 200, (4, 6, 7, 8)).astype(np.int16) * (RNG.rand(4, 6, 7, 8) < 0.6)
    image[3] = 0
    inside = [channel[channel != 0] for channel in image[:3].astype(np.float64)]
    mean = torch.tensor([[*(float(v.mean()) for v in inside), 0.0]])
    std = torch.tensor([[*(float(v.std()) for v in inside), 1.0]])
    expected = NormalizeIntensity(nonzero=True, channel_wise=True)(torch.from_numpy(image.astype(np.float32)))
    found = normalise(torch.from_numpy(image)[None], mean, std)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found[0].numpy(), np.asarray(expected), atol=1e-5)
    assert not found[0].numpy()[image == 0].any()


@pytest.mark.parametrize("convention", labels.CONVENTIONS)
def test_regions_on_the_device_are_those_of_labels(convention: str) -> None:
    """The training target is labels.to_regions, batch by batch, for every convention."""
    label = RNG.choice(labels.allowed_values(convention), (3, 4, 5, 6)).astype(np.uint8)
    found = to_regions(torch.from_numpy(label), torch.from_numpy(labels.region_table(convention)))
    assert found.dtype == torch.float32
    for one, regions in zip(label, found.numpy(), strict=True):
        assert np.array_equal(regions.astype(bool), labels.to_regions(one, convention))


def _drawn(value: float) -> list[list[float]]:
    return [[value] * DRAWS]


def made(image: torch.Tensor, label: torch.Tensor, draws: list[list[float]], options: Augment) -> Any:
    """Images and regions of a batch whose cases have mean 0 and deviation 1."""
    samples = [
        DeviceSample(place, x, y, [0.0] * 4, [1.0] * 4, 1.0, lambda purpose, count, mine=mine: mine)
        for place, (x, y, mine) in enumerate(zip(image, label, draws, strict=True))
    ]
    _, numbers = upload([], samples, torch.device("cpu"))
    return finish(*gather(samples, options), numbers, torch.from_numpy(labels.region_table("msd")), options)[:2]


def test_augmentation_is_a_function_of_the_draws() -> None:
    """Same draws, same patch, whatever the batch mates or the global random state; other draws, another patch."""
    image, label = torch.randn(2, 4, 3, 4, 5), torch.randint(0, 4, (2, 3, 4, 5), dtype=torch.uint8)
    draws = RNG.rand(2, DRAWS).tolist()
    both = made(image, label, draws, Augment())
    torch.manual_seed(99)
    second = made(image[1:], label[1:], draws[1:], Augment())
    other = made(image[1:], label[1:], draws[:1], Augment())
    assert torch.equal(both[0][1:], second[0]) and torch.equal(both[1][1:], second[1])
    assert not torch.equal(other[0], second[0])


@pytest.mark.parametrize("axes", [(), (0,), (1,), (2,), (0, 2), (0, 1, 2)])
def test_flips_move_image_and_regions_alike(axes: tuple[int, ...]) -> None:
    """A draw below one half flips its axis, of image and target; none flips when the option is off."""
    image, label = torch.randn(1, 4, 3, 4, 5), torch.randint(0, 4, (1, 3, 4, 5), dtype=torch.uint8)
    draws = [[0.2 if axis in axes else 0.7 for axis in range(3)] + [0.5] * 8]
    flipped, target = made(image, label, draws, Augment())
    still, regions = made(image, label, draws, Augment(flip=False))
    assert torch.equal(flipped, image.flip([2 + axis for axis in axes]))
    assert torch.equal(target, regions.flip([2 + axis for axis in axes]))
    assert torch.equal(still, image)


def test_scale_and_shift_stay_in_their_range_and_off_the_background() -> None:
    """Intensities become x (1 + s) + t with s, t within the options, one pair per modality; zeros stay zero."""
    options, image = Augment(flip=False, scale=0.2, shift=0.3), torch.zeros(1, 4, 2, 2, 2)
    image[0, :, 0, 0] = torch.tensor([1.0, 3.0])
    pairs = []
    for draws in (*RNG.rand(200, DRAWS).tolist(), *_drawn(0.0), *_drawn(1 - 2**-53)):
        found = augment(image, torch.tensor([draws]), options)
        assert not found[image == 0].any()
        low, high = found[0, :, 0, 0].T
        pairs += list(zip((high - low) / 2 - 1, low - (high - low) / 2, strict=True))
    scales, shifts = np.array(pairs).T
    assert -0.2 - 1e-5 <= scales.min() < -0.19 and 0.19 < scales.max() <= 0.2 + 1e-5
    assert -0.3 - 1e-5 <= shifts.min() < -0.29 and 0.29 < shifts.max() <= 0.3 + 1e-5
    assert abs(scales.mean()) < 0.02 and abs(shifts.mean()) < 0.03
    assert abs(np.corrcoef(scales, shifts)[0, 1]) < 0.2 and len(set(scales[:4])) == 4


@pytest.mark.parametrize("total", [1, 7, 1000])
@pytest.mark.parametrize("share", [0.0, 0.1, 1.0])
def test_learning_rate_rises_then_falls_to_nothing(total: int, share: float) -> None:
    """Positive, never above the peak, rising in the warm-up, falling afterwards, near zero at the end."""
    options = Optimiser(warmup_share=share)
    rates = np.array([learning_rate(options, seen, total) for seen in range(total)])
    warmup = int(np.ceil(share * total))
    assert rates.min() > 0 and rates.max() <= options.learning_rate
    assert (np.diff(rates[:warmup]) > 0).all() and (np.diff(rates[warmup:]) < 0).all()
    assert share == 1 or total == 1 or learning_rate(options, total, total) < 1e-9
    assert total < 1000 or share == 1 or rates[-1] < 1e-4 * options.learning_rate


def test_the_other_schedules() -> None:
    """Polynomial as nnU-Net's, by samples; constant after the warm-up."""
    poly, constant = (Optimiser(schedule=name, warmup_share=0.1) for name in ("poly", "constant"))
    for seen in (100, 300, 999):
        done = (seen - 100) / 900
        assert learning_rate(poly, seen, 1000) == pytest.approx(3e-4 * (1 - done) ** 0.9)
        assert learning_rate(constant, seen, 1000) == 3e-4
    assert learning_rate(poly, 1000, 1000) == 0
    assert learning_rate(poly, 50, 1000) == learning_rate(constant, 50, 1000) < 1.6e-4


class Identity(torch.nn.Module):
    """Logits are the normalised intensities of three modalities; `windows` are the shapes it saw."""

    windows: set[tuple[int, ...]] = set()  # noqa: RUF012 - emptied by the test

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        assert not self.training
        self.windows.add(tuple(image.shape[2:]))
        return image[:, :3]


@pytest.mark.parametrize("shape", [(9, 17, 5), (8, 8, 8), (3, 4, 2), (20, 7, 31)])
@pytest.mark.parametrize("patch_xyz", [(8, 8, 8), (4, 8, 16)])
def test_probabilities_stand_where_the_voxels_are(shape: tuple[int, ...], patch_xyz: tuple[int, int, int]) -> None:
    """No flip, no shift, no change of axes, for images larger and smaller than the patch; the background is zero."""
    image = RNG.randint(0, 5, (4, *shape)).astype(np.int16)
    mean, std = (1.0, 2.0, 0.5, 0.0), (2.0, 1.0, 3.0, 1.0)
    Identity.windows.clear()
    found = probabilities(Identity(), image, mean, std, patch_xyz, 0.5, torch.device("cpu")).numpy()
    centred = (image[:3] - np.reshape(mean[:3], (3, 1, 1, 1))) / np.reshape(std[:3], (3, 1, 1, 1))
    expected = 1 / (1 + np.exp(-np.where(image[:3] != 0, centred, 0)))
    assert found.dtype == np.float32 and Identity.windows == {patch_xyz[::-1]}
    np.testing.assert_allclose(found, expected, atol=1e-5)


def _inferred(network: torch.nn.Module, image: Any, mirror: bool) -> Any:
    statistics = (1.0, 2.0, 0.5, 0.0), (2.0, 1.0, 3.0, 1.0)
    return probabilities(network, image, *statistics, (8, 8, 8), 0.5, torch.device("cpu"), mirror=mirror).numpy()


def test_mirroring_is_the_mean_of_the_logits_of_eight_views() -> None:
    """As eight runs of mirrored images, turned back, logits averaged; by a network that tells left from right."""
    network, image = model.build_network(config("segresnet")), RNG.randint(0, 5, (4, 8, 10, 8)).astype(np.int16)
    logits = []
    for axes in ((), (1,), (2,), (3,), (1, 2), (1, 3), (2, 3), (1, 2, 3)):
        alone = np.flip(_inferred(network, np.flip(image, axes).copy(), mirror=False), axes).astype(np.float64)
        logits.append(np.log(alone / (1 - alone)))
    expected = 1 / (1 + np.exp(-np.mean(logits, axis=0)))
    found = _inferred(network, image, mirror=True)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert np.abs(found - _inferred(network, image, mirror=False)).max() > 1e-3


def test_mirroring_changes_nothing_for_a_network_that_knows_no_sides() -> None:
    """A network that is mirror-symmetric gives the same with and without."""
    image = RNG.randint(0, 5, (4, 9, 17, 5)).astype(np.int16)
    np.testing.assert_allclose(
        _inferred(Identity(), image, mirror=True), _inferred(Identity(), image, mirror=False), atol=1e-6
    )


def test_masks_are_nested_and_thresholds_are_per_region() -> None:
    """Above its own threshold a voxel is in; what is ET is TC and WT too."""
    found = np.array([[0.6, 0.4, 0.1, 0.1], [0.45, 0.1, 0.1, 0.1], [0.1, 0.1, 0.9, 0.5]], np.float32)
    found = found.reshape(3, 4, 1, 1)
    assert to_masks(found)[..., 0, 0].astype(int).tolist() == [[1, 0, 1, 0], [0, 0, 1, 0], [0, 0, 1, 0]]
    assert to_masks(found, (0.3, 0.4, 0.4))[..., 0, 0].astype(int).tolist() == [
        [1, 1, 1, 1],
        [1, 0, 1, 1],
        [0, 0, 1, 1],
    ]


def _masks(*boxes: tuple[slice, slice, slice] | None, shape: tuple[int, ...] = (8, 9, 10)) -> Any:
    masks = np.zeros((3, *shape), bool)
    for mask, box in zip(masks, boxes, strict=True):
        if box is not None:
            mask[box] = True
    return masks


CUBE, SHIFTED = np.s_[2:4, 2:4, 2:4], np.s_[3:5, 2:4, 2:4]


def test_dice_of_small_masks() -> None:
    """Twice the common voxels over the sum; 1 when both are empty, 0 when one is."""
    assert metrics.dice(_masks(CUBE, CUBE, None), _masks(SHIFTED, CUBE, None)) == {"WT": 0.5, "TC": 1.0, "ET": 1.0}
    assert metrics.dice(_masks(CUBE, None, None), _masks(None, CUBE, None)) == {"WT": 0.0, "TC": 0.0, "ET": 1.0}


def test_hd95_rules_for_empty_regions_and_single_voxels() -> None:
    """0 when both are empty, the grid's diagonal when one is, and plain distances in mm along each axis."""
    one = np.s_[1:2, 1:2, 1:2]
    found = metrics.hd95_mm(_masks(one, None, None), _masks(None, one, None), (1, 1, 1))
    moved = _masks(np.s_[4:5, 1:2, 1:2], np.s_[1:2, 3:4, 1:2], np.s_[1:2, 1:2, 0:1])
    apart = metrics.hd95_mm(_masks(one, one, one), moved, (2.0, 0.5, 3.0))
    assert found == {"WT": metrics.MISSED_MM, "TC": metrics.MISSED_MM, "ET": 0.0}
    assert apart == pytest.approx({"WT": 6.0, "TC": 1.0, "ET": 3.0})


def _hd95(p: Any, t: Any, spacing: tuple[float, ...]) -> float:
    surfaces = [np.argwhere(mask & ~ndimage.binary_erosion(mask)) * spacing for mask in (p, t)]
    distances = cdist(*surfaces)
    return max(float(np.percentile(distances.min(axis), 95)) for axis in (0, 1))


@pytest.mark.parametrize("seed", range(4))
def test_hd95_equals_brute_force(seed: int) -> None:
    """On ragged masks, touching the border too, with unequal voxel edges, it is that of all pairs of surface voxels."""
    random = np.random.RandomState(seed)
    spacing = tuple(random.uniform(0.5, 4, 3).tolist())
    predicted, truth = (
        np.stack([ndimage.gaussian_filter(random.rand(14, 12, 10), s) > 0.5 for s in (1, 1.5, 2)]) for _ in range(2)
    )
    found = metrics.hd95_mm(predicted, truth, spacing)
    expected = [_hd95(p, t, spacing) for p, t in zip(predicted, truth, strict=True)]
    assert list(found.values()) == pytest.approx(expected, rel=1e-4)
