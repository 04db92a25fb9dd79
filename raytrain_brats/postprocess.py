"""Learn thresholds and rules for small parts: `raytrain-brats postprocess --run-dir URI --data URI`.

In: a run folder, or one with folds; the labelled cases that it held out.
Out: `postprocessing.json` in it, and in the folder of each fold: the rules, what they gain on cases that had no part in
choosing them, for which weights they are. `predict` and `evaluate` apply them.
"""

import contextlib
import json
import sys
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import ray
from rich.table import Table

from raytrain_brats import storage
from raytrain_brats.cli import Uri, cases_from, entry, progress, run_folder, show, show_skipped
from raytrain_brats.data.manifest import Case
from raytrain_brats.data.nifti import InvalidCase
from raytrain_brats.data.store import Source
from raytrain_brats.errors import RunFailed
from raytrain_brats.labels import REGIONS, to_regions
from raytrain_brats.learn.postprocess import Learned, learn, tried
from raytrain_brats.ray_ext import cluster
from raytrain_brats.run import held_out, members
from raytrain_brats.run.predictor import left_out, native_probabilities, shared_networks, voxel_mm3
from raytrain_brats.run.run_dir import RunDir
from raytrain_brats.scoring import lesions
from raytrain_brats.scoring.challenges import challenge_of, rule_2023
from raytrain_brats.scoring.metrics import dice_of

FEWEST = 4
"""Held-out cases; what fewer teach is chance."""
Tables = list[npt.NDArray[np.float64]]


@dataclass(frozen=True)
class Args:
    """Choose thresholds, smallest parts and smallest ET on held-out cases; keep what helps others than taught it."""

    run_dir: Uri = ""
    """The run, or a folder with the runs of its folds; by default RAYTRAIN_BRATS_RUN_DIR."""
    data: Uri = ""
    """Folder or manifest of the run's own cases; by default RAYTRAIN_BRATS_DATA."""
    store: Uri = ""
    """Prepared store, instead of --data; by default RAYTRAIN_BRATS_STORE."""
    best: bool = False
    """For the checkpoint with the best mean validation Dice, instead of the newest."""
    mirror: bool = True
    """Average over the eight mirror images, as `predict` does unless told not to."""


def work(args: Args) -> None:
    run_dir = run_folder(args.run_dir)
    manifest, source, cases = held_out.cases_of_run(run_dir, *cases_from(args.data, args.store), "val")
    networks = members.opened([run_dir], args.best)
    show_skipped(manifest.skipped)
    cluster.connect(held_bytes=members.weight_bytes(networks), own=members.parts_of(networks))
    shared = members.by_fold([(m.fold, ray.put((m.run.config, m.weights))) for m in networks], "val")
    challenge = challenge_of(source.convention, (case.id for case in cases))
    one = partial(_one, shared, source, args.mirror, challenge)
    given = cluster.parallel_map(one, cases, on_gpus=True, failed=lambda case, error: left_out(case.id, error))
    results = list(progress(given, "trying rules", len(cases)))
    for message in (r for r in results if isinstance(r, str)):
        print(f"left out: {message}", file=sys.stderr)
    tables = [r for r in results if not isinstance(r, str)]
    if len(tables) < FEWEST:
        raise RunFailed(f"{len(tables)} held-out cases could be used; {FEWEST} are needed to learn anything from them")
    learned = learn(tables)
    content: dict[str, Any] = {
        "rules": learned.rules.to_json(),
        "in_words": learned.rules.in_words(),
        "scores": "means of Dice and lesion-wise Dice (2023); after: each case by rules that the others taught",
        "before": learned.before,
        "after": learned.after,
        "cases": len(tables),
        "data": "phantom" if manifest.synthetic else "real",
        "mirror": args.mirror,
        "challenge": challenge,
        "members": [member.about() for member in networks],
    }
    for folder in dict.fromkeys([run_dir, *(member.run_dir for member in networks)]):
        _keep_earlier(folder, content["members"])
        storage.write_bytes(RunDir(folder).postprocessing, json.dumps(content, indent=1).encode())
    _show(learned, len(tables))
    if manifest.synthetic:
        print("these are phantoms: what they teach is made for phantoms")


def _keep_earlier(run_dir: str, members_now: list[dict[str, Any]]) -> None:
    """What was learned for other weights stays, by another name."""
    there = RunDir(run_dir).postprocessing
    with contextlib.suppress(FileNotFoundError, ValueError, KeyError, TypeError, IndexError):
        before = storage.read_bytes(there)
        weights = [str(member["weights"]) for member in json.loads(before)["members"]]
        if weights != [member["weights"] for member in members_now]:
            kept = there.removesuffix(".json") + f"-{weights[0][:8]}.json"
            storage.write_bytes(kept, before)
            print(f"what was learned for other weights is in {kept}")


def _one(shared: list[tuple[Any, ...]], source: Source, mirror: bool, challenge: str, case: Case) -> Tables | str:
    """What every candidate makes of a case; or why it was left out."""
    try:
        prepared = source.load(case)
    except InvalidCase as error:
        return left_out(case.id, error)
    networks, truth = shared_networks(shared[case.fold]), to_regions(prepared.truth_xyz(), source.convention)
    found = native_probabilities(prepared, networks, networks.device, mirror=mirror)
    x, y, z = np.linalg.norm(np.array(prepared.geometry.affine)[:3, :3], axis=0).tolist()

    def value(predicted: npt.NDArray[np.bool_], true: npt.NDArray[np.bool_]) -> tuple[float, float]:
        by_lesion = lesions.by_dilation(predicted, true, (x, y, z), rule_2023(challenge), distances=False)
        return dice_of(predicted, true), float(by_lesion.dice or 0.0)

    return tried(found, truth, voxel_mm3(prepared), value)


def _show(learned: Learned, cases: int) -> None:
    lines = Table("region", "Dice", "with rules", "lesion Dice 2023", "with rules", title=f"{cases} held-out cases")
    for region in REGIONS:
        both = zip(learned.before[region], learned.after[region], strict=True)
        lines.add_row(region, *(f"{number:.3f}" for pair in both for number in pair))
    show(lines)
    for line in learned.rules.in_words() or ["no rule helped cases that had no part in choosing it"]:
        print(line)


def main(argv: list[str] | None = None) -> int:
    return entry(Args, work, "postprocess", argv)


if __name__ == "__main__":
    sys.exit(main())
