"""Segment cases: `raytrain-brats predict --run-dir URI --images ... --out DIR`.

In: a run folder; 4D NIfTI files, or folders in MSD or BraTS layout or of 4D files; no labels needed.
Out: `<out>/<case>.nii.gz`, uint8 labels of the run's convention on each case's own grid, with the scan's own geometry.
"""

import sys
from dataclasses import dataclass
from functools import partial
from typing import Any

import ray
from rich.progress import track

from raytrain_brats import storage
from raytrain_brats.cli import Uri, default, entry, show_skipped
from raytrain_brats.data import scan
from raytrain_brats.data.manifest import Case
from raytrain_brats.data.nifti import Refused, label_file
from raytrain_brats.data.preprocess import preprocess
from raytrain_brats.data.store import Source
from raytrain_brats.errors import RunFailed, UserError
from raytrain_brats.labels import from_regions
from raytrain_brats.run import cluster, job
from raytrain_brats.run.validate import newest_weights, segment, shared_network


@dataclass(frozen=True)
class Args:
    """Write a label volume for every case given, by the run's newest checkpoint."""

    images: tuple[str, ...]
    """4D NIfTI files, or folders of cases (local or s3://)."""
    out: Uri
    """Where the label volumes go (local or s3://)."""
    run_dir: Uri = ""
    """The run; by default RAYTRAIN_BRATS_RUN_DIR."""
    strict: bool = False
    """Refuse places of which anything would not be used."""


def work(args: Args) -> None:
    if not (run_dir := default(args.run_dir, "RUN_DIR")):
        raise UserError("no run folder given; name one with --run-dir")
    run_dir, out = storage.normal(run_dir), storage.normal(args.out)
    settings, convention, _ = job.open_run(run_dir)
    if not args.images:
        raise UserError("no images given; name files or folders with --images")
    found, skipped = scan.scan_images(args.images)
    show_skipped(skipped, args.strict)
    targets = [storage.join(out, f"{case.id}.nii.gz") for _, case in found]
    for number, ((root, case), target) in enumerate(zip(found, targets, strict=True)):
        if target in targets[:number]:
            raise UserError(f"two images would be written to {target}; predict them into folders of their own")
        if target in (storage.join(root, path) for path in case.images):
            raise UserError(f"{target} is an image given; choose another --out, or it would be overwritten")
    items = [(Source(root, convention, settings.preprocess.spacing_mm), case) for root, case in found]
    storage.check_writable(out)
    _, weights = newest_weights(run_dir)
    cluster.connect()
    network = ray.put((settings, weights))
    written = cluster.parallel_map(partial(_one, network, out), items, on_gpus=True)
    refusals = [r for r in track(written, "predicting", len(items), disable=not sys.stdout.isatty()) if r]
    for message in refusals:
        print(f"refused: {message}", file=sys.stderr)
    print(f"{len(items) - len(refusals)} label volumes in {out}")
    if refusals:
        raise RunFailed(f"{len(refusals)} of {len(items)} cases could not be read")


def _one(shared: ray.ObjectRef[Any], out: str, item: tuple[Source, Case]) -> str:
    source, case = item
    try:
        volume = source.volume(case)
        header, prepared = volume.header, preprocess(volume, source.spacing_mm)
        del volume
    except Refused as error:
        return f"case {case.id}: {error.reason}, {error.detail}"
    network, settings, device = shared_network(shared)
    label = from_regions(segment(prepared, network, settings, device), source.convention)
    storage.write_bytes(storage.join(out, f"{case.id}.nii.gz"), label_file(label, header))
    return ""


def main(argv: list[str] | None = None) -> int:
    return entry(Args, work, "predict", argv)


if __name__ == "__main__":
    sys.exit(main())
