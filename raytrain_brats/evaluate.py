"""Score a trained network, or any program's label volumes: `raytrain-brats evaluate --run-dir URI --data URI`.

In: a run folder or a folder of label volumes; labelled cases.
Out: `cases.csv`, `statistics.csv`, `summary.json` and pictures. Of a run they go to `evaluation/` in its folder when
all cases are scored; an earlier evaluation of another checkpoint, split or data is first moved to `evaluations/` beside
it. Of label volumes they go to --out.
"""

import itertools
import json
import re
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import ray
from rich.table import Table

from raytrain_brats import config, outputs, storage
from raytrain_brats.cases import scan
from raytrain_brats.cli import Uri, cases_from, entry, progress, run_folder, show, show_skipped
from raytrain_brats.data import manifest as manifests
from raytrain_brats.data.manifest import Case, Manifest
from raytrain_brats.data.nifti import InvalidCase
from raytrain_brats.data.preprocess import restore, to_ras
from raytrain_brats.data.store import Source
from raytrain_brats.errors import RunFailed, UserError
from raytrain_brats.labels import (
    REGIONS,
    comparable,
    described,
    from_regions,
    regions,
    regions_of_network,
    to_regions,
)
from raytrain_brats.learn.postprocess import Rules, masks_by
from raytrain_brats.ray_ext import cluster
from raytrain_brats.reporting import figures, folds, overlays, scores
from raytrain_brats.reporting.overlays import Slices
from raytrain_brats.run import held_out, label_volumes, members, spec
from raytrain_brats.run.predictor import left_out, native_probabilities, shared_networks, voxel_mm3
from raytrain_brats.run.run_dir import RunDir
from raytrain_brats.scoring import case_scores
from raytrain_brats.scoring.case_scores import Reading
from raytrain_brats.scoring.challenges import challenge_of

Row = dict[str, Any]
Result = tuple[Row, Slices | None, dict[str, float]]
"""A case's scores, what may be drawn of it, seconds of its parts."""
_MADE = re.compile(r"cases\.csv|statistics\.csv|summary\.json|overlays/[^/]+\.png")
"""What an evaluation leaves in its folder; all else there is a person's."""


@dataclass(frozen=True)
class Args:
    """Scores of whole cases on their native grid: Dice, HD95, surface Dice, lesion-wise by year (docs/metrics.md)."""

    run_dir: Uri = ""
    """The run, of whose newest checkpoint; by default RAYTRAIN_BRATS_RUN_DIR."""
    data: Uri = ""
    """Folder or manifest of the cases; by default RAYTRAIN_BRATS_DATA."""
    store: Uri = ""
    """Prepared store, instead of --data; by default RAYTRAIN_BRATS_STORE."""
    best: bool = False
    """The checkpoint with the best mean validation Dice, instead of the newest."""
    split: Literal["auto", "val", "train", "all"] = "auto"
    """Which cases: held out by the run (auto), trained on, or all (auto for --predictions without --run-dir)."""
    mirror: bool = True
    """Average over the eight mirror images, as nnU-Net does; --no-mirror takes an eighth of the time."""
    postprocess: bool = True
    """Apply what `raytrain-brats postprocess` learned, if it did: on these very cases, unless --split is another."""
    challenge: Literal["auto", "GLI", "SSA", "PED", "MEN", "MET"] = "auto"
    """By whose numbers lesions are scored; auto by the label convention and the names of the cases."""
    overlays: int = 8
    """How many cases to draw: the worst."""
    predictions: Uri = ""
    """Score the label volumes CASE.nii.gz of this folder, of any program, instead of a run's checkpoint."""
    convention: str = ""
    """What the values of --predictions mean; by default what the folder states, else as in the data's labels."""
    out: Uri = ""
    """Where the scores of --predictions go."""
    overwrite: bool = False
    """Also replace scores in --out of other predictions, or another program's files; never images or labels."""


