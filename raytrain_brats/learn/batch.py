"""A rank's share of one global step, as the network's input: normalised, augmented. Runs in a worker.

In: samples whose voxels lie on the device; a few numbers of each on the host.
Out: normalised, augmented images and region targets on the device.

Nothing here waits for the device. A step copies one small array to it (`upload`); what is read back goes through pinned
memory (`to_host`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from raytrain_brats import augmentation, parts
from raytrain_brats.augmentation import Draws, Triple
from raytrain_brats.config import Augment
from raytrain_brats.learn.augment import augment as augment_fully
from raytrain_brats.parts import OwnPart

DRAWS = 11
"""Numbers that a sample's `light` augmentation uses: 3 flips, 4 scales, 4 shifts."""
_CHANNELS = 4
_WIDTH = 2 * _CHANNELS + 1 + DRAWS


@dataclass(frozen=True)
class DeviceSample:
    place: int
    """Index in the global step, from 0."""
    image_czyx: Tensor
    """As stored: int16 or float16, depending on the case. On the device; a view of the case's box. The patch, or what
    `augmentation.cut` says of one that is rotated or scaled."""
    label_zyx: Tensor
    """Label values of the run's convention. Likewise."""
    mean_c: Sequence[float]
    std_c: Sequence[float]
    """Of the case's own nonzero voxels, by modality."""
    weight: float
    """0 for padding and invalid cases: the sample adds nothing, and keeps the step's shape."""
    draws: Draws
    """Numbers from the sample's own seed: the same on any rank."""
    start_zyx: Triple = (0, 0, 0)
    """Where the patch begins within the voxels, unless it is rotated or scaled."""


@dataclass(frozen=True)
class Batch:
    samples: tuple[DeviceSample, ...]
    bad: int = 0
    """Samples among these whose case is invalid."""
    fingerprint: int = 0
    """Sum of the samples' fingerprints: it proves that each arrived once."""


def upload(sums: Sequence[float], samples: Sequence[DeviceSample], device: torch.device) -> tuple[Tensor, Tensor]:
    """(the sums in float64, float32 numbers of each sample), by one copy to the device."""
    rows = [[*s.mean_c, *s.std_c, s.weight, *s.draws("augment", DRAWS)] for s in samples]
    flat = [*sums, *(number for row in rows for number in row)]
    there = torch.tensor(flat, dtype=torch.float64, pin_memory=device.type == "cuda").to(device, non_blocking=True)
    return there[: len(sums)], there[len(sums) :].view(-1, _WIDTH).float()


