"""The page of `scripts/bench augment`.

In: its figures. Out: Markdown.
"""

from typing import Any

TITLE = "# What augmentation costs"
BYTES_PER_S, LAUNCH_S, IMAGES_PER_S = 2e12, 5e-6, 27.5
"""Of an A100 of 80 GB by its data sheet; a kernel's launch, about; NVIDIA's training of nnU-Net on an A100."""


def page(found: dict[str, Any]) -> str:
    sizes = found["sizes"]
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    rows = {
        name: [cell for size in sizes.values() for cell in _cells(size["operations"][name])]
        for name in next(iter(sizes.values()))["operations"]
    }
    return f"""{TITLE}

Made by `scripts/bench augment`: CPU milliseconds a sample of 4 modalities, one thread, each operation always on.
{found["machine"]}, load {found["load"][0]} to {found["load"][1]}, {versions}, {found["date"]}.

{_table("operation", [h for e in sizes for h in (f"ours, {e}³", f"MONAI, {e}³", "MONAI / ours")], rows)}

MONAI: RandAffined (image, and one label map by nearest; ours: three region masks and the brain's, trilinear), RandFlipd
three times, RandGaussianNoise, RandGaussianSmooth, RandScaleIntensity, RandScaleIntensityFixedMean,
RandSimulateLowResolution, RandAdjustContrast.

## The whole list

{_table("mean over samples", [f"{edge}³" for edge in sizes], _lists(list(sizes.values())))}

A step normalises and makes regions in any case; nnU-Net has done the former before, on disk. nnU-Net's list is made of
its own classes with its own numbers, and begins at the larger patch that it cuts for the rotation's sake.

{_device(*list(sizes.items())[-1])}
"""


def _cells(row: dict[str, float]) -> list[str]:
    peer = row.get("monai_ms")
    return [f"{row['ours_ms']:.1f}", f"{peer:.1f}" if peer else "-", f"{peer / row['ours_ms']:.1f}" if peer else "-"]


def _table(first: str, heads: list[str], rows: dict[str, list[str]]) -> str:
    lines = [[first, *heads], ["---"] * (1 + len(heads)), *([name, *cells] for name, cells in rows.items())]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _lists(sizes: list[dict[str, Any]]) -> dict[str, list[str]]:
    words = {
        "light": "`light`, from int16 and labels, ms",
        "full": "`full`, likewise, ms",
        "nnunet": "nnU-Net's list (batchgeneratorsv2), ms",
    }
    found = {said: [f"{s['lists_ms'][k]:.1f}" for s in sizes] for k, said in words.items() if k in sizes[0]["lists_ms"]}
    read = {"ours": "`full` reads of a case, times the patch", "nnunet": "nnU-Net reads"}
    return found | {said: [f"{size['read'][key]:.2f}" for size in sizes] for key, said in read.items()}


def _device(edge: int, size: dict[str, Any]) -> str:
    kernels, gigabytes = size["device"]["kernels"], size["device"]["gb"]
    ms, step_ms = gigabytes * 1e9 / BYTES_PER_S * 1e3, 1e3 / IMAGES_PER_S
    return f"""## On a GPU: not measured

Counted on shapes: a sample of {edge}³ needs {kernels} kernels, which read and write {gigabytes:.2f} GB, normalisation
and regions included. At {BYTES_PER_S / 1e12:g} TB/s (A100 of 80 GB) that is {ms:.2f} ms. To launch them takes the host
some {kernels * LAUNCH_S * 1e3:.1f} ms at {LAUNCH_S * 1e6:g} µs each, while the device works at what came before. NVIDIA
trains nnU-Net on an A100 with {IMAGES_PER_S} images a second, {step_ms:.0f} ms each: by bytes, augmentation is
{ms / step_ms:.1%} of a step. **Derived, not measured.**"""
