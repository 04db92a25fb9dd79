"""Warnings of any process, in one format. Runs in any process.

In: `logging`, by modules of this package.
Out: lines on standard error.

Warnings of a command go to its terminal, those of Ray's processes to Ray's logs. What a person must act on also goes
into the run's events, by `journal.warn`, and the driver's progress shows it.
"""

import contextlib
import logging
import sys


class _ToStderr(logging.Handler):
    """As `warning: text`, on the standard error of the moment."""

    def emit(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(OSError, ValueError):  # it may be a file on the disk that is full, or closed
            print(f"{record.levelname.lower()}: {record.getMessage()}", file=sys.stderr, flush=True)


def show() -> None:
    """Have this process's warnings shown; a second call changes nothing."""
    logger = logging.getLogger("raytrain_brats")
    if not logger.handlers:
        logger.addHandler(_ToStderr(logging.WARNING))
