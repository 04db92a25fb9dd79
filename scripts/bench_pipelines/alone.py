"""Our own routes without Ray: what is left is what Ray costs.

In: an `Order` of a raw or prepared set of cases.
Out: what is streamed, for both ways of measuring; endless patches, loaded and cut in this process.
"""

from collections.abc import Iterator
from pathlib import Path

from raytrain_brats.config import Config
from raytrain_brats.data import turns
from raytrain_brats.data.patch import Patch, PatchSpec, decode
from raytrain_brats.data.sampler import Sampler
from raytrain_brats.data.turns import StreamSpec
from raytrain_brats.run.spec import open_cases
from scripts.bench_pipelines.pipelines import Order


def opened(order: Order, config: Config) -> StreamSpec:
    raw = order.pipeline.startswith("raw")
    known = str(Path(order.work) / "known") if raw else ""
    manifest, source = open_cases(config, *((order.source, "") if raw else ("", order.source)), known)
    # batches of one case: no padding but at the begin; as good as endless
    patches = config.data.patches_per_case
    sampler = Sampler(0, len(manifest.cases), 1, patches, 100_000)
    patch_spec = PatchSpec(config.data.patch_xyz, config.data.foreground_share)
    return StreamSpec(sampler, manifest.cases, source, patch_spec, 0, 1 << 30)


def settings(order: Order) -> Config:
    sections = {"network": {"name": "dynunet"}, "data": {"patch_xyz": [order.patch] * 3}}
    return Config.model_validate(sections | {"preprocess": {"spacing_mm": order.spacing_mm}})


class CopySink:
    """What training does first with a patch: copy it into the device's memory, here a buffer that is used again."""

    def __init__(self, patch: int) -> None:
        import torch  # the driver has none

        self._tensor = torch.from_numpy
        edge = (patch,) * 3
        self._image, self._label = torch.empty((4, *edge), dtype=torch.int16), torch.empty(edge, dtype=torch.uint8)

    def take(self, patch: Patch) -> None:
        if patch.weight != 1:
            raise RuntimeError(f"no patch at {patch.position}: {patch.reason}")
        self._image.copy_(self._tensor(patch.image_czyx))
        self._label.copy_(self._tensor(patch.label_zyx))


def alone(order: Order) -> Iterator[int]:
    """Load, check, preprocess, encode, decode and copy as the routes do, in one thread; in the order of the rows."""
    taker = CopySink(order.patch)
    for table in turns.tables(opened(order, settings(order)), 0, 1):
        for patch in decode(table)[1]:
            taker.take(patch)
            yield 1
