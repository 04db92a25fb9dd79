"""Give libraries a home folder and a user name where the machine has none for this user, as in containers.

In: the environment as a command finds it: HOME, USER; the account's entry.
Out: the same, with a temporary folder for what must be written, and a name for a user without one.

Ray, torch and Matplotlib fail when imported without a home or a name, or print warnings that need no action.
"""

import contextlib
import os
import pwd
import tempfile


def provide() -> None:
    """Set HOME, USER and MPLCONFIGDIR where libraries would miss them. A home that can only be read stays the home."""
    if not {"LOGNAME", "USER", "LNAME", "USERNAME"} & os.environ.keys():
        try:
            pwd.getpwuid(os.getuid())
        except KeyError:
            os.environ["USER"] = f"user{os.getuid()}"
    if writable():
        return
    place = os.path.join(tempfile.gettempdir(), f"raytrain_brats-{os.getuid()}")
    with contextlib.suppress(OSError):  # then libraries find no home, as without this
        os.makedirs(place, mode=0o700, exist_ok=True)
        if os.stat(place).st_uid == os.getuid():
            os.environ.setdefault("MPLCONFIGDIR", place)
            if not os.path.isdir(os.path.expanduser("~")):
                os.environ["HOME"] = place


def writable() -> bool:
    home = os.path.expanduser("~")
    return os.path.isdir(home) and os.access(home, os.W_OK | os.X_OK)
