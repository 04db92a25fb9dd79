"""Elastic training of 3D brain-tumour segmentation on Ray.

In: BraTS or MSD Task01 cases as .nii.gz, on a local disk or on S3.
Out: a trained network, its scores, predictions and a report; see README.md.
"""

import sys

__version__ = "0.1.0"


def _is_command() -> bool:
    """Whether `python -m raytrain_brats.NAME` starts just now: runpy has put "-m" for the name of the program."""
    given = getattr(sys, "argv", [])
    name = sys.orig_argv[-len(given)].removeprefix("-m") if given[:1] == ["-m"] else ""
    return name.startswith("raytrain_brats") and name.count(".") < 2


def _quiet_until_installed() -> None:
    """A signal during our first imports ends the process without a traceback; `interrupt.install` takes over."""
    import _signal  # signal itself imports enum: 10 ms

    if _signal.getsignal(_signal.SIGINT) is _signal.default_int_handler:
        _signal.signal(_signal.SIGINT, _signal.SIG_DFL)


if _is_command() or (sys.argv[:1] and sys.argv[0].endswith("raytrain-brats")):
    _quiet_until_installed()
if _is_command():  # before anything is imported that takes a while or that a file of the same name hides
    from raytrain_brats import shadow

    if not sys.flags.safe_path and (_told := shadow.clash(sys.path[0] or ".")):
        print(f"error: {_told}", file=sys.stderr)
        sys.exit(2)
    from raytrain_brats import home, interrupt

    interrupt.install()
    home.provide()