def work(args: Args) -> None:
    if args.predictions:
        _score_volumes(args)
        return
    if args.out or args.convention or args.overwrite:
        raise UserError("--out, --convention and --overwrite go with --predictions; a run's scores are in its folder")
    run_dir = run_folder(args.run_dir)
    split: str = "val" if args.split == "auto" else args.split
    manifest, source, cases = held_out.cases_of_run(run_dir, *cases_from(args.data, args.store), split)
    networks = members.opened([run_dir], args.best)
    run, challenge = networks[0].run, _challenge(args, source.convention, cases)
    nothing = None, "no post-processing"
    taught, said = members.rules_of([run_dir], networks, args.mirror) if args.postprocess else nothing
    rules = taught or Rules()
    made_from = members.checkpoints(networks) | {
        "split": split,
        "data_root": outputs.place(manifest.root),
        "identity": manifests.dataset_identity(manifest.cases, spec.preprocessing(run.config), source.convention),
        "convention": source.convention,
        "mirror": args.mirror,
        "postprocessing": rules.to_json(),
        "challenge": challenge,
    }
    print(f"{config.described('run', run.config)}; labels: {described(source.convention)}")
    if run.convention != source.convention:
        print(f"the run learned {described(run.convention)}: compared by region")
    print(said + (", learned on these cases: see its own figures" if split == "val" and rules != Rules() else ""))
    if args.best and split == "val":
        print("the checkpoint was chosen on cases of this split: its scores are somewhat too good")
    show_skipped(manifest.skipped)
    cluster.connect(held_bytes=members.weight_bytes(networks), own=members.parts_of(networks))
    shared = members.by_fold([(m.fold, ray.put((m.run.config, m.weights))) for m in networks], split)
    one = partial(_one, shared, source, args.overlays > 0, rules, args.mirror, challenge)
    worst, failed, results = overlays.Worst(args.overlays), list[str](), []
    for result in _results(one, cases, failed):
        results.append(result if isinstance(result, str) else (worst.seen(result[0], result[1]), result[2]))
    found, refused = [r for r in results if not isinstance(r, str)], [r for r in results if isinstance(r, str)]
    rows = [row for row, _ in found]
    _tell_left_out(refused, len(cases))
    if by_fold := len(networks) > 1 and split == "val":
        fold_of = {case.id: case.fold for case in cases}
        rows = [{"case": row["case"], "fold": fold_of[row["case"]]} | row for row in rows]
    seconds = {what: float(np.mean([s[what] for _, s in found])) for what in ("segment", "score")}
    views = "8 mirror images (--no-mirror: one)" if args.mirror else "one image"
    print(f"a case took {seconds['segment']:.1f} s to segment, as {views}, {seconds['score']:.1f} s to score")
    summary = made_from | _summary(rows, source.convention, manifest.synthetic)
    summary |= {"postprocessing_in_words": rules.in_words(), "held_out": len(cases), "left_out": refused}
    summary |= folds.summary(rows) if by_fold else {}
    pictures = {f"overlays/{name}.png": picture for name, picture in worst.drawn().items()}
    _keep_earlier(run_dir, made_from)
    _write(RunDir(run_dir).evaluation, summary, pictures | _tables(rows))
    _show(rows, f"split {split}", manifest.synthetic)
    if by_fold:
        _show_folds(rows, members.missing_folds(networks))
    if failed:
        raise RunFailed(f"{len(failed)} of {len(cases)} cases could not be scored, as named above; the others are")


def _results(one: Any, cases: Sequence[Case], failed: list[str], on_gpus: bool = True) -> Iterator[Any]:
    """Of each case in order; of one that cannot be computed why, also in `failed`."""

    def named(case: Case, error: Exception) -> str:
        failed.append(left_out(case.id, error))
        return failed[-1]

    return progress(cluster.parallel_map(one, cases, on_gpus=on_gpus, failed=named), "evaluating", len(cases))


