"""What augmentation costs: `scripts/bench augment`, each operation and the whole list, beside MONAI and nnU-Net.

In: edges of patches; which peers.
Out: a table on the terminal; with --json the figures, with --page a page of them.

CPU milliseconds of one thread, each thing in turn until it has run for `--seconds`. What a GPU has to read and write is
counted on shapes, on torch's meta device: derived, not measured.
"""

import contextlib
import importlib.metadata
import itertools
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from raytrain_brats import outputs, storage
from raytrain_brats.augmentation import Cut, Drawn, cut, drawn, rotation_and_scale
from raytrain_brats.config import Augment
from raytrain_brats.data.sampler import draw
from raytrain_brats.errors import UserError
from raytrain_brats.labels import region_table
from raytrain_brats.learn.augment import augment, change_intensity
from raytrain_brats.learn.batch import DeviceSample, make, normalise, to_regions, upload
from scripts.bench_augment_page import TITLE, page
from scripts.chaos_campaign.outcome import machine

CPU, META = torch.device("cpu"), torch.device("meta")
PEERS = ("monai", "nnunet")
SEEDS = 4000
"""Samples of which it is counted what they read."""
CASE = (138, 169, 138)
"""Voxels of a Task01 case around its brain, for patches of 128; other patches are cut from a case of this shape."""


@dataclass(frozen=True)
class Options:
    """CPU milliseconds of each operation of `train.augment.kind: full` and of the whole list, one thread."""

    edges: str = "64,128"
    """Voxels along each edge of a patch, comma-separated."""
    seconds: float = 2.0
    """CPU time spent on each operation; the whole list takes six times as long."""
    peers: str = ",".join(PEERS)
    """Comma-separated: MONAI's transforms, nnU-Net's own list (batchgeneratorsv2); "" for none."""
    json: str = ""
    """File for the figures."""
    page: str = ""
    """Markdown file for the same."""
    overwrite: bool = False
    """Also replace files of other settings, or that this command did not write."""


def bench(args: Options) -> None:
    edges, peers = args.edges.split(","), [name for name in args.peers.split(",") if name]
    if wrong := [edge for edge in edges if not (edge.isdigit() and 16 <= int(edge) <= 256)]:
        raise UserError(f"--edges {wrong[0]!r}: write numbers of voxels from 16 to 256, such as 64,128")
    if wrong := [name for name in peers if name not in PEERS]:
        raise UserError(f"--peers {wrong[0]}: not known; there are {', '.join(PEERS)}")
    asked = {name: value for name, value in asdict(args).items() if name in ("edges", "seconds", "peers")}
    made = {"made_by": "scripts/bench augment", "asked": asked}
    for path, option in ((args.json, "--json"), (args.page, "--page")):
        if path:
            outputs.claim_file(path, partial(_ours, made), overwrite=args.overwrite, option=option)
    packages = ("torch", "monai", "batchgeneratorsv2")
    versions = {name: version for name in packages if (version := _version(name))}
    if "nnunet" in peers and "batchgeneratorsv2" not in versions:
        print("nnU-Net's list is left out: batchgeneratorsv2 is not installed")
        peers.remove("nnunet")
    load = os.getloadavg()[0]
    torch.set_num_threads(1)
    sizes = {int(edge): measure(int(edge), args.seconds, peers) for edge in edges}
    about = {"date": time.strftime("%Y-%m-%d"), "machine": machine(), "versions": versions}
    found = made | about | {"load": [round(load, 1), round(os.getloadavg()[0], 1)], "sizes": sizes}
    text = page(found)
    print(text)
    if args.json:
        storage.write_bytes(args.json, (json.dumps(found, indent=1) + "\n").encode())
    if args.page:
        storage.write_bytes(args.page, text.encode())


def _ours(made: dict[str, Any], content: bytes) -> bool:
    with contextlib.suppress(ValueError, AttributeError):
        return bool(made.items() <= json.loads(content).items())
    return content.decode(errors="replace").startswith(TITLE)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def cpu_ms(act: Callable[[], Any], seconds: float) -> float:
    """CPU milliseconds of a call, the first left out."""
    act()
    calls, began = 0, time.process_time()
    while calls < 2 or time.process_time() - began < seconds:
        act()
        calls += 1
    return round((time.process_time() - began) / calls * 1e3, 3)


