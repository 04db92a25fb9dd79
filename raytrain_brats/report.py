"""Write a run's page: `raytrain-brats report --run-dir URI [--beside URI]`.

In: a run folder (local or s3://); only rows of steps must be there.
Out: `report.html` beside it, or at --out; its place on the terminal.
"""

import sys
from dataclasses import dataclass

from raytrain_brats.cli import Uri, entry, run_folder
from raytrain_brats.reporting.page import write_report


@dataclass(frozen=True)
class Args:
    """Write one page about a run: scores, worst cases, curves, worker timeline, where the time went."""

    run_dir: Uri = ""
    """The run folder that `train` wrote (local or s3://); by default RAYTRAIN_BRATS_RUN_DIR."""
    out: Uri = ""
    """Where the page goes; by default report.html in the run folder."""
    beside: Uri = ""
    """An earlier run: scores, speed, cost and settings of both, and what makes them no fair comparison."""
    title: str = ""
    """What the page is called; by default the recipe and the number of cases."""
    overwrite: bool = False
    """Also replace a file at --out that is no report of this run; never a file of the run, an image or a label."""


def work(args: Args) -> None:
    given = run_folder(args.run_dir), args.out, args.overwrite
    print(write_report(*given, earlier=args.beside, title=args.title))


def main(argv: list[str] | None = None) -> int:
    return entry(Args, work, "report", argv)


if __name__ == "__main__":
    sys.exit(main())
