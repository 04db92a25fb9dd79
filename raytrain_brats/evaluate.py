"""Score a trained network: `raytrain-brats evaluate --run-dir URI --data URI`.

In: a run folder, labelled cases.
Out: `evaluation/cases.csv`, `evaluation/summary.json`, `evaluation/overlays/<case>.png` in the run folder.
"""

import json
import sys
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import ray
from rich.progress import track
from rich.table import Table

from raytrain_brats import figures, storage
from raytrain_brats.cli import Uri, cases_from, default, entry, show
from raytrain_brats.data import manifest as manifests
from raytrain_brats.data.manifest import Case, Manifest
from raytrain_brats.data.nifti import Refused
from raytrain_brats.data.preprocess import restore, to_ras
from raytrain_brats.data.store import Source
from raytrain_brats.errors import RunFailed, UserError
from raytrain_brats.labels import REGIONS, to_regions
from raytrain_brats.run import cluster, job
from raytrain_brats.run.validate import Score, means, newest_weights, score, segment, shared_network, table


@dataclass(frozen=True)
class Args:
    """Dice and HD95 of whole cases on their native grid, by the newest checkpoint."""

    run_dir: Uri = ""
    """The run; by default RAYTRAIN_BRATS_RUN_DIR."""
    data: Uri = ""
    """Folder or manifest of the cases; by default RAYTRAIN_BRATS_DATA."""
    store: Uri = ""
    """Prepared store, instead of --data; by default RAYTRAIN_BRATS_STORE."""
    split: Literal["val", "train", "all"] = "val"
    """Which cases: held out by the run, trained on, or all."""
    overlays: int = 8
    """Cases to draw."""


def work(args: Args) -> None:
    if not (run_dir := default(args.run_dir, "RUN_DIR")):
        raise UserError("no run folder given; name one with --run-dir")
    run_dir = storage.normal(run_dir)
    settings, _, identity = job.open_run(run_dir)
    manifest, source = job.open_cases(settings, *cases_from(args.data, args.store), run_dir)
    same = manifests.identity(manifest.cases, job.preprocessing(settings)) == identity
    if not same and args.split != "all":
        raise UserError(
            f"{manifest.root} is not what {run_dir} was trained on, so its folds do not say what was held out; "
            "give the run's own data, or --split all if none of these cases was trained on"
        )
    cases = _chosen(manifest, settings.data.fold, args.split)
    name, weights = newest_weights(run_dir)
    cluster.connect()
    network = ray.put((settings, weights))
    drawn = {case.id for case in cases[: args.overlays]}
    found = cluster.parallel_map(partial(_one, run_dir, network, source, drawn), cases, on_gpus=True)
    results = list(track(found, "evaluating", len(cases), disable=not sys.stdout.isatty()))
    scores = [r for r in results if isinstance(r, Score)]
    for message in (r for r in results if isinstance(r, str)):
        print(f"left out: {message}", file=sys.stderr)
    if not scores:
        raise RunFailed(f"none of {len(cases)} cases could be scored")
    phantoms = manifest.synthetic
    summary = {"split": args.split, "checkpoint": name, "data": "phantom" if phantoms else "real", "cases": len(scores)}
    storage.write_bytes(storage.join(run_dir, "evaluation", "cases.csv"), table(scores))
    content = json.dumps(summary | means(scores), indent=1).encode()
    storage.write_bytes(storage.join(run_dir, "evaluation", "summary.json"), content)
    _show(scores, args.split, phantoms)


def _chosen(manifest: Manifest, fold: int, split: str) -> tuple[Case, ...]:
    train, held_out = manifest.split(fold)
    cases = {"train": train, "val": held_out, "all": manifest.cases}[split]
    if not cases:
        raise UserError(f"{manifest.root} has no case in split {split!r}; choose another with --split")
    return cases


def _one(run_dir: str, shared: ray.ObjectRef[Any], source: Source, drawn: set[str], case: Case) -> Score | str:
    try:
        prepared = source.load(case)
    except Refused as error:
        return f"case {case.id}: {error.reason}, {error.detail}"
    network, settings, device = shared_network(shared)
    predicted = segment(prepared, network, settings, device)
    result = score(case.id, predicted, prepared, source.convention)
    if case.id in drawn:
        way = prepared.geometry.axes, prepared.geometry.flips
        truth = to_regions(to_ras(prepared.truth_xyz(), *way), source.convention)
        image = to_ras(restore(prepared.image_czyx.astype(np.float32), prepared.geometry), *way)
        picture = figures.overlay(case.id, image, truth, to_ras(predicted, *way), result.dice)
        storage.write_bytes(storage.join(run_dir, "evaluation", "overlays", f"{case.id}.png"), picture)
    return result


def _show(scores: list[Score], split: str, phantoms: bool) -> None:
    lines = Table(
        "case", *(f"Dice {r}" for r in REGIONS), *(f"HD95 {r} mm" for r in REGIONS), title=f"scores of split {split}"
    )
    for s in sorted(scores, key=lambda s: s.dice["WT"])[:20]:
        lines.add_row(s.case_id, *(f"{s.dice[r]:.3f}" for r in REGIONS), *(f"{s.hd95_mm[r]:.1f}" for r in REGIONS))
    mean = means(scores)
    lines.add_section()
    lines.add_row("mean", *(f"{mean[what][r]:.{p}f}" for what, p in (("dice", 3), ("hd95_mm", 1)) for r in REGIONS))
    show(lines)
    if phantoms:
        print("these are phantoms: their scores say nothing about patients")


def main(argv: list[str] | None = None) -> int:
    return entry(Args, work, "evaluate", argv)


if __name__ == "__main__":
    sys.exit(main())
