"""What `scripts/bench step` measures: each loop fed and with its batch on the device, in turn on one card.

In: recipes, batches, an edge. Out: a row a recipe, batch and loop.
"""

import gc
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import repeat
from statistics import median
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from raytrain_brats.learn.convolution_check import now
from raytrain_brats.learn.model import build_network
from scripts.gpu_parts.feeding import waits
from scripts.gpu_parts.loops import Loop, MonaiTutorial, NnUNet, Ours
from scripts.gpu_parts.setting import META, config

PEAK_TFLOPS = {  # dense, half precision, by NVIDIA's data sheets of each card; the longer name first
    "H200": 989,
    "H100 PCIe": 756,
    "H100": 989,
    "A100": 312,
    "L40S": 362,
    "L4": 121,
    "V100": 125,
    "T4": 65,
}
WARM = 5
"""Steps before counting: cuDNN tries its algorithms, torch compiles."""


@dataclass(frozen=True)
class Once:
    """Some steps of one loop."""

    ms_per_step: float
    data_wait_share: float
    """Of the time, spent asking for the next batch."""
    host_waits_per_step: int | None
    """Calls that make the host wait for the device, without those for events; None without a GPU."""
    peak_gb: float | None


@dataclass
class Row:
    recipe: str
    batch: int
    loop: str
    augmentation: str
    fed_by: str
    fed: list[Once] = field(default_factory=list)
    null: list[Once] = field(default_factory=list)
    failed: str = ""

    def figures(self, tflop: float, peak_tflops: float | None) -> dict[str, Any]:
        """Medians of the rounds."""
        facts: dict[str, Any] = {
            key: getattr(self, key) for key in ("recipe", "batch", "loop", "augmentation", "fed_by", "failed")
        }
        if not self.fed or not self.null:
            return facts
        for kind, rounds in (("fed", self.fed), ("null", self.null)):
            rate = 1e3 * self.batch / median(once.ms_per_step for once in rounds)
            facts[kind] = {
                "img_per_s": round(rate, 3),
                "ms_per_step": round(median(once.ms_per_step for once in rounds), 3),
                "data_wait_share": round(median(once.data_wait_share for once in rounds), 4),
                "host_waits_per_step": rounds[-1].host_waits_per_step,
                "peak_gb": rounds[-1].peak_gb,
                "share_of_peak_flops": float(f"{rate * tflop / peak_tflops:.3g}") if peak_tflops else None,
                "rounds": [asdict(once) for once in rounds],
            }
        facts["fed_over_null"] = round(facts["fed"]["img_per_s"] / facts["null"]["img_per_s"], 4)
        return facts


def peak_of(card: str) -> float | None:
    """TFLOP/s of a card, by its name; None when it is not in the table."""
    return next((float(peak) for name, peak in PEAK_TFLOPS.items() if name in card), None)


def tflop_of(recipe: str, edge: int) -> float:
    """Of a patch, forwards and backwards, counted on shapes: convolutions and products."""
    network = build_network(config(recipe, edge)).to(META)
    with FlopCounterMode(display=False) as counter:
        outputs = network(torch.empty(1, 4, edge, edge, edge, device=META))
        heads = [outputs] if isinstance(outputs, torch.Tensor) else outputs
        torch.stack([output.sum() for output in heads]).sum().backward()
    return float(counter.get_total_flops()) / 1e12


def makers(device: torch.device, peers: bool, compiled: bool) -> list[Callable[..., Loop]]:
    made: list[Callable[..., Loop]] = [Ours]
    if compiled and device.type == "cuda":
        made.append(partial(Ours, compiled=True))
    if peers:
        made += [MonaiTutorial, partial(NnUNet, compiled=compiled)]
    return made


def measure(
    recipe: str, batch: int, edge: int, device: torch.device, steps: int, rounds: int, made: list[Callable[..., Loop]]
) -> list[Row]:
    """All loops, each null-fed and fed, A B C A B C. One that fails says so; the others go on."""
    loops: list[Loop] = [maker(recipe, edge, batch, device) for maker in made]
    rows = [Row(recipe, batch, loop.name, loop.augmentation, loop.fed) for loop in loops]
    for _ in range(rounds):
        for loop, row in zip(loops, rows, strict=True):
            if row.failed:
                continue
            try:
                row.null.append(once(repeat(loop.ready()), loop, device, steps))
                row.fed.append(once(loop.feed(), loop, device, steps))
            except Exception as error:  # noqa: BLE001 - out of memory, no compiler: the others' figures stay
                row.failed = f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
                row.null.clear()
                if device.type == "cuda":
                    torch.cuda.empty_cache()
    loops.clear()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return rows


def once(batches: Iterator[Any], loop: Loop, device: torch.device, steps: int) -> Once:
    on_gpu, waited = device.type == "cuda", 0.0
    for _ in range(min(WARM, steps)):
        loop.step(next(batches))
    loop.finish()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    began = now(device)
    for _ in range(steps):
        asked = time.perf_counter()
        batch = next(batches)
        waited += time.perf_counter() - asked
        loop.step(batch)
    loop.finish()
    spent = now(device) - began
    peak = round(torch.cuda.max_memory_allocated(device) / 1e9, 2) if on_gpu else None
    places = waits(lambda: loop.step(next(batches))) if on_gpu else {}
    # The reading thread waits for its own copies; the steps do not wait for it.
    host_waits = sum(count for place, count in places.items() if not place.startswith("feed.py"))
    loop.finish()
    return Once(round(1e3 * spent / steps, 3), round(waited / spent, 5), host_waits if on_gpu else None, peak)
