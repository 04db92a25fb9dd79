"""The loaders of other libraries on the same cases, each as its own tutorial sets it up, and ours without Ray.

In: the generated cases, how many patches to count. Out: a `Run`.

What each hands over differs: MONAI's rows are augmented float32 patches with three label channels, nnU-Net's
normalised float32, MosaicML's int16 patches cut from prepared volumes (`pipelines.ABOUT`).
"""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import monai.data
import monai.transforms
import torch

from scripts.bench_pipelines import prepared_peers
from scripts.bench_pipelines.alone import alone
from scripts.bench_pipelines.meter import Meter
from scripts.bench_pipelines.pipelines import Order, Run, counted, enough

WORKERS = 2
t: Any = monai.transforms
monai_data: Any = monai.data


def tutorial(patch: int, spacing_mm: float) -> Any:
    """The training transforms of MONAI's tutorial brats_segmentation_3d, for a cubic patch."""
    both = ["image", "label"]
    flips = [t.RandFlipd(keys=both, prob=0.5, spatial_axis=axis) for axis in range(3)]
    return t.Compose(
        [
            t.LoadImaged(keys=both),
            t.EnsureChannelFirstd(keys="image"),
            t.EnsureTyped(keys=both),
            t.ConvertToMultiChannelBasedOnBratsClassesd(keys="label"),
            t.Orientationd(keys=both, axcodes="RAS"),
            t.Spacingd(keys=both, pixdim=(spacing_mm,) * 3, mode=("bilinear", "nearest")),
            t.RandSpatialCropd(keys=both, roi_size=[patch] * 3, random_size=False),
            *flips,
            t.NormalizeIntensityd(keys="image", nonzero=True, channel_wise=True),
            t.RandScaleIntensityd(keys="image", factors=0.1, prob=1.0),
            t.RandShiftIntensityd(keys="image", offsets=0.1, prob=1.0),
        ]
    )


def monai_loader(order: Order) -> Iterator[int]:
    """Batches of one through DataLoader(num_workers=2), epoch after epoch; caches are filled before the first."""
    cases = [
        {"image": str(image), "label": str(Path(order.source, "labelsTr", image.name))}
        for image in sorted(Path(order.source, "imagesTr").glob("*.nii.gz"))
    ]
    chain, kind = tutorial(order.patch, order.spacing_mm), order.pipeline.removeprefix("monai_")
    update: Callable[[], None] | None = None
    if kind == "dataset":
        dataset: Any = monai_data.Dataset(cases, chain)
    elif kind == "cache":
        dataset = monai_data.CacheDataset(cases, chain, cache_rate=1.0, num_workers=1, progress=False)
    elif kind == "persistent":
        dataset = monai_data.PersistentDataset(cases, chain, cache_dir=str(Path(order.work, "monai_persistent")))
        for number in range(len(dataset)):
            dataset[number]
    else:
        options: dict[str, Any] = {"replace_rate": 0.25, "cache_num": max(1, len(cases) // 2), "progress": False}
        dataset = monai_data.SmartCacheDataset(cases, chain, num_init_workers=1, num_replace_workers=1, **options)
        dataset.start()
        update = dataset.update_cache
    keep = update is None  # workers hold a copy of the cache: an updated one needs new workers
    loader = monai_data.DataLoader(dataset, batch_size=1, shuffle=True, num_workers=WORKERS, persistent_workers=keep)
    while True:
        for batch in loader:
            yield len(batch["image"])
        if update:
            update()


def measure(order: Order) -> Run:
    """Run a loader in this process, which is the root of its tree; its start and warm-up are not counted."""
    torch.set_num_threads(1)
    with Meter() as meter:
        makers = {"nnunet": prepared_peers.nnunet, "mosaic": prepared_peers.mosaic}
        makers |= dict.fromkeys(("raw_alone", "store_alone"), alone)
        batches = makers.get(order.pipeline, monai_loader)(order)
        patches, begun = -order.warm, time.monotonic()
        for count in batches:
            if patches < 0 <= patches + count:
                begun, patches = time.monotonic(), 0
                continue
            patches += count
            ended = time.monotonic()
            if enough(order, patches, ended - begun):
                break
    return counted(meter, begun, ended, patches)


if __name__ == "__main__":
    asked = Order(**json.loads(sys.argv[1]))
    Path(sys.argv[2]).write_text(json.dumps(asdict(measure(asked))))
    os._exit(0)  # some loaders' threads and shared memory never end by themselves
