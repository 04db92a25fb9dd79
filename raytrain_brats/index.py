"""Find, checksum and deal the cases of a folder: `raytrain-brats index --data URI --out FILE`.

In: a folder in one of the layouts of docs/data.md, local or s3://; a file of folds, where they are given.
Out: a manifest (JSON lines); what was not taken is named, and stands in it; copies of equal content are kept on one
side of every split.
"""

import sys
from collections import Counter
from dataclasses import dataclass

from raytrain_brats import labels, outputs, storage
from raytrain_brats.cases import folds, scan
from raytrain_brats.cli import Uri, default, entry, progress, show_skipped
from raytrain_brats.data import manifest as manifests
from raytrain_brats.data.manifest import Manifest
from raytrain_brats.errors import UserError


@dataclass(frozen=True)
class Args:
    """List the cases of a folder with sizes, checksums and folds, in a manifest that other commands take as --data."""

    out: Uri
    """The manifest to write, ending in .jsonl (local or s3://)."""
    data: Uri = ""
    """Folder in MSD, nnU-Net or BraTS layout (local or s3://); by default RAYTRAIN_BRATS_DATA."""
    convention: str = "auto"
    """What label values mean, where the data do not say: msd, brats2017_2021, brats2023, brats2024_gli, brats2024_met,
    brats2024_ped, article."""
    folds: Uri = ""
    """nnU-Net's splits_final.json or FeTS's partitioning_*.csv, instead of folds dealt by subject."""
    strict: bool = False
    """Refuse a folder of which anything would not be used."""
    overwrite: bool = False
    """Replace a manifest of other data, of another convention or of other folds."""


def work(args: Args) -> None:
    data = default(args.data, "DATA")
    if not data:
        raise UserError("no data given; name a folder with --data")
    if data.endswith(".jsonl"):  # its folder is looked at anew
        data = manifests.read(storage.normal(data)).root
    if not args.out.endswith(".jsonl"):
        raise UserError(f"--out {args.out}: a manifest's name ends in .jsonl")
    if args.convention != "auto":
        labels.known(args.convention)
    out = storage.normal(args.out)
    found = scan.scan(data, args.convention)
    before = _before(out, found.root, args.overwrite)
    storage.check_writable(out.rpartition("/")[0])
    if args.strict:
        show_skipped(found.skipped, strict=True)
    found = scan.checksummed(found, lambda rows, total: progress(rows, "checksums", total))
    if args.folds:
        found = folds.dealt(found, args.folds)
    if before and not args.overwrite:
        _check_same(out, before, found)
    manifests.write(found, out)
    counts = Counter(case.fold for case in found.cases)
    subjects = len({case.subject for case in found.cases})
    print(f"cases: {len(found.cases)}, subjects: {subjects}, {sum(c.bytes for c in found.cases) / 1e6:,.1f} MB")
    print(f"layout: {found.layout}; labels: {labels.described(found.convention)}")
    if turned := [case.channels for case in found.cases if case.channels]:
        there = ", ".join(labels.MODALITIES[turned[0].index(channel)] for channel in range(len(labels.MODALITIES)))
        print(f"channels of the files: {there}; they are read as {', '.join(labels.MODALITIES)}")
    print(f"folds of {', '.join(str(counts[fold]) for fold in range(manifests.FOLDS))} cases -> {args.out}")
    for copies in manifests.duplicates(found):
        print(f"equal content, kept in one fold: {', '.join(copies)}")
    show_skipped(found.skipped)


def _before(out: str, root: str, overwrite: bool) -> Manifest | None:
    """The manifest that is there. Raises UserError when a file is there that this command did not make of the same
    folder."""
    if not storage.exists(out):
        return None
    try:
        before = manifests.read(out)
    except UserError:
        before = None
    if before and before.cases and before.cases[0].object:
        raise UserError(f"{out} is the index of a store, and is not replaced; give another --out")
    if not overwrite and not (before and outputs.same(before.root, root)):
        what = f"the manifest of {before.root}" if before else "no manifest that could be read"
        raise UserError(f"{out} is {what}; give another --out, or say --overwrite")
    if not overwrite and not manifests.as_written(out):
        raise UserError(f"{out} was changed by hand since; give another --out, or say --overwrite")
    return before


def _check_same(out: str, before: Manifest, found: Manifest) -> None:
    """Raises UserError when what a user decided in the manifest before would be lost: the convention, the folds."""
    remedy = "give another --out, or say --overwrite"
    if before.convention != found.convention:
        was, now = labels.described(before.convention), labels.described(found.convention)
        raise UserError(f"{out} reads the labels as {was}, now it would be {now}; {remedy}")
    fold_of = {case.id: case.fold for case in found.cases}
    moved = [case for case in before.cases if fold_of.get(case.id, case.fold) != case.fold]
    if moved and before.cases != scan.dealt(before.cases):
        raise UserError(
            f"{out} has folds that somebody stated; {len(moved)} cases would change theirs, such as {moved[0].id} "
            f"from {moved[0].fold} to {fold_of[moved[0].id]}; {remedy}"
        )


def main(argv: list[str] | None = None) -> int:
    return entry(Args, work, "index", argv)


if __name__ == "__main__":
    sys.exit(main())
