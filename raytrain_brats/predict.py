"""Segment cases: `raytrain-brats predict --run-dir URI --images ... --out DIR`.

In: a run folder, or several; 4D NIfTI files, patients' 3D files or folders, data sets (docs/data.md); no labels needed.
Out: `<out>/<case>.nii.gz`, uint8 labels of the run's convention on each case's own grid, with the scan's own geometry;
on request `<case>_probabilities.nii.gz` and pictures, `overlays/<case>.png`; `made-by.json` beside them: by which runs
and checkpoints, from which files, what the values mean. What was made earlier from the same files by the same
checkpoints is not made again.
"""

import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import ray

from raytrain_brats import config, outputs, provenance, storage
from raytrain_brats.cases import scan
from raytrain_brats.cli import Pace, Uri, entry, progress, run_folder, show_skipped, span
from raytrain_brats.data import manifest as manifests
from raytrain_brats.data.manifest import Case
from raytrain_brats.data.nifti import InvalidCase, background_warning
from raytrain_brats.data.on_grid import label_file, probability_file
from raytrain_brats.data.preprocess import Prepared, preprocess, restore, to_ras
from raytrain_brats.data.store import Source
from raytrain_brats.errors import RunFailed, UserError
from raytrain_brats.labels import MODALITIES, REGIONS, comparable, described, from_regions
from raytrain_brats.learn.postprocess import Rules, masks_by
from raytrain_brats.ray_ext import cluster
from raytrain_brats.reporting import overlays
from raytrain_brats.run import members
from raytrain_brats.run.members import Member
from raytrain_brats.run.predictor import left_out, native_probabilities, shared_networks, voxel_mm3
from raytrain_brats.run.run_dir import RunDir
from raytrain_brats.scoring.metrics import Masks

GIVE_UP = 10
"""So many cases, the first of all, fail: then it is not the cases."""
Found = list[tuple[str, Case]]
"""(folder, case) of each case given."""
Row = tuple[str, str]
"""What became of a case: "", warning, refused (the files are at fault) or failed; and the message."""


@dataclass(frozen=True)
class Args:
    """Write a label volume for every case given, by the newest checkpoint of a run, or of several together."""

    images: tuple[str, ...]
    """4D NIfTI files, the four files of a patient, or folders of these (local or s3://)."""
    out: Uri
    """Where the label volumes go (local or s3://)."""
    run_dir: tuple[Uri, ...] = ()
    """The run, or a file made by `share`; of several, or of one with folds, the mean of the probabilities. By default
    RAYTRAIN_BRATS_RUN_DIR."""
    best: bool = False
    """By each run's checkpoint with the best mean validation Dice, instead of its newest."""
    convention: str = ""
    """Write the label values of another convention, such as brats2023; by default those that the run learned."""
    mirror: bool = True
    """Average over the eight mirror images, as nnU-Net does; --no-mirror takes an eighth of the time."""
    postprocess: bool = True
    """Apply what `raytrain-brats postprocess` learned for these networks, if it did."""
    save_probabilities: bool = False
    """Also write CASE_probabilities.nii.gz: WT, TC, ET as (x, y, z, 3), in steps of 1/255."""
    overlays: int = 0
    """Also draw so many cases, the first given: overlays/CASE.png, three planes with outlines and volumes."""
    strict: bool = False
    """Refuse places of which anything would not be used."""
    overwrite: bool = False
    """Also replace label volumes in --out that another checkpoint or another program made; never images or labels."""


@dataclass(frozen=True)
class Job:
    """What is done with every case; it travels to the processes that do it."""

    out: str
    networks: tuple[Any, ...]
    rules: Rules
    mirror: bool
    save_probabilities: bool
    drawn: frozenset[str]
    """Cases of which a picture is made."""


@dataclass(frozen=True)
class Read:
    """A case that is ready for the network."""

    case_id: str
    convention: str
    prepared: Prepared
    header: bytes
    warning: str