# --- what is measured


@dataclass(frozen=True)
class Case:
    """Like a case as a rank has it: int16 and labels, a head on zeros; and its patches."""

    edge: int
    image_czyx: Tensor
    label_zyx: Tensor

    @property
    def size(self) -> tuple[int, int, int]:
        return self.edge, self.edge, self.edge

    def cut(self, seed: int) -> Cut:
        """What the sample of this seed reads; its patch may lie anywhere."""
        shape: Any = tuple(self.label_zyx.shape)
        numbers = draw(seed, "crop", 3)
        origin: Any = tuple(int(u * (b - self.edge + 1)) for u, b in zip(numbers, shape, strict=True))
        return cut(rotation_and_scale(partial(draw, seed)), origin, self.size, shape)

    def sample(self, seed: int) -> DeviceSample:
        needed = self.cut(seed)
        inside = tuple(slice(a, a + n) for a, n in zip(needed.low, needed.shape, strict=True))
        image, label = self.image_czyx[(slice(None), *inside)], self.label_zyx[inside]
        numbers = partial(draw, seed)
        return DeviceSample(0, image, label, [450.0] * 4, [260.0] * 4, 1.0, numbers, needed.start)

    @property
    def middle(self) -> tuple[slice, ...]:
        starts = [(n - self.edge) // 2 for n in self.label_zyx.shape]
        return (slice(None), *(slice(a, a + self.edge) for a in starts))

    def patch(self) -> tuple[Tensor, Tensor]:
        """(normalised image, regions) in the middle."""
        table, mean, std = torch.from_numpy(region_table("msd")), torch.full((1, 4), 450.0), torch.full((1, 4), 260.0)
        image = normalise(self.image_czyx[self.middle][None], mean, std)[0]
        return image, to_regions(self.label_zyx[self.middle[1:]][None], table)[0]


def case_of(edge: int) -> Case:
    shape = [round(n * edge / 128) for n in CASE]
    axes = [torch.linspace(-1, 1, n) ** 2 for n in shape]
    far = axes[0][:, None, None] + axes[1][:, None] + axes[2]
    label = (far < 0.25).to(torch.uint8) + (far < 0.12).to(torch.uint8) + (far < 0.05).to(torch.uint8)
    values = torch.randint(50, 900, (4, *shape), generator=torch.Generator().manual_seed(0))
    return Case(edge, (values * (far < 1)).to(torch.int16), label)


ALONE: dict[str, Drawn] = {
    "Gaussian noise": Drawn(noise=(987654321987, 0.05)),
    "blur, 4 modalities": Drawn(blur=((0.6, 0.8, 1.0),) * 4),
    "brightness": Drawn(brightness=(1.1,) * 4),
    "contrast": Drawn(contrast=(1.1,) * 4),
    "low resolution, 4 modalities": Drawn(low_resolution=(0.7,) * 4),
    "gamma": Drawn(gamma=(1.2,) * 4),
}
SPACE = "rotation, scale, mirroring; 3 regions"
MIRROR = "mirroring alone, 3 axes"
READY = "normalisation, regions"
LIGHT, FULL = "`light`, all of it", "`full`, mean over samples"


def ours(case: Case) -> dict[str, Callable[[], Any]]:
    image, regions = case.patch()
    numbers = {"augment/rotation": [0, 0.9, 0.2, 0.8], "augment/scale": [0, 0.4]}
    turned = drawn(lambda purpose, count: numbers.get(purpose, [1.0] * count))
    whole: Any = tuple(case.label_zyx.shape)
    origin: Any = tuple((n - case.edge) // 2 for n in whole)
    needed = cut(turned.matrix, origin, case.size, whole)
    inside = tuple(slice(a, a + n) for a, n in zip(needed.low, needed.shape, strict=True))
    given = case.image_czyx[(slice(None), *inside)].float()
    masks = regions.new_zeros((3, *needed.shape))
    found: dict[str, Callable[[], Any]] = {
        READY: case.patch,
        SPACE: lambda: augment(given, masks, turned, case.size, needed.start),
        MIRROR: lambda: augment(image, regions, Drawn(mirrored=(True, True, True)), case.size),
    }
    for name, parameters in ALONE.items():
        found[name] = lambda parameters=parameters: change_intensity(image.clone(), parameters)
    return found


def whole_list(case: Case, kind: str, seeds: Iterator[int]) -> Callable[[], Any]:
    """A batch of one sample after the other, as a step makes it."""
    table, options = torch.from_numpy(region_table("msd")), Augment.model_validate({"kind": kind})
    middle = case.middle

    def act() -> Any:
        sample = case.sample(next(seeds))
        if kind == "light":  # which needs the patch itself
            sample = replace(sample, image_czyx=case.image_czyx[middle], label_zyx=case.label_zyx[middle[1:]])
        _, numbers = upload([], [sample], CPU)
        return make([sample], numbers, table, options, case.size)

    return act


def monai(case: Case) -> dict[str, Callable[[], Any]]:
    """Its nearest counterparts; always fired. The label map goes by nearest: it has no other way for it."""
    from monai import transforms as mt

    image, regions = case.patch()
    both, modes = ["image", "label"], ["bilinear", "nearest"]
    data = {"image": image, "label": regions.sum(0, keepdim=True)}
    affine = mt.RandAffined(
        both, prob=1, rotate_range=[0.52] * 3, scale_range=[(-0.3, 0.4)] * 3, mode=modes, padding_mode="zeros",
        cache_grid=True, spatial_size=case.size,
    )  # fmt: skip
    flips = [mt.RandFlipd(both, 1, axis) for axis in range(3)]
    noise, blur = mt.RandGaussianNoise(1, std=0.1), mt.RandGaussianSmooth((0.5, 1), (0.5, 1), (0.5, 1), 1)
    scale = mt.RandScaleIntensity(0.25, 1, channel_wise=True)
    contrast = mt.RandScaleIntensityFixedMean(1, (-0.25, 0.25), preserve_range=True)
    low = mt.RandSimulateLowResolution(1, zoom_range=(0.5, 1))
    gamma = mt.RandAdjustContrast(1, (0.7, 1.5), retain_stats=True)
    return {
        SPACE: lambda: affine(data),
        MIRROR: lambda: flips[2](flips[1](flips[0](data))),
        "Gaussian noise": lambda: noise(image),
        "blur, 4 modalities": lambda: blur(image),
        "brightness": lambda: scale(image),
        "contrast": lambda: contrast(image),
        "low resolution, 4 modalities": lambda: low(image),
        "gamma": lambda: gamma(image),
    }


def nnunet(case: Case) -> Callable[[], Any]:
    """Its list of classes with its numbers (2.8.1, nnUNetTrainer.py:get_training_transforms), from the patch that it
    loads for the rotation's sake (compute_initial_patch_size.py)."""
    from batchgeneratorsv2.transforms.intensity import brightness, contrast, gamma, gaussian_noise
    from batchgeneratorsv2.transforms.noise.gaussian_blur import GaussianBlurTransform
    from batchgeneratorsv2.transforms.spatial import low_resolution, mirroring, spatial
    from batchgeneratorsv2.transforms.utils import compose, nnunet_masking, random, remove_label, seg_to_regions

    factors, powers = (contrast.BGContrast(r) for r in ((0.75, 1.25), (0.7, 1.5)))
    angles = (-math.pi / 6, math.pi / 6)

    def gammas(inverted: int) -> Any:
        return gamma.GammaTransform(powers, inverted, synchronize_channels=False, p_per_channel=1, p_retain_stats=1)

    sometimes = (
        (gaussian_noise.GaussianNoiseTransform((0, 0.1), 1, synchronize_channels=True), 0.1),
        (GaussianBlurTransform((0.5, 1.0), False, False, p_per_channel=0.5, benchmark=True), 0.2),
        (brightness.MultiplicativeBrightnessTransform(factors, False, 1), 0.15),
        (contrast.ContrastTransform(factors, True, False, 1), 0.15),
        (low_resolution.SimulateLowResolutionTransform((0.5, 1), False, True, None, None, 0.5), 0.25),
        (gammas(1), 0.1),
        (gammas(0), 0.3),
    )
    steps = [
        spatial.SpatialTransform(
            case.size, 0, False, p_rotation=0.2, rotation=angles, p_scaling=0.2, scaling=(0.7, 1.4),
            p_synchronize_scaling_across_axes=1,
        ),
        *(random.RandomTransform(transform, apply_probability=p) for transform, p in sometimes),
        mirroring.MirrorTransform((0, 1, 2)),
        nnunet_masking.MaskImageTransform([0, 1, 2, 3]),
        remove_label.RemoveLabelTansform(-1, 0),
        seg_to_regions.ConvertSegmentationToRegionsTransform([(1, 2, 3), (2, 3), (3,)]),
    ]  # fmt: skip
    transform, edge = compose.ComposeTransforms(steps), loaded_edge(case.edge)
    image, regions = case.patch()
    margin = (edge - case.edge) // 2
    pads = [margin, edge - case.edge - margin] * 3
    image = torch.nn.functional.pad(image, pads)
    label = torch.nn.functional.pad(regions.sum(0, keepdim=True), pads).to(torch.int16)
    label[(image == 0).all(0, keepdim=True)] = -1
    return lambda: transform(image=image.clone(), segmentation=label.clone())


def loaded_edge(edge: int) -> int:
    """Of the patch that nnU-Net cuts for one of this edge."""
    return int(edge * (math.cos(math.pi / 6) + math.sin(math.pi / 6)) / 0.85)


# --- what a device would have to do


class Traffic(TorchDispatchMode):
    """Counts kernels, and the bytes that they read and write; views are none."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels, self.bytes = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        aliases = [r.alias_info for r in func._schema.returns]
        if not any(alias is not None and not alias.is_write for alias in aliases) and "empty" not in func.name():
            self.kernels += 1
            given = torch.utils._pytree.tree_leaves((args, made))
            self.bytes += sum(t.numel() * t.element_size() for t in given if isinstance(t, Tensor))
        return made


def traffic(case: Case, samples: int = 300) -> dict[str, float]:
    """Of one sample, the mean of many: {kernels, gb}."""
    there = replace(case, image_czyx=case.image_czyx.to(META), label_zyx=case.label_zyx.to(META))
    table, options = torch.from_numpy(region_table("msd")).to(META), Augment(kind="full")
    with Traffic() as counted:
        for seed in range(samples):
            make([there.sample(seed)], torch.zeros((1, 20), device=META), table, options, case.size)
    return {"kernels": round(counted.kernels / samples), "gb": round(counted.bytes / samples / 1e9, 3)}


def measure(edge: int, seconds: float, peers: list[str]) -> dict[str, Any]:
    """{operation: {ours_ms, monai_ms}}, the lists, what is read of a case, a device's traffic."""
    case = case_of(edge)
    rows: dict[str, dict[str, float]] = {name: {"ours_ms": cpu_ms(act, seconds)} for name, act in ours(case).items()}
    if "monai" in peers:
        for name, act in monai(case).items():
            rows[name]["monai_ms"] = cpu_ms(act, seconds)
    lists = {kind: cpu_ms(whole_list(case, kind, itertools.count()), 6 * seconds) for kind in ("light", "full")}
    if "nnunet" in peers:
        torch.manual_seed(0)
        lists["nnunet"] = cpu_ms(nnunet(case), 6 * seconds)
    read = sum(math.prod(case.cut(seed).shape) for seed in range(SEEDS)) / SEEDS / edge**3
    moved = sum(rotation_and_scale(partial(draw, seed)) is not None for seed in range(SEEDS)) / SEEDS
    source = {"ours": round(read, 2), "nnunet": round((loaded_edge(edge) / edge) ** 3, 2), "moved": round(moved, 2)}
    return {"operations": rows, "lists_ms": lists, "read": source, "device": traffic(case)}
