"""Peers that read a format of their own, made from our prepared cases: nnU-Net and MosaicML Streaming.

In: an `Order`, a store. Out: endless counts of the patches that each batch of the loader holds.

Both are optional (`EXTRAS=bench scripts/bench`); imported only when asked for.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from raytrain_brats.data import store as stores
from raytrain_brats.data.preprocess import Prepared
from raytrain_brats.data.store import Source
from scripts.bench_pipelines.pipelines import Order

_WORKERS = 2


def _prepared(order: Order) -> Iterator[Prepared]:
    manifest = stores.open_index(str(Path(order.work, "store")), {"spacing_mm": order.spacing_mm})
    for case in manifest.cases:
        yield Source(manifest.root, manifest.convention, order.spacing_mm).load(case)


def nnunet(order: Order) -> Iterator[int]:
    """nnU-Net's loader of blosc2 files without augmentation, batches of two, two worker processes."""
    os.environ |= dict.fromkeys(("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"), "unused")
    os.environ["nnUNet_n_proc_DA"] = str(_WORKERS)  # noqa: SIM112 - its own name
    from batchgenerators.dataloading.nondet_multi_threaded_augmenter import NonDetMultiThreadedAugmenter
    from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
    from nnunetv2.training.dataloading.nnunet_dataset import comp_blosc2_params, nnUNetDatasetBlosc2
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    size, folder = (order.patch,) * 3, Path(order.work, "nnunet")
    regions: list[tuple[int, ...]] = [(1, 2, 3), (2, 3), (3,)]
    if not folder.exists():
        folder.mkdir()
        for number, case in enumerate(_prepared(order)):
            assert case.label_zyx is not None
            shape = [-1, 1, 1, 1]
            mean, std = (np.array(values, np.float32).reshape(shape) for values in (case.mean, case.std))
            image = np.where(case.image_czyx != 0, (case.image_czyx - mean) / std, np.float32(0))
            label = case.label_zyx[None].astype(np.int16)
            places = {region: np.argwhere(np.isin(label, region))[:10_000] for region in regions}
            blocks, chunks = comp_blosc2_params(image.shape, size, 4)
            label_blocks, label_chunks = comp_blosc2_params(label.shape, size, 2)
            nnUNetDatasetBlosc2.save_case(
                image, label, {"class_locations": places}, str(folder / str(number)),
                chunks=chunks, blocks=blocks, chunks_seg=label_chunks, blocks_seg=label_blocks,
            )  # fmt: skip
    labels: Any = type("Labels", (), {"all_labels": [1, 2, 3], "has_ignore_label": False})
    loader = nnUNetDataLoader(
        nnUNetDatasetBlosc2(str(folder)), 2, size, size, labels, oversample_foreground_percent=0.33,
        transforms=nnUNetTrainer.get_validation_transforms(None, regions=regions),
    )  # fmt: skip
    batches = NonDetMultiThreadedAugmenter(
        data_loader=loader, transform=None, num_processes=_WORKERS, num_cached=6, seeds=None, pin_memory=False,
        wait_time=0.002,
    )  # fmt: skip
    while True:
        yield len(next(batches)["data"])


def mosaic(order: Order) -> Iterator[int]:
    """StreamingDataset of prepared volumes in zstd shards, a random crop of each, batches of two, two workers."""
    from streaming import MDSWriter, StreamingDataset
    from streaming.base.util import clean_stale_shared_memory

    class Crops(StreamingDataset):
        """A random patch of each volume."""

        def __getitem__(self, index: int) -> dict[str, Any]:
            case = super().__getitem__(index)
            places = [np.random.randint(0, max(n - order.patch, 0) + 1) for n in case["label"].shape]
            inside = tuple(slice(a, a + order.patch) for a in places)
            image, label = case["image"][(slice(None), *inside)], case["label"][inside]
            padding = [(0, order.patch - n) for n in label.shape]
            image, label = np.pad(image, [(0, 0), *padding]), np.pad(label, padding)
            return {"image": torch.from_numpy(image), "label": torch.from_numpy(label)}

    folder = Path(order.work, "mosaic")
    clean_stale_shared_memory()
    if not folder.exists():
        columns = {"image": "ndarray:int16", "label": "ndarray:uint8"}
        with MDSWriter(out=str(folder), columns=columns, compression="zstd:3", size_limit=64 << 20) as writer:
            for case in _prepared(order):
                writer.write({"image": case.image_czyx, "label": case.label_zyx})
    dataset = Crops(
        remote=str(folder), local=f"{folder}_local", shuffle=True, batch_size=2, predownload=8, num_canonical_nodes=1
    )
    loader: Any = torch.utils.data.DataLoader(dataset, batch_size=2, num_workers=_WORKERS, persistent_workers=True)
    while True:
        for batch in loader:
            yield len(batch["image"])
