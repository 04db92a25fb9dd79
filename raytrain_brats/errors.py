"""The two ways a command ends badly: the user can mend it (exit 2), or we failed (exit 1).

In: an entry's work function.
Out: its exit code; one line on standard error for a user's mistake, never a traceback.
"""

import sys
from collections.abc import Callable


class UserError(Exception):
    """Something the user can mend. The message says what was wrong, where, and what to do."""


class RunFailed(Exception):  # noqa: N818 - it reads better than RunFailedError
    """The work could not be finished although the request was sound; what was saved stays saved."""


def run_entry(work: Callable[[], None]) -> int:
    """Run `work` and turn its outcome into an exit code: 0 done, 2 user's mistake, 1 failure, 130 Ctrl-C."""
    try:
        work()
    except UserError as error:
        print(f"error: {_one_line(error)}", file=sys.stderr)
        return 2
    except RunFailed as error:
        print(f"failed: {_one_line(error)}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"failed: {_one_line(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from the newest checkpoint", file=sys.stderr)
        return 130
    return 0


def _one_line(error: Exception) -> str:
    # What Ray hands back from a task is of the error's own class, but prints a traceback; `cause` is the error.
    return " ".join(str(getattr(error, "cause", error)).splitlines())