def work(args: Args) -> list[str]:
    """Paths of the label volumes of all cases given. Raises UserError, and RunFailed when one is missing."""
    given = [run_folder(name) for name in args.run_dir or ("",)]
    out, networks = storage.normal(args.out), members.opened(given, args.best)
    taught, said = members.rules_of(given, networks, args.mirror) if args.postprocess else (None, "no post-processing")
    rules = taught or Rules()
    run, learned = networks[0].run, networks[0].run.convention
    convention = args.convention or learned
    if not comparable(convention, learned):
        raise UserError(
            f"{networks[0].run_dir} learned {described(learned)}, asked for is {described(convention)}, in which WT, "
            "TC and ET are other tissues; leave --convention out"
        )
    if not args.images:
        raise UserError("no images given; name files or folders with --images")
    found, skipped = scan.scan_images(args.images)
    show_skipped(skipped, args.strict)
    what = f"the mean of {len(networks)} networks, the first: " if len(networks) > 1 else ""
    print(f"{what}{config.described('run', run.config)}; label values written: {described(convention)}")
    print(said)
    if assumed := scan.unstated(found):
        print(
            f"4D images ({len(assumed)}, such as {assumed[0]}): no dataset.json says what their channels are; taken as "
            f"{', '.join(MODALITIES)}"
        )
    drawn = frozenset(case.id for _, case in found[: max(args.overlays, 0)])
    there = _claimed(args, found, networks, rules, convention, drawn)
    items = [
        (Source(root, convention, run.config.preprocess.spacing_mm), case)
        for root, case in found
        if not there.issuperset(_names(case, args.save_probabilities, drawn))
    ]
    made = [storage.join(out, _names(case, False, frozenset())[0]) for _, case in found]
    already = f", {len(found) - len(items)} were there already" if len(items) < len(found) else ""
    if not items:
        print(f"0 label volumes made{already}, in {out}")
        return made
    cluster.connect(held_bytes=members.weight_bytes(networks), own=members.parts_of(networks))
    references = tuple(ray.put((member.run.config, member.weights)) for member in networks)
    del networks
    missing = _predict(Job(out, references, rules, args.mirror, args.save_probabilities, drawn), items)
    print(f"{len(items) - missing} label volumes{already and f' made{already},'} in {out}")
    if missing:
        raise RunFailed(
            f"{missing} of {len(items)} cases have no prediction, as named above; the same command tries them again"
        )
    return made


def _predict(job: Job, items: list[tuple[Source, Case]]) -> int:
    """Predict all that can be; how many could not. Raises RunFailed where it is not the cases that are at fault."""
    rows = cluster.parallel_map(partial(_segment, job), items, on_gpus=True, read=_read, failed=_named)
    began = time.monotonic()
    pace, count = Pace(cluster.at_once(on_gpus=True)), Counter[str]()
    for done, (kind, message) in enumerate(_shown(rows, pace, len(items)), 1):
        count[kind] += 1
        if message:
            print(f"{kind}: {message}", file=sys.stderr, flush=True)
        if count["failed"] == done == min(GIVE_UP, len(items)):
            raise RunFailed(f"the first {done} cases all failed, the last with {message}")
    views = "as 8 mirror images each (--no-mirror: one)" if job.mirror else "as one image each"
    print(f"{len(items)} cases in {span(time.monotonic() - began)}, {views}")
    if not pace.told and (estimate := pace.estimate()):
        print(estimate)
    return count["refused"] + count["failed"]


def _shown(rows: Iterator[Row], pace: Pace, total: int) -> Iterator[Row]:
    for row in progress(rows, "predicting", total):
        if estimate := pace.add():
            print(estimate, flush=True)
        yield row


def _names(case: Case, with_probabilities: bool, drawn: frozenset[str]) -> list[str]:
    names = [f"{case.id}.nii.gz"] + ([f"{case.id}_probabilities.nii.gz"] if with_probabilities else [])
    return names + ([f"overlays/{case.id}.png"] if case.id in drawn else [])


