"""Segment cases: `raytrain-brats predict --run-dir URI --images ... --out DIR`.

In: a run folder; 4D NIfTI files, patients' 3D files or folders, data sets (docs/data.md); no labels needed.
Out: `<out>/<case>.nii.gz`, uint8 labels of the run's convention on each case's own grid, with the scan's own geometry;
`made-by.json` beside them: by which run and checkpoint, from which files, what the values mean. What was made
earlier from the same files by the same checkpoint is not made again.
"""

import hashlib
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import ray
from rich.progress import track
from safetensors.torch import save as tensors_to_bytes

from raytrain_brats import config, outputs, storage
from raytrain_brats.cases import scan
from raytrain_brats.cli import Uri, entry, run_folder, show_skipped
from raytrain_brats.data import manifest as manifests
from raytrain_brats.data.manifest import Case
from raytrain_brats.data.nifti import InvalidCase, background_warning, label_file
from raytrain_brats.data.preprocess import preprocess
from raytrain_brats.data.store import Source
from raytrain_brats.errors import RunFailed, UserError
from raytrain_brats.labels import MODALITIES, comparable, described, from_regions
from raytrain_brats.ray_ext import cluster
from raytrain_brats.run import spec
from raytrain_brats.run.predictor import newest_weights, predict_masks, shared_network
from raytrain_brats.run.run_dir import RunDir


@dataclass(frozen=True)
class Args:
    """Write a label volume for every case given, by the run's newest checkpoint."""

    images: tuple[str, ...]
    """4D NIfTI files, the four files of a patient, or folders of these (local or s3://)."""
    out: Uri
    """Where the label volumes go (local or s3://)."""
    run_dir: Uri = ""
    """The run; by default RAYTRAIN_BRATS_RUN_DIR."""
    convention: str = ""
    """Write the label values of another convention, such as brats2023; by default those that the run learned."""
    mirror: bool = True
    """Average over the eight mirror images, as nnU-Net does; --no-mirror takes an eighth of the time."""
    strict: bool = False
    """Refuse places of which anything would not be used."""
    overwrite: bool = False
    """Also replace label volumes in --out that another checkpoint or another program made; never images or labels."""


def work(args: Args) -> None:
    run_dir, out = run_folder(args.run_dir), storage.normal(args.out)
    run = spec.open_run(run_dir)
    settings, learned = run.config, run.convention
    convention = args.convention or learned
    if not comparable(convention, learned):
        raise UserError(
            f"{run_dir} learned {described(learned)}, asked for is {described(convention)}, in which WT, TC and ET are "
            "other tissues; leave --convention out"
        )
    if not args.images:
        raise UserError("no images given; name files or folders with --images")
    found, skipped = scan.scan_images(args.images)
    show_skipped(skipped, args.strict)
    print(f"{config.described('run', settings)}; label values written: {described(convention)}")
    if assumed := scan.unstated(found):
        print(
            f"4D images ({len(assumed)}, such as {assumed[0]}): no dataset.json says what their channels are; taken as "
            f"{', '.join(MODALITIES)}"
        )
    checkpoint, weights = newest_weights(run_dir)
    digest = hashlib.sha256(tensors_to_bytes(weights)).hexdigest()[:8]
    made_with = f"checkpoint {checkpoint} ({digest}), labels {convention}{', mirrored' if args.mirror else ''}"
    there = _claimed(args, found, run_dir, made_with, convention)
    items = [
        (Source(root, convention, settings.preprocess.spacing_mm), case)
        for root, case in found
        if _name(case) not in there
    ]
    already = f", {len(there)} were there already" if there else ""
    if not items:
        print(f"0 label volumes made{already}, in {out}")
        return
    cluster.connect()
    network = ray.put((settings, weights))
    began = time.perf_counter()
    one = partial(_one, network, out, mirror=args.mirror)
    written = cluster.parallel_map(one, items, on_gpus=True)
    told_of = [row for row in track(written, "predicting", len(items), disable=not sys.stdout.isatty()) if row[1]]
    for kind, message in told_of:
        print(f"{kind}: {message}", file=sys.stderr)
    refusals = [message for kind, message in told_of if kind == "refused"]
    print(f"{len(items) - len(refusals)} label volumes{already and f' made{already},'} in {out}")
    views = "as 8 mirror images each (--no-mirror: one)" if args.mirror else "as one image each"
    print(f"{len(items)} cases in {time.perf_counter() - began:,.0f} s, {views}")
    if refusals:
        raise RunFailed(f"{len(refusals)} of {len(items)} cases could not be read")


def _name(case: Case) -> str:
    return f"{case.id}.nii.gz"


def _claimed(args: Args, found: list[tuple[str, Case]], run_dir: str, made_with: str, convention: str) -> set[str]:
    """Names of what need not be made again; notes down what the others are made from. Raises UserError."""
    out = storage.normal(args.out)
    images = [[storage.join(root, path) for path in case.images] for root, case in found]
    given = [uri for uris in images for uri in uris]
    number = Counter(_name(case) for _, case in found)
    if twice := [name for name in number if number[name] > 1]:
        target = storage.join(out, twice[0])
        raise UserError(f"two images would be written to {target}; predict them into folders of their own")
    _check_folder(out, {root: uris[0] for (root, _), uris in zip(found, images, strict=True)}, given, run_dir)
    with ThreadPoolExecutor(16) as pool:  # on S3 each is a request
        stamps = dict(zip(given, pool.map(outputs.stamp, given), strict=True))
    origins = {
        _name(case): f"{made_with}, " + ", ".join(f"{uri.rpartition('/')[2]} ({stamps[uri]})" for uri in uris)
        for (_, case), uris in zip(found, images, strict=True)
    }
    about = {
        "run": outputs.place(run_dir),
        "made_with": made_with,
        "mirror": args.mirror,
    } | manifests.meaning(convention)
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


def _one(
    shared: ray.ObjectRef[Any], out: str, item: tuple[Source, Case], mirror: bool | None = None
) -> tuple[str, str]:
    """(refused or warning, the message, if any)."""
    source, case = item
    try:
        volume = source.volume(case)
        header, warning, prepared = volume.header, background_warning(volume), preprocess(volume, source.spacing_mm)
        del volume
    except InvalidCase as error:
        return "refused", f"case {case.id}: {error.reason}, {error.detail}"
    network, settings, device = shared_network(shared)
    label = from_regions(predict_masks(prepared, network, settings, device, mirror=mirror), source.convention)
    storage.write_bytes(storage.join(out, f"{case.id}.nii.gz"), label_file(label, header))
    return "warning", warning and f"case {case.id}: {warning}"


def main(argv: list[str] | None = None) -> int:
    return entry(Args, work, "predict", argv)


if __name__ == "__main__":
    sys.exit(main())
