"""Score a trained network: `raytrain-brats evaluate --run-dir URI --data URI`.

In: a run folder, labelled cases.
Out: `evaluation/cases.csv`, `evaluation/overlays/<case>.png`, `evaluation/summary.json` in the run folder, put when all
are scored. An earlier evaluation of another checkpoint, split or data is first moved to `evaluations/` beside it.
"""

import itertools
import json
import re
import sys
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import ray
from rich.progress import track
from rich.table import Table

from raytrain_brats import config, outputs, storage
from raytrain_brats.cli import Uri, cases_from, entry, run_folder, show, show_skipped
from raytrain_brats.data import manifest as manifests
from raytrain_brats.data.manifest import Case, Manifest
from raytrain_brats.data.nifti import InvalidCase
from raytrain_brats.data.preprocess import restore, to_ras
from raytrain_brats.data.store import Source
from raytrain_brats.errors import RunFailed, UserError
from raytrain_brats.labels import REGIONS, comparable, described, to_regions
from raytrain_brats.ray_ext import cluster
from raytrain_brats.reporting import figures
from raytrain_brats.run import spec
from raytrain_brats.run.predictor import Score, means, newest_weights, predict_masks, score, shared_network, table
from raytrain_brats.run.run_dir import RunDir


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
    run_dir = run_folder(args.run_dir)
    run = spec.open_run(run_dir)
    settings, convention = run.config, run.convention
    manifest, source = spec.open_cases(settings, *cases_from(args.data, args.store), run_dir)
    if not comparable(convention, source.convention):
        raise UserError(
            f"{run_dir} learned labels read as {described(convention)}, {manifest.root} holds "
            f"{described(source.convention)}: WT, TC and ET are other tissues there; evaluate on data of the run's own "
            "convention"
        )
    preprocessing = spec.preprocessing(settings)
    own = convention == source.convention and manifests.is_dataset_identity(
        run.dataset_identity, manifest.cases, preprocessing, convention
    )
    if not own and args.split != "all":
        raise UserError(
            f"{manifest.root} is not what {run_dir} was trained on, so its folds do not say what was held out; "
            "give the run's own data, or --split all if none of these cases was trained on"
        )
    cases = _chosen(manifest, settings.data.fold, args.split)
    name, weights = newest_weights(run_dir)
    made_from = {
        "checkpoint": name,
        "split": args.split,
        "data_root": outputs.place(manifest.root),
        "identity": manifests.dataset_identity(manifest.cases, preprocessing, source.convention),
        "convention": source.convention,
    }
    print(f"{config.described('run', settings)}; labels: {described(source.convention)}")
    if convention != source.convention:
        print(f"the run learned {described(convention)}: compared by region")
    show_skipped(manifest.skipped)
    cluster.connect()
    network = ray.put((settings, weights))
    drawn = {case.id for case in cases[: args.overlays]}
    found = cluster.parallel_map(partial(_one, network, source, drawn), cases, on_gpus=True)
    results = list(track(found, "evaluating", len(cases), disable=not sys.stdout.isatty()))
    scores = [r[0] for r in results if not isinstance(r, str)]
    for message in (r for r in results if isinstance(r, str)):
        print(f"left out: {message}", file=sys.stderr)
    if not scores:
        raise RunFailed(f"none of {len(cases)} cases could be scored")
    phantoms = manifest.synthetic
    summary = made_from | {"data": "phantom" if phantoms else "real", "cases": len(scores)} | means(scores)
    pictures = {f"overlays/{r[0].case_id}.png": r[1] for r in results if not isinstance(r, str) and r[1]}
    _keep_earlier(run_dir, made_from)
    _write(RunDir(run_dir).evaluation, summary, pictures | {"cases.csv": table(scores)})
    _show(scores, args.split, phantoms)


def _write(folder: str, summary: dict[str, Any], files: dict[str, bytes]) -> None:
    """The summary last: without it what is there is half an evaluation."""
    for name in storage.list_files(folder).keys() - files.keys():  # of the same inputs, the others were moved away
        storage.delete(storage.join(folder, name))
    for name, content in files.items():
        storage.write_bytes(storage.join(folder, name), content)
    storage.write_bytes(storage.join(folder, "summary.json"), json.dumps(summary, indent=1).encode())


def _keep_earlier(run_dir: str, made_from: dict[str, str]) -> None:
    """Move an evaluation of other inputs to `evaluations/`; if killed in between, the next call completes it."""
    folder = RunDir(run_dir).evaluation
    files = {name: storage.read_bytes(storage.join(folder, name)) for name in storage.list_files(folder)}
    try:
        before = dict(json.loads(files["summary.json"]))
    except (KeyError, ValueError, TypeError):
        before = {}
    if not files or made_from.items() <= before.items():
        return
    parts = [str(before.get("checkpoint", "unfinished")), str(before.get("split", "")), str(before.get("identity", ""))]
    name = "-".join(re.sub(r"[^\w.-]", "_", part)[:24] for part in (*parts[:2], parts[2][:8]) if part)
    for number in itertools.count(1):
        kept = RunDir(run_dir).earlier_evaluation(name if number == 1 else f"{name}-{number}")
        there = {n: storage.read_bytes(storage.join(kept, n)) for n in storage.list_files(kept)}
        if all(files.get(n, content) == content for n, content in there.items()) and (
            not there or files.keys() & there.keys()
        ):
            break  # a new place, or one to which these very files were being moved
    for n in sorted(files.keys() - there.keys()):
        storage.write_bytes(storage.join(kept, n), files[n])
    for n in sorted(files, key=lambda n: n == "summary.json"):  # last, as it gives the place its name
        storage.delete(storage.join(folder, n))
    print(f"the evaluation that was there is in {kept}")


def _chosen(manifest: Manifest, fold: int, split: str) -> tuple[Case, ...]:
    train, held_out = manifest.split(fold)
    cases = {"train": train, "val": held_out, "all": manifest.cases}[split]
    if not cases:
        raise UserError(f"{manifest.root} has no case in split {split!r}; choose another with --split")
    return cases


def _one(shared: ray.ObjectRef[Any], source: Source, drawn: set[str], case: Case) -> tuple[Score, bytes] | str:
    """A case's score and its overlay, if it is to be drawn; or why it was left out."""
    try:
        prepared = source.load(case)
    except InvalidCase as error:
        return f"case {case.id}: {error.reason}, {error.detail}"
    network, settings, device = shared_network(shared)
    predicted = predict_masks(prepared, network, settings, device)
    result = score(case.id, predicted, prepared, source.convention)
    if case.id not in drawn:
        return result, b""
    way = prepared.geometry.axes, prepared.geometry.flips
    truth = to_regions(to_ras(prepared.truth_xyz(), *way), source.convention)
    image = to_ras(restore(prepared.image_czyx.astype(np.float32), prepared.geometry), *way)
    return result, figures.overlay(case.id, image, truth, to_ras(predicted, *way), result.dice)


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