def _claimed(
    args: Args, found: Found, networks: list[Member], rules: Rules, convention: str, drawn: frozenset[str]
) -> set[str]:
    """Names of what need not be made again; notes down what the others are made from. Raises UserError."""
    out = storage.normal(args.out)
    images = [[storage.join(root, path) for path in case.images] for root, case in found]
    given = [uri for uris in images for uri in uris]
    names = [_names(case, args.save_probabilities, drawn) for _, case in found]
    number = Counter(name for both in names for name in both)
    if twice := [name for name in number if number[name] > 1]:
        target = storage.join(out, twice[0])
        raise UserError(f"two images would be written to {target}; predict them into folders of their own")
    roots = {root: uris[0] for (root, _), uris in zip(found, images, strict=True)}
    for member in networks:
        _check_folder(out, roots, given, member.run_dir)
    with ThreadPoolExecutor(16) as pool:  # on S3 each is a request
        stamps = dict(zip(given, pool.map(outputs.stamp, given), strict=True))
    made_with = f"{members.named(networks)}, labels {convention}{', mirrored' if args.mirror else ''}"
    made_with += "".join(f"; {line}" for line in rules.in_words())
    origins = {
        name: f"{made_with}, " + ", ".join(f"{uri.rpartition('/')[2]} ({stamps[uri]})" for uri in uris)
        for both, uris in zip(names, images, strict=True)
        for name in both
    }
    about: dict[str, Any] = {"members": [member.made_of() for member in networks], "made_with": made_with}
    if len(networks) == 1:
        about["run"] = outputs.place(networks[0].run_dir)
    about |= {"program": {"version": provenance.version(), **provenance.commits()}}
    about |= {"mirror": args.mirror, "postprocessing": rules.to_json()} | manifests.meaning(convention)
    if args.save_probabilities:
        about["probabilities"] = f"of {', '.join(REGIONS)} along the fourth axis, in steps of 1/255"
    return outputs.claim(out, "predict", origins, settings=about, protected=given, overwrite=args.overwrite)


def _check_folder(out: str, roots: dict[str, str], images: list[str], run_dir: str) -> None:
    """Raises UserError where label volumes have no place: among images or labels, among a run's own files."""
    for folder, image in (roots | {image.rpartition("/")[0]: image for image in images}).items():
        if outputs.same(out, folder):
            raise UserError(f"--out {out} is the folder of images given, such as {image}; give another --out")
    if (kind := outputs.place(out).rpartition("/")[2]).lower() in outputs.DATA_FOLDERS:
        raise UserError(f"--out {out}: predictions in {kind} would pass for the data set's own; give another --out")
    if outputs.same(out, run_dir) or any(outputs.within(out, RunDir(run_dir).file(name)) for name in RunDir.FOLDERS):
        raise UserError(f"--out {out} holds the run's own files; give another --out")


def _read(item: tuple[Source, Case]) -> Read:
    """Raises InvalidCase."""
    source, case = item
    volume = source.volume(case)
    header, warning = volume.header, background_warning(volume)
    return Read(case.id, source.convention, preprocess(volume, source.spacing_mm), header, warning)


def _segment(job: Job, read: Read) -> Row:
    networks = shared_networks(job.networks)
    found = native_probabilities(read.prepared, networks, networks.device, mirror=job.mirror)
    masks = masks_by(job.rules, found, voxel_mm3(read.prepared))
    files = {f"{read.case_id}.nii.gz": label_file(from_regions(masks, read.convention), read.header)}
    if job.save_probabilities:
        files[f"{read.case_id}_probabilities.nii.gz"] = probability_file(found, read.header)
    if read.case_id in job.drawn:
        files[f"overlays/{read.case_id}.png"] = _picture(read, masks)
    try:
        for name, content in files.items():
            storage.write_bytes(storage.join(job.out, name), content)
    except OSError as error:  # it would be the same with every case
        raise RunFailed(str(error)) from error
    return ("warning", f"case {read.case_id}: {read.warning}") if read.warning else ("", "")


def _picture(read: Read, masks: Masks) -> bytes:
    geometry, image = read.prepared.geometry, read.prepared.image_czyx[list(overlays.CHANNELS)].astype(np.float32)
    shown, found = (to_ras(each, geometry.axes, geometry.flips) for each in (restore(image, geometry), masks))
    return overlays.draw(overlays.cut(read.case_id, shown, None, found, geometry.native_mm.tolist()), {})


def _named(item: tuple[Source, Case], error: Exception) -> Row:
    """The end of one case, not of the others."""
    return "refused" if isinstance(error, InvalidCase) else "failed", left_out(item[1].id, error)


def main(argv: list[str] | None = None) -> int:
    return entry(Args, work, "predict", argv)


if __name__ == "__main__":
    sys.exit(main())
