"""nnU-Net's augmentation of one sample on the device that trains. Runs in a worker.

In: a normalised image and its region masks; what was drawn for the sample (`augmentation.Drawn`).
Out: the patch and its regions.

The operations of nnU-Net 2.8.1 (nnUNetTrainer.py:get_training_transforms, batchgeneratorsv2 0.3.6), in its order. They
see one sample, never the batch, and sums are taken in two levels, so the bits depend neither on the batch, its order,
the rank nor the number of threads. What happens is known on the host: nothing waits for the device, no value goes up.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional

from raytrain_brats.augmentation import Drawn, Matrix, Triple

_PIECE = 1 << 16
"""Voxels whose noise is made at a time on a CPU, so that they stay in its cache: 12 times as fast."""
_FACTORS = (0x7FEB352D, 0x846CA68B, 0x9E3779B1)


def augment(
    image_czyx: Tensor, regions_rzyx: Tensor, drawn: Drawn, size: Triple, start: Triple = (0, 0, 0)
) -> tuple[Tensor, Tensor]:
    """Float32 (c, *size) image and (r, *size) regions of a sample whose voxels are those of `augmentation.cut`: without
    a matrix the patch itself. Neither is changed.

    Background, where no modality has a value, is zero afterwards (utils/nnunet_masking.py), and so are voxels outside
    what is given.
    """
    within = image_czyx.any(0) if drawn.matrix or drawn.changes_intensity else None
    if drawn.matrix and within is not None:
        given = torch.cat([image_czyx, regions_rzyx, within[None].float()])
        made = resample(given, drawn.matrix, size, start)
        image, masks = made[: len(image_czyx)], made[len(image_czyx) :] > 0.5
        regions, within = masks[:-1].float(), masks[-1]
    else:
        axes = [axis for axis, mirrored in enumerate(drawn.mirrored) if mirrored]  # spatial/mirroring.py
        image, regions = (x.flip([1 + axis for axis in axes]) for x in (image_czyx, regions_rzyx))
        within = within if within is None else within.flip(axes)
    if within is not None:
        change_intensity(image, drawn)
        image.masked_fill_(~within, 0.0)
    return image, regions


def resample(given_czyx: Tensor, matrix: Matrix, size: Triple, start: Triple) -> Tensor:
    """(c, *size): rotation, scale and mirroring at once (spatial/spatial.py), trilinear, zeros outside.

    Masks are interpolated as the image is and cut at one half afterwards. That is nnU-Net's rule, the largest of the
    interpolated one-hot labels, on all but some 1e-6 of the voxels; nested regions stay nested.
    """
    device, shape = given_czyx.device, given_czyx.shape[1:]
    z, y, x = (torch.arange(n, dtype=torch.float32, device=device) - (n - 1) / 2 for n in size)
    grid = torch.empty((*size, 3), dtype=torch.float32, device=device)
    for axis, row in enumerate(matrix):
        # In grid_sample's unit, 2 / n of a voxel. By broadcasting: affine_grid multiplies matrices, whose sums may be
        # taken in another order for another shape.
        unit = 2 / shape[axis]
        centre = (start[axis] + size[axis] / 2) * unit - 1
        part = (z * (row[0] * unit) + centre)[:, None, None] + (y * (row[1] * unit))[:, None]
        torch.add(part, x * (row[2] * unit), out=grid[..., 2 - axis])
    return functional.grid_sample(given_czyx[None], grid[None], "bilinear", "zeros", align_corners=False)[0]


def change_intensity(image_czyx: Tensor, drawn: Drawn) -> None:
    """All operations but those of space, in place."""
    if drawn.noise:
        add_noise(image_czyx, *drawn.noise)
    for channel, sigmas in zip(image_czyx, drawn.blur, strict=False):
        if sigmas:
            channel.copy_(blurred(channel, sigmas))
    for channel, factor in zip(image_czyx, drawn.brightness, strict=False):  # intensity/brightness.py
        channel.mul_(factor)
    for channel, factor in zip(image_czyx, drawn.contrast, strict=False):
        change_contrast(channel, factor)
    for channel, zoom in zip(image_czyx, drawn.low_resolution, strict=False):
        if zoom:
            channel.copy_(at_low_resolution(channel, zoom))
    for channel, power in zip(image_czyx, drawn.inverted_gamma, strict=False):
        apply_gamma(channel.neg_(), power)
        channel.neg_()
    for channel, power in zip(image_czyx, drawn.gamma, strict=False):
        apply_gamma(channel, power)


def add_noise(image: Tensor, key: int, std: float) -> None:
    """Normal noise of one standard deviation for all modalities (intensity/gaussian_noise.py), in place."""
    flat = image.view(-1)
    piece = _PIECE if image.device.type == "cpu" else len(flat)
    for first in range(0, len(flat), piece):
        part = flat[first : first + piece]
        part.add_(normal(key, first, len(part), image.device), alpha=std)


def normal(key: int, first: int, count: int, device: torch.device) -> Tensor:
    """(count,) numbers of mean 0 and deviation 1, those of the indices from `first` on: a function of (key, index).

    The sum of a hash's four bytes: integers until the last step, so that every device makes the same. Nearly normal
    (kurtosis 2.7), and nothing beyond 3.5.
    """
    bits = hashed(key, first, count, device)
    total = (bits & 255) + ((bits >> 8) & 255) + ((bits >> 16) & 255) + ((bits >> 24) & 255)
    return (total - 510).float() * (1 / math.sqrt(4 * (256**2 - 1) / 12))


def hashed(key: int, first: int, count: int, device: torch.device) -> Tensor:
    """(count,) int32 hashes of (key, index): Wellons' lowbias32 with 64 bits of key and a round more."""
    bits = torch.arange(first, first + count, dtype=torch.int32, device=device) + _int32(key)
    for shift, factor in ((16, _FACTORS[0]), (15, _FACTORS[1])):
        bits = _folded(bits, shift).mul_(_int32(factor))
    bits = _folded(bits, 16) ^ _int32(key >> 32)
    return _folded(bits.mul_(_int32(_FACTORS[2])), 15)