def to_host(there: Tensor) -> tuple[Tensor, Callable[[], None]]:
    """(a copy on the host, what waits until it has arrived)."""
    if not there.is_cuda:
        return there, lambda: None
    here = torch.empty(there.shape, dtype=there.dtype, pin_memory=True).copy_(there, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record()
    return here, arrived.synchronize


def gather(samples: Sequence[DeviceSample], options: Augment) -> tuple[Tensor, Tensor]:
    """Float32 (b, 4, z, y, x) images as stored and (b, z, y, x) label values, cut out of the cases' boxes and flipped:
    the host knows both."""
    axes = [flip(sample.draws("augment", DRAWS), options) for sample in samples]
    images = torch.stack([s.image_czyx.flip(a).float() for s, a in zip(samples, axes, strict=True)])
    labels = torch.stack([s.label_zyx.flip([axis - 1 for axis in a]) for s, a in zip(samples, axes, strict=True)])
    return images, labels


def finish(
    images: Tensor, labels: Tensor, numbers: Tensor, table: Tensor, options: Augment
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalised, augmented (b, 4, z, y, x) images, (b, 3, z, y, x) targets, (b,) weights; shapes never change, so it
    can be compiled. `table` is the convention's (3, 256)."""
    mean, std, weight, draws = numbers.split([_CHANNELS, _CHANNELS, 1, DRAWS], dim=1)
    image = augment(normalise(images, mean, std), draws, options)
    return image, to_regions(labels, table), weight[:, 0]


def make(
    samples: Sequence[DeviceSample],
    numbers: Tensor,
    table: Tensor,
    options: Augment,
    size: Triple,
    finish: Callable[..., tuple[Tensor, Tensor, Tensor]] = finish,
) -> tuple[Tensor, Tensor, Tensor]:
    """Float32 (b, 4, *size) images and (b, 3, *size) targets, (b,) weights. `numbers` are those of `upload`; `table` is
    the convention's (3, 256); `finish` may be compiled.

    `full` goes sample by sample: what happens to one, and the shapes, differ from what happens to the next, so there is
    nothing to compile. So does an augmentation of one's own, which follows.
    """
    weights = numbers[:, 2 * _CHANNELS]
    if options.kind == "full":
        made = [fully_augmented(s, n, table, options, size) for s, n in zip(samples, numbers, strict=True)]
    else:
        images, targets, weights = finish(*gather(samples, options), numbers, table, options)
        if options.own is None:
            return images, targets, weights
        made = list(zip(images, targets, strict=True))
    if options.own is not None:
        made = [augment_by_own(options.own, *pair, s) for pair, s in zip(made, samples, strict=True)]
    return torch.stack([image for image, _ in made]), torch.stack([regions for _, regions in made]), weights


def augment_by_own(
    part: OwnPart, image_czyx: Tensor, regions_rzyx: Tensor, sample: DeviceSample
) -> tuple[Tensor, Tensor]:
    """One's own augmentation of one sample, from the sample's own numbers."""

    def draws(purpose: str, count: int) -> list[float]:
        return sample.draws(f"own/{purpose}", count)  # so that no name meets one of ours

    image, regions = parts.function(part, "train.augment.own", 3)(image_czyx, regions_rzyx, draws)
    return image, regions


def fully_augmented(
    sample: DeviceSample, numbers: Tensor, table: Tensor, options: Augment, size: Triple
) -> tuple[Tensor, Tensor]:
    """(4, *size) image and (3, *size) regions of a sample, by nnU-Net's list."""
    mean, std = (v[:, None, None, None] for v in (numbers[:_CHANNELS], numbers[_CHANNELS : 2 * _CHANNELS]))
    image, regions = sample.image_czyx.float(), to_regions(sample.label_zyx[None], table)[0]
    outside = image == 0
    image = image.sub(mean).div_(std).masked_fill_(outside, 0.0)  # `normalise`, in less than half of its time on CPUs
    return augment_fully(image, regions, augmentation.drawn(sample.draws, options.flip), size, sample.start_zyx)


def normalise(image_bczyx: Tensor, mean_bc: Tensor, std_bc: Tensor) -> Tensor:
    """(x - mean) / std where x is not zero; the background stays zero (MONAI's NormalizeIntensity nonzero)."""
    image = image_bczyx.float()
    mean, std = (v[..., None, None, None] for v in (mean_bc, std_bc))
    return torch.where(image != 0, (image - mean) / std, image)


def to_regions(label_bzyx: Tensor, table: Tensor) -> Tensor:
    """(b, 3, z, y, x) float32 from label values and the convention's (3, 256) table."""
    return table[:, label_bzyx.long()].transpose(0, 1).float()


def flip(draws: list[float], options: Augment) -> list[int]:
    """The axes of a (c, z, y, x) sample that are reversed."""
    flips = options.flip and options.kind != "off"
    return [axis for axis, u in zip((1, 2, 3), draws[:3], strict=True) if u < 0.5] if flips else []


def augment(image_bczyx: Tensor, draws_bn: Tensor, options: Augment) -> Tensor:
    """Scale and shift the intensities of each normalised sample by its own draws; zeros stay."""
    if options.kind == "off":
        return image_bczyx
    scale, shift = draws_bn[:, 3:7, None, None, None], draws_bn[:, 7:11, None, None, None]
    scale, shift = 1 + options.scale * (2 * scale - 1), options.shift * (2 * shift - 1)
    return torch.where(image_bczyx != 0, image_bczyx * scale + shift, image_bczyx)
