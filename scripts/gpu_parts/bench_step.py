"""`scripts/bench step`: a training step on one card, beside other libraries' loops.

In: recipes, batches, the edge of a patch.
Out: a table on the terminal; with --json a file of the figures.
"""

import json
import os
import time
from dataclasses import dataclass
from typing import Any

import torch
from rich.table import Table

from raytrain_brats import storage
from raytrain_brats.cli import show
from raytrain_brats.errors import UserError
from scripts.bench_pipelines import common
from scripts.gpu_parts import steps
from scripts.gpu_parts.setting import RECIPES


@dataclass(frozen=True)
class Step:
    """Images a second of a training step on this machine's card, fed and with the batch on the device already, beside
    MONAI's tutorial loop and nnU-Net's train_step: same network, patch and batch, in turn. Without a GPU: on the CPU.
    Needs no Ray; nnU-Net's own code needs EXTRAS=bench, else its maths are re-written."""

    recipes: str = "segresnet,dynunet"
    """Comma-separated."""
    batches: str = "1,2,4"
    """Samples of a step, comma-separated."""
    edge: int = 128
    """Voxels along each edge of a patch; below 64 the networks are small."""
    steps: int = 20
    """Steps counted in each round, after 5 to warm up."""
    rounds: int = 2
    """Of each loop, in turn: A B C A B C."""
    peers: bool = True
    """Also other libraries' loops."""
    compiled: bool = True
    """Also ours compiled, and nnU-Net's network, as it is by default; on a GPU only."""
    peak_tflops: float = 0.0
    """The card's dense peak in half precision, if the table of `gpu_parts.steps` does not know it."""
    minutes: float = 9.0
    """No recipe and batch begins after so long; what is left out is named."""
    json: str = ""
    """File for the figures; written anew after each recipe and batch."""
    overwrite: bool = False
    """Also replace a --json file of other settings, or that bench did not write."""


def step(args: Step) -> None:
    recipes, batches = common.names(args.recipes, RECIPES, "--recipes"), args.batches.split(",")
    if wrong := [number for number in batches if not (number.isdigit() and int(number))]:
        raise UserError(f"--batches {wrong[0]!r}: write numbers of samples from 1, such as 1,2,4")
    if args.edge < 16 or args.edge % 16 or args.steps < 1 or args.rounds < 1:
        raise UserError("--edge must be a multiple of 16, --steps and --rounds 1 at least")
    made, before, began = common.check_places("step", args), os.getloadavg(), time.monotonic()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    peak = args.peak_tflops or steps.peak_of(card)
    versions = {name: version for name in ("torch", "monai", "nnunetv2") if (version := common.version(name))}
    rows: list[dict[str, Any]] = []
    found: dict[str, Any] = {"date": time.strftime("%Y-%m-%d"), "card": card or "none: CPU"}
    found |= {"machine": common.machine(before), "versions": versions, "peak_tflops": peak, "rows": rows}
    tflops = {recipe: steps.tflop_of(recipe, args.edge) for recipe in recipes}
    for batch, recipe in ((int(number), recipe) for number in batches for recipe in recipes):
        if time.monotonic() - began > 60 * args.minutes:
            rows.append({"recipe": recipe, "batch": batch, "loop": "all", "failed": "no time left"})
        else:
            loops = steps.makers(device, args.peers, args.compiled)
            measured = steps.measure(recipe, batch, args.edge, device, args.steps, args.rounds, loops)
            rows += [row.figures(tflops[recipe], peak) for row in measured]
        if args.json:
            storage.write_bytes(args.json, (json.dumps(made | found, indent=1) + "\n").encode())
    _show_steps(rows, f"{card or common.cpu()}, patches of {args.edge}^3, {found['date']}")


def _show_steps(rows: list[dict[str, Any]], title: str) -> None:
    columns = ["recipe", "batch", "loop", "fed img/s", "null img/s", "fed/null", "data wait", "host waits"]
    table = Table(*columns, "of peak", "GB", title=title)
    for row in rows:
        cells = [row["recipe"], row["batch"], row["loop"]]
        if fed := row.get("fed"):
            share = fed["share_of_peak_flops"]
            cells += [f"{fed['img_per_s']:.2f}", f"{row['null']['img_per_s']:.2f}", f"{row['fed_over_null']:.3f}"]
            cells += [f"{fed['data_wait_share']:.1%}", fed["host_waits_per_step"], share and f"{share:.1%}"]
            cells += [fed["peak_gb"]]
        table.add_row(*("-" if cell is None else str(cell) for cell in cells))
    show(table)
    for loop, about in {row["loop"]: row for row in rows if "fed_by" in row}.items():
        print(f"{loop}: augmentation: {about['augmentation']}; fed by {about['fed_by']}")
    for row in rows:
        if row.get("failed"):
            print(f"left out: {row['recipe']}, batch {row['batch']}, {row['loop']}: {row['failed']}")