def _score_volumes(args: Args) -> None:
    """Label volumes of any program, by the same code; a run folder only says which cases were held out."""
    folder, out = storage.normal(args.predictions), storage.normal(args.out)
    if not args.out:
        raise UserError("--predictions needs --out, a folder for the scores")
    if args.run_dir:
        split: str = "val" if args.split == "auto" else args.split
        given = storage.normal(args.run_dir), *cases_from(args.data, args.store)
        manifest, source, cases = held_out.cases_of_run(*given, split)
    else:
        manifest, source, split = _labelled(args)
        cases = manifest.cases
    volumes = label_volumes.find(folder, cases)
    convention = args.convention or label_volumes.stated_convention(folder) or source.convention
    read_as = described(convention)
    if not comparable(convention, source.convention):
        raise UserError(
            f"--predictions {folder} are read as {read_as}, {manifest.root} holds "
            f"{described(source.convention)}: WT, TC and ET are other tissues there; say --convention"
        )
    challenge, scored = _challenge(args, source.convention, cases), [c for c in cases if c.id in volumes.files]
    made_from = {
        "predictions": outputs.place(folder),
        "split": split,
        "data_root": outputs.place(manifest.root),
        "convention": source.convention,
        "predictions_convention": convention,
        "challenge": challenge,
    }
    uris = [storage.join(folder, name) for name in volumes.files.values()]
    truths = [storage.join(manifest.root, case.label) for case in scored if case.label and not case.object]
    names = ("cases.csv", "statistics.csv", "distributions.png", "summary.json")
    origin = ", ".join(f"{k} {v}" for k, v in made_from.items())
    settings = {name: outputs.stamp(uri) for name, uri in zip(volumes.files.values(), uris, strict=True)}
    outputs.claim(
        out, "evaluate", dict.fromkeys(names, origin), settings={"volumes": settings}, protected=[*uris, *truths],
        overwrite=args.overwrite,
    )  # fmt: skip
    print(f"label values of {folder}: {read_as}; labels: {described(source.convention)}")
    for what, left in (("no label volume for case", volumes.missing), ("not a case", volumes.extra)):
        for name in left:
            print(f"{what}: {name}", file=sys.stderr)
    cluster.connect()
    only = regions_of_network(convention) if label_volumes.by_network(folder) else None
    one = partial(_volume, folder, volumes.files, convention, only, source, challenge)
    results = list(_results(one, scored, [], on_gpus=False))
    rows, refused = [r for r in results if not isinstance(r, str)], [r for r in results if isinstance(r, str)]
    _tell_left_out(refused, len(scored))
    summary = made_from | _summary(rows, source.convention, manifest.synthetic)
    summary |= {"missing": list(volumes.missing), "extra": list(volumes.extra), "refused": refused}
    pictures = {"distributions.png": figures.distributions(rows)}
    for name, content in (_tables(rows) | pictures | {"summary.json": _json(summary)}).items():
        storage.write_bytes(storage.join(out, name), content)
    _show(rows, f"{len(rows)} of {len(cases)} cases", manifest.synthetic)
    print(f"scores are in {out}")
    if refused:
        raise RunFailed(f"{len(refused)} of {len(scored)} label volumes could not be scored, as named above")


def _labelled(args: Args) -> tuple[Manifest, Source, str]:
    """Labelled cases without a run; their files are read here only where label values must say what they mean."""
    data, store = cases_from(args.data, args.store)
    if store or not data:
        raise UserError("--predictions needs --data, or --run-dir with the run's --data or --store")
    if args.split not in ("auto", "all"):
        raise UserError(f"--split {args.split} needs --run-dir: a run says which cases it held out")
    manifest = scan.open_manifest(data) if data.endswith(".jsonl") else scan.scan(data)
    if not manifest.convention:
        manifest = scan.open_manifest(data, spread=cluster.spread)
    return manifest, Source(manifest.root, manifest.convention, 1.0), "all"


def _challenge(args: Args, convention: str, cases: tuple[Case, ...]) -> str:
    return challenge_of(convention, (c.id for c in cases)) if args.challenge == "auto" else args.challenge


def _tell_left_out(refused: list[str], total: int) -> None:
    """Raises RunFailed when nothing is left."""
    for message in refused:
        print(f"left out: {message}", file=sys.stderr)
    if len(refused) == total:
        raise RunFailed(f"none of {total} cases could be scored")


def _summary(rows: list[Row], convention: str, phantoms: bool) -> dict[str, Any]:
    found = scores.by_column(rows)
    three = {
        what: {r: found[f"{name}_{r}{unit}"].mean for r in REGIONS}
        for what, name, unit in (("dice", "dice", ""), ("hd95_mm", "hd95", "_mm"))
    }
    missing = [r for r in regions(convention) if f"dice_{r}" not in found]
    return {
        "data": "phantom" if phantoms else "real",
        "cases": len(rows),
        **three,
        "not_predicted": missing,
        "rules": case_scores.IMPLEMENTATIONS,
        "columns": scores.summary(found),
    }


def _tables(rows: list[Row]) -> dict[str, bytes]:
    return {"cases.csv": scores.cases_csv(rows), "statistics.csv": scores.statistics_csv(scores.by_column(rows))}


def _json(summary: dict[str, Any]) -> bytes:
    return json.dumps(summary, indent=1).encode()


def _write(folder: str, summary: dict[str, Any], files: dict[str, bytes]) -> None:
    """The summary last: without it what is there is half an evaluation."""
    for name in storage.list_files(folder).keys() - files.keys():  # of the same inputs, the others were moved away
        if _MADE.fullmatch(name):
            storage.delete(storage.join(folder, name))
    for name, content in files.items():
        storage.write_bytes(storage.join(folder, name), content)
    storage.write_bytes(storage.join(folder, "summary.json"), _json(summary))


def _keep_earlier(run_dir: str, made_from: dict[str, Any]) -> None:
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