def _folded(bits: Tensor, shift: int) -> Tensor:
    # >> of a negative int32 brings ones in: they are masked out.
    return ((bits >> shift) & ((1 << (32 - shift)) - 1)).bitwise_xor_(bits)


def _int32(number: int) -> int:
    number &= 0xFFFFFFFF
    return number - (1 << 32) if number >> 31 else number


def taps(sigma: float) -> list[float]:
    """Weights of a Gaussian, 3 to 7 of them for nnU-Net's sigmas, by its rule (noise/gaussian_blur.py)."""
    wanted = sigma * 6 + 0.5
    count = round(wanted)
    if count % 2 == 0:
        count += 1 if wanted >= count else -1
    weights = [math.exp(-0.5 * ((i - count // 2) / sigma) ** 2) for i in range(count)]
    return [weight / sum(weights) for weight in weights]


def blurred(channel_zyx: Tensor, sigmas: tuple[float, float, float]) -> Tensor:
    """One axis after the other, mirrored at the edges (noise/gaussian_blur.py), by sums of shifted copies."""
    made = channel_zyx
    for axis, sigma in enumerate(sigmas):
        weights, count = taps(sigma), made.shape[axis]
        half = len(weights) // 2
        # Indices instead of padding: an edge narrower than the weights is mirrored again and again.
        period = max(1, 2 * (count - 1))
        low = [made.narrow(axis, _mirrored(i, count, period), 1) for i in range(-half, 0)]
        high = [made.narrow(axis, _mirrored(i, count, period), 1) for i in range(count, count + half)]
        padded = torch.cat([*low, made, *high], axis)
        total = made * weights[half]
        for k in range(1, half + 1):
            pair = padded.narrow(axis, half - k, count) + padded.narrow(axis, half + k, count)
            total.add_(pair, alpha=weights[half - k])
        made = total
    return made


def _mirrored(index: int, count: int, period: int) -> int:
    return count - 1 - abs(count - 1 - index % period)


def change_contrast(channel_zyx: Tensor, factor: float) -> None:
    """Stretch about the mean, within the old range (intensity/contrast.py), in place."""
    low, high = torch.aminmax(channel_zyx)
    mean = mean_of(channel_zyx)
    channel_zyx.sub_(mean).mul_(factor).add_(mean).clamp_(low, high)


def at_low_resolution(channel_zyx: Tensor, zoom: float) -> Tensor:
    """Fewer voxels by nearest, and back by trilinear interpolation (spatial/low_resolution.py)."""
    size = [max(1, round(n * zoom)) for n in channel_zyx.shape]
    fewer = functional.interpolate(channel_zyx[None, None], size, mode="nearest-exact")
    return functional.interpolate(fewer, channel_zyx.shape, mode="trilinear")[0, 0]


def apply_gamma(channel_zyx: Tensor, power: float) -> None:
    """Power of what was scaled to [0, 1], with mean and deviation as before (intensity/gamma.py), in place."""
    mean = mean_of(channel_zyx)
    std = _std_of(channel_zyx - mean)
    low, high = torch.aminmax(channel_zyx)
    span = (high - low).clamp_min(1e-7)
    channel_zyx.sub_(low).div_(span).pow_(power).mul_(span).add_(low)
    channel_zyx.sub_(mean_of(channel_zyx))
    channel_zyx.mul_(std / _std_of(channel_zyx).clamp_min(1e-7)).add_(mean)


def mean_of(channel_zyx: Tensor) -> Tensor:
    """The mean, the same bits with any number of threads: a sum of sums, as torch splits one long sum among threads."""
    return channel_zyx.flatten(1).sum(1).sum() / channel_zyx.numel()


def _std_of(centred_zyx: Tensor) -> Tensor:
    return (centred_zyx.square().flatten(1).sum(1).sum() / max(1, centred_zyx.numel() - 1)).sqrt()
