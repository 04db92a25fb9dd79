"""Our own routes without Ray: what is left is what Ray costs.

In: an `Order` of a raw or prepared set of cases.
Out: the cases, plan and cutting that both ways of measuring share; endless patches, loaded and cut in this process.
"""

from collections.abc import Iterator
from pathlib import Path

import torch

from raytrain_brats.config import Config
from raytrain_brats.data.boxes import Buffer, PatchSpec, decode, rank_tables
from raytrain_brats.data.manifest import Manifest
from raytrain_brats.data.patch import Patch
from raytrain_brats.data.sampler import Sampler
from raytrain_brats.data.store import Source
from raytrain_brats.run.spec import open_cases
from scripts.bench_pipelines.pipelines import Order


def opened(order: Order, config: Config) -> tuple[Manifest, Source, Sampler, PatchSpec]:
    raw = order.pipeline.startswith("raw")
    known = str(Path(order.work) / "known") if raw else ""
    manifest, source = open_cases(config, *((order.source, "") if raw else ("", order.source)), known)
    # batches of one: no padding; as good as endless
    sampler = Sampler(0, len(manifest.cases), 1, config.data.patches_per_case, config.data.window_cases, 100_000)
    return manifest, source, sampler, PatchSpec(config.data.patch_xyz, config.data.foreground_share)


def settings(order: Order) -> Config:
    sections = {"network": {"name": "dynunet"}, "data": {"patch_xyz": [order.patch] * 3}}
    return Config.model_validate(sections | {"preprocess": {"spacing_mm": order.spacing_mm}})


class CopySink:
    """What training does first with a patch: copy it into the device's memory, here a buffer that is used again."""

    def __init__(self, patch: int) -> None:
        edge = (patch,) * 3
        self._image, self._label = torch.empty((4, *edge), dtype=torch.int16), torch.empty(edge, dtype=torch.uint8)

    def take(self, patch: Patch) -> None:
        if patch.weight != 1:
            raise RuntimeError(f"no patch at {patch.position}: {patch.reason}")
        self._image.copy_(torch.from_numpy(patch.image_czyx))
        self._label.copy_(torch.from_numpy(patch.label_zyx))


def alone(order: Order) -> Iterator[int]:
    """Load, check, preprocess, encode, decode and copy as the routes do, in one thread; in the order of the tables."""
    manifest, source, sampler, patch_spec = opened(order, settings(order))
    taker, buffer = CopySink(order.patch), Buffer()
    for window in sampler.windows(0, sampler.total):
        samples = [sampler.sample(p) for p in window]
        items = [(s, None if s.case is None else manifest.cases[s.case]) for s in samples]
        for table in rank_tables(source, items, patch_spec, 1, buffer):
            for patch in decode(table)[1]:
                taker.take(patch)
                yield 1
