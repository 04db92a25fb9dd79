"""Warnings of any process, in one format. In: `logging`, by modules of this package. Out: lines on standard error.

A command's go to its terminal. Those of Ray's processes stand in Ray's logs of them; what a person must act on goes
through `journal.warn` into the run's events besides, and the driver's progress shows it.
"""

import logging


class _Lower(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return f"{record.levelname.lower()}: {super().format(record)}"


def show() -> None:
    """Have this process's warnings shown; a second call changes nothing."""
    logger = logging.getLogger("raytrain_brats")
    if not logger.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(_Lower())
        logger.addHandler(handler)
        logger.propagate = False
