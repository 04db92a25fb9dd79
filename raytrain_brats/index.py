"""Find, checksum and deal the cases of a folder: `raytrain-brats index --data URI --out FILE`.

In: a folder in MSD or BraTS 2018-2021 layout, local or s3://.
Out: a manifest (JSON lines); copies of equal content are named and kept on one side of every split.
"""

import sys
from collections import Counter
from dataclasses import dataclass

from rich.progress import track

from raytrain_brats import storage
from raytrain_brats.cli import Uri, default, entry
from raytrain_brats.data import manifest as manifests
from raytrain_brats.errors import UserError


@dataclass(frozen=True)
class Args:
    """List the cases of a folder with sizes, checksums and folds, in a manifest that other commands take as --data."""

    out: Uri
    """The manifest to write, ending in .jsonl (local or s3://)."""
    data: Uri = ""
    """Folder in MSD or BraTS 2018-2021 layout (local or s3://); by default RAYTRAIN_BRATS_DATA."""


def work(args: Args) -> None:
    data = default(args.data, "DATA")
    if not data:
        raise UserError("no data given; name a folder with --data")
    if not args.out.endswith(".jsonl"):
        raise UserError(f"--out {args.out}: a manifest's name ends in .jsonl")
    storage.check_writable(storage.normal(args.out).rpartition("/")[0])
    found = manifests.open_manifest(
        data, lambda rows, total: track(rows, "checksums", total, disable=not sys.stdout.isatty())
    )
    manifests.write(found, storage.normal(args.out))
    folds = Counter(case.fold for case in found.cases)
    print(f"{len(found.cases)} cases, {sum(c.bytes for c in found.cases) / 1e6:,.1f} MB, {found.layout} layout")
    print(f"folds of {', '.join(str(folds[fold]) for fold in range(manifests.FOLDS))} cases -> {args.out}")
    for copies in manifests.duplicates(found):
        print(f"equal content, kept in one fold: {', '.join(copies)}")


def main(argv: list[str] | None = None) -> int:
    return entry(Args, work, "index", argv)


if __name__ == "__main__":
    sys.exit(main())
