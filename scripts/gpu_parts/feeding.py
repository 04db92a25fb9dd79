"""Voxels on their way to the device, and what makes the host wait for it.

In: rows of the stream; a few generated cases.
Out: ms of an upload, host waits in a step, whether resident cases give the stream's patches, memory of a whole case.
"""

import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from raytrain_brats.cases.scan import open_manifest
from raytrain_brats.data.patch import Patch, PatchSpec, decode
from raytrain_brats.data.sampler import Sampler
from raytrain_brats.data.store import Source
from raytrain_brats.data.turns import StreamSpec, rank_steps, tables
from raytrain_brats.learn.inference import probabilities
from raytrain_brats.learn.micro_batch import choose
from raytrain_brats.run.feed import Uploader, batch_of, resident_rows
from raytrain_brats.run.rank import Rank
from raytrain_brats.synthetic import phantom
from scripts.gpu_parts.setting import RECIPES, Setting, config, patches, row, train_step

WHOLE_CASE = (138, 169, 138)
"""Voxels of a brain at 1 mm, zyx."""
CASES, GRID = 4, 32


def uploads(setting: Setting) -> None:
    """A row of four patches, to the device as the reading thread brings it: the same bits; its time."""
    table = row(0, setting.edge, 4)
    uploader = Uploader(setting.device)
    here, there = decode(table)[1], decode(table, uploader)[1]
    equal = all(_same(a, b) for a, b in zip(here, there, strict=True))
    spent = setting.milliseconds(lambda: decode(table, uploader))
    facts = {"ms": spent, "mb": round(table.nbytes / 1e6, 1), "gb_per_s": round(table.nbytes / 1e6 / spent, 2)}
    setting.findings.tell("a row to the device", "" if equal else "other voxels", **facts)
    if setting.gpu:
        pageable = torch.zeros(table.nbytes, dtype=torch.uint8)
        spent = setting.milliseconds(lambda: pageable.to(setting.device))
        setting.findings.tell("the same bytes, pageable, in one copy", ms=spent)


def host_waits(setting: Setting) -> None:
    """Of `launch`: none. torch tells of calls that wait, not of events that are waited for: those are the results'."""
    if not setting.gpu:
        setting.findings.tell("host waits", left_out="on a GPU only; `copies` counts readbacks on meta")
        return
    for recipe in RECIPES:
        for micro in (1, 4):
            step = train_step(config(recipe, setting.edge, 4, f"train.micro_batch={micro}"), setting.device)
            batch = batch_of(patches(0, setting.edge, 4, setting.device), 0, setting.device)
            step.step(batch, 0)
            places = waits(lambda: step.launch(batch, 4))  # noqa: B023 - called at once
            wrong = "the host waits for the device" if places else ""
            setting.findings.tell(f"host waits in launch, {recipe}, micro_batch {micro}", wrong, places=places)


def micro_batch(setting: Setting) -> None:
    """How many samples `auto` takes at once, of 16; on a GPU a step of so many fits, with what it took."""
    for recipe in RECIPES:
        step = train_step(config(recipe, setting.edge, 16, "train.micro_batch=auto"), setting.device)
        facts = choose(step)
        if setting.gpu:
            setting.peak_gb()
            for start in (0, 16):
                step.step(
                    batch_of(patches(start // 16, setting.edge, 16, setting.device), start, setting.device), start
                )
        setting.findings.tell(f"micro_batch auto, {recipe}", peak_gb=setting.peak_gb(), **facts)


def waits(act: Any) -> dict[str, int]:
    """Where, and how often, `act` made the host wait for the device."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            act()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    told = [w for w in caught if "called a synchronizing" in str(w.message)]
    return dict(Counter(f"{Path(w.filename).name}:{w.lineno}" for w in told))


def _same(a: Patch, b: Patch) -> bool:
    def host(array: Any) -> Any:
        return array.cpu().numpy() if isinstance(array, torch.Tensor) else array

    voxels = [(host(x.image_czyx), host(x.label_zyx)) for x in (a, b)]
    equal = all(x.dtype == y.dtype and np.array_equal(x, y) for x, y in zip(*voxels, strict=True))
    rest = [(p.position, p.seed, p.case_id, p.weight, p.reason, tuple(p.mean), tuple(p.std)) for p in (a, b)]
    return equal and rest[0] == rest[1]


def resident(setting: Setting) -> None:
    """Cases that stay on the device or in shared memory give the stream's patches, bit for bit: 1 to 3 ranks, patches
    wider than the cases, one case cut off."""
    sampler = Sampler(seed=1, cases=CASES, global_batch=3, patches_per_case=2, epochs=2)
    compared, equal = 0, True
    with tempfile.TemporaryDirectory() as folder:
        phantom.write_set(f"{folder}/cases", CASES, 1, GRID, "procedural")
        manifest = open_manifest(f"{folder}/cases")
        torn = Path(manifest.root) / manifest.cases[2].images[0]
        torn.write_bytes(torn.read_bytes()[:-40])
        source = Source(manifest.root, manifest.convention, 240 / GRID)
        spec = StreamSpec(sampler, manifest.cases, source, PatchSpec((40, 16, 16), 0.5), 0, 0)

        def steps(rows: Iterator[tuple[int, list[Patch]]], rank: Rank) -> list[Patch]:
            made = rank_steps(rows, sampler, spec.patch_spec.size_zyx, 0, rank.number, rank.world_size)
            return [patch for step in made for patch in step]

        for rank in (Rank(number, size, setting.device) for size in (1, 2, 3) for number in range(size)):
            streamed = steps(map(decode, tables(spec, rank.number, rank.world_size)), rank)
            for kind in ("host", "device"):
                kept = steps(resident_rows(spec, "gpu-check", rank, kind, Path(folder)), rank)
                equal = equal and all(_same(a, b) for a, b in zip(streamed, kept, strict=True))
                compared += len(kept)
    setting.found["resident_equals_stream"] = equal
    setting.findings.tell("resident against stream", "" if equal else "other patches", patches=compared)


def whole_case(setting: Setting) -> None:
    """A case by sliding window in the memory that training leaves: time and peak."""
    for recipe in RECIPES:
        settings = config(recipe, setting.edge, 1)
        step = train_step(settings, setting.device)
        step.step(batch_of(patches(0, setting.edge, 1, setting.device), 0, setting.device), 0)
        box = WHOLE_CASE if setting.gpu else (setting.edge + 4,) * 3
        image = np.random.RandomState(0).randint(0, 900, (4, *box)).astype(np.int16)
        size = settings.data.patch_xyz
        setting.peak_gb()
        given = step.network, image, (450.0,) * 4, (260.0,) * 4, size, 0.5, setting.device
        spent = setting.milliseconds(lambda: probabilities(*given), 4)  # noqa: B023 - called at once
        peak = setting.peak_gb()
        setting.findings.tell(f"a whole case, {recipe}", ms=spent, peak_gb=peak, voxels_zyx=box)
