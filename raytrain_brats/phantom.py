"""Write labelled BraTS-like cases: `raytrain-brats phantom --out DIR --cases N`.

In: how many, on which grid, from which seed.
Out: a folder in MSD layout; the same arguments give the same bytes. What is there of the same phantoms stays.
"""

import sys
from dataclasses import dataclass
from functools import partial
from typing import Literal

from rich.progress import track

from raytrain_brats import storage
from raytrain_brats.cli import Uri, entry
from raytrain_brats.errors import UserError
from raytrain_brats.ray_ext import cluster
from raytrain_brats.synthetic.phantom import missing, write_set


@dataclass(frozen=True)
class Args:
    """Draw synthetic gliomas in four contrasts, over all CPUs. They are for trying things out: no patient data."""

    out: Uri
    """Folder to write, in MSD Task01 layout (local): empty, new, or of the same phantoms, then more are added."""
    cases: int = 20
    """Number of cases; a larger set begins with the same ones."""
    grid: int = 60
    """Voxels along x and y: 240 is the size of real cases (1 mm), 60 a quick one (4 mm)."""
    seed: int = 0
    """Another seed draws other patients."""
    anatomy: Literal["procedural", "mni"] = "procedural"
    """procedural: drawn, no data needed; mni: from the tissue maps that ship with nilearn, which must be installed."""


def work(args: Args) -> None:
    if args.cases < 1 or not 32 <= args.grid <= 512:
        raise UserError(f"--cases {args.cases} --grid {args.grid}: at least 1 case, on a grid of 32 to 512")
    if storage.is_s3(args.out):
        raise UserError(f"--out {args.out}: phantoms are written to a local folder; copy them from there")
    out = storage.normal(args.out)
    try:
        todo, unlisted = missing(out, args.cases, args.seed, args.grid, args.anatomy)
        if not todo and not unlisted:
            print(f"{out} holds these {args.cases} phantoms already: synthetic, not patient data")
            return
        storage.check_writable(out)
        cluster.connect()
        cluster.check_shared({"output folder": out})
        show = partial(track, description="drawing", total=len(todo), disable=not sys.stdout.isatty())
        size = write_set(
            out, args.cases, args.seed, args.grid, args.anatomy, lambda f, n: show(cluster.parallel_map(f, n))
        )
    except ValueError as error:
        raise UserError(str(error)) from error
    there = f", {args.cases - len(todo)} were there already" if len(todo) < args.cases else ""
    print(f"{len(todo)} phantoms ({size / 1e6:,.1f} MB) in {out}{there}: synthetic, not patient data")


def main(argv: list[str] | None = None) -> int:
    return entry(Args, work, "phantom", argv)


if __name__ == "__main__":
    sys.exit(main())