def _one(
    shared: list[tuple[Any, ...]],
    source: Source,
    drawn: bool,
    rules: Rules,
    mirror: bool,
    challenge: str,
    case: Case,
) -> Result | str:
    """A case's scores, what may be drawn of it, and what took how many seconds; or why it was left out."""
    try:
        prepared = source.load(case)
    except InvalidCase as error:
        return left_out(case.id, error)
    networks, truth = shared_networks(shared[case.fold]), prepared.truth_xyz()
    began = time.perf_counter()
    answer = native_probabilities(prepared, networks, networks.device, mirror=mirror)
    predicted = masks_by(rules, answer, voxel_mm3(prepared))
    segmented = time.perf_counter()
    found = case_scores.columns(
        case_scores.of_network(from_regions(predicted, source.convention), source.convention),
        Reading(truth, source.convention),
        _spacing(np.array(prepared.geometry.affine)),
        challenge,
    )
    seconds = {"segment": segmented - began, "score": time.perf_counter() - segmented}
    row = scores.rounded({"case": case.id} | found)
    if not drawn:
        return row, None, seconds
    way = prepared.geometry.axes, prepared.geometry.flips
    image = prepared.image_czyx[list(overlays.CHANNELS)].astype(np.float32)
    shown = to_ras(restore(image, prepared.geometry), *way), to_regions(to_ras(truth, *way), source.convention)
    edges_mm = prepared.geometry.native_mm.tolist()
    return row, overlays.cut(case.id, *shown, to_ras(predicted, *way), edges_mm), seconds


def _volume(
    folder: str, files: dict[str, str], convention: str, only: Any, source: Source, challenge: str, case: Case
) -> Row | str:
    """A case's scores by its label volume; or why it could not be scored."""
    try:
        truth, affine = label_volumes.truth_of(source, case)
        label = label_volumes.read(folder, files[case.id], convention, truth, affine)
    except InvalidCase as error:
        return left_out(case.id, error)
    read = Reading(label, convention, only), Reading(truth, source.convention)
    return scores.rounded({"case": case.id} | case_scores.columns(*read, _spacing(affine), challenge))


def _spacing(affine: Any) -> list[float]:
    edges: list[float] = np.linalg.norm(affine[:3, :3], axis=0).tolist()
    return edges


def _show(rows: list[Row], title: str, phantoms: bool) -> None:
    """The worst cases, then every region by metric."""
    lines = Table("case", *(f"Dice {r}" for r in REGIONS), *(f"HD95 {r} mm" for r in REGIONS), title=f"scores, {title}")
    for row in scores.worst_first(rows)[:20]:
        lines.add_row(row["case"], *(f"{row[c]:.1f}" if "hd95" in c else f"{row[c]:.3f}" for c in scores.FIRST))
    found = scores.by_column(rows)
    lines.add_section()
    for name, which in (("mean", "mean"), ("mean, both empty left out", "mean_nonempty")):
        values = [(column, getattr(found[column], which)) for column in scores.FIRST]
        lines.add_row(name, *("-" if v is None else f"{v:.1f}" if "hd95" in c else f"{v:.3f}" for c, v in values))
    lines.add_row("cases with both empty", *(str(found[column].both_empty) for column in scores.FIRST))
    show(lines)
    kinds = ("nsd_1mm", "lesion_dice_2023", "lesion_dice_2024", "lesion_dice_2026", "lesion_f1_2026")
    more = Table("region", "Dice", *kinds, "both empty", title="means of all regions (all columns: statistics.csv)")
    for region in dict.fromkeys(each[1] for c in scores.columns_of(rows) if (each := scores.name_of(c))):
        cells = [found.get(f"{kind}_{region}") for kind in ("dice", *kinds)]
        absent = "not predicted" if cells[0] is None else "-"
        count = str(cells[0].both_empty) if cells[0] else "-"
        more.add_row(region, *(f"{cell.mean:.3f}" if cell else absent for cell in cells), count)
    show(more)
    if phantoms:
        print("these are phantoms: their scores say nothing about patients")


def _show_folds(rows: list[Row], missing: list[int]) -> None:
    lines = Table("fold", "cases", *scores.FIRST, title="by fold, each case by the network that has not seen it")
    for line in folds.lines(rows):
        lines.add_row(*line)
    show(lines)
    if missing:
        print(f"no run of fold {', '.join(map(str, missing))}: its cases are not in these scores", file=sys.stderr)


def main(argv: list[str] | None = None) -> int:
    return entry(Args, work, "evaluate", argv)


if __name__ == "__main__":
    sys.exit(main())
