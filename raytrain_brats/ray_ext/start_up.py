"""Before Ray starts: find a cluster that answers, or a folder for the sockets of a new one. Runs in the driver.

In: RAY_ADDRESS, the file that `ray start` leaves, RAY_TMPDIR, TMPDIR; the current folder.
Out: the address to join, a folder for Ray's temporary files; or UserError with the remedy, within seconds.

Ray itself waits a quarter of an hour for a cluster that is gone, and prints a traceback where it finds no folder.
"""

import contextlib
import os
import re
import secrets
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from raytrain_brats import home, shadow
from raytrain_brats.errors import UserError
from raytrain_brats.ray_ext.internals import core

PATIENCE_S = 15.0
"""For a head named by RAY_ADDRESS, which may be starting or busy."""
_LEFT_S = 5.0
"""For an address that an earlier `ray start` left in a file."""
TELL_S = 10.0
"""How often it is told that Ray still starts."""
_TOKEN = "asks for a token"  # noqa: S105 - a message, not a secret
_SOCKET = len("/ray/session_2025-01-01_00-00-00_000000_1234567/sockets/plasma_store.1")
ROOM = 107 - _SOCKET
"""Bytes that the path of a Unix socket leaves to RAY_TMPDIR; 107 is the kernel's limit."""


@contextlib.contextmanager
def telling(what: str) -> Iterator[None]:
    """Say what is being done, and how long it has been, while it takes its time."""
    over, began = threading.Event(), time.monotonic()

    def tell() -> None:
        while not over.wait(TELL_S):
            with contextlib.suppress(OSError):  # that nobody reads it the command finds out by itself
                print(f"{what}: {time.monotonic() - began:.0f} s so far", flush=True)

    print(f"{what} ...", flush=True)
    threading.Thread(target=tell, name="telling", daemon=True).start()
    try:
        yield
    finally:
        over.set()


def address() -> str:
    """HOST:PORT of the cluster to join; "" where one is to be started. Raises UserError when the one named is gone."""
    given = os.environ.get("RAY_ADDRESS", "")
    if given == "local":
        return ""
    if given and given != "auto":
        if not re.fullmatch(r"[^/\s]+:\d+", given):
            raise UserError(
                f"RAY_ADDRESS={given} is no HOST:PORT of a Ray head; give that, or unset RAY_ADDRESS and submit the "
                "command as a job: ray job submit --address http://HOST:8265 -- raytrain-brats ..."
            )
        reason = unreachable(given, PATIENCE_S)
        if reason == _TOKEN:
            raise UserError(
                f"the Ray head at RAY_ADDRESS={given} {_TOKEN}: set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN to the "
                "cluster's token where ~/.ray/auth_token is not it"
            )
        if reason:
            raise UserError(
                f"no Ray cluster answers at RAY_ADDRESS={given} ({reason}); start it (`ray start --head`), "
                "or unset RAY_ADDRESS to use this machine alone"
            )
        _await_node(given)
        return given
    for file in dict.fromkeys((core.address_file(), "/tmp/ray/ray_current_cluster")):  # noqa: S108 - Ray's place
        try:
            left = Path(file).read_text().strip()
        except OSError:
            continue
        reason = unreachable(left, _LEFT_S) if left else ""
        if left and reason in ("", _TOKEN):
            core.use_token_if_there()
            return left
        if left and not given:
            print(
                f"no Ray answers at {left} ({reason}), which `ray start` left in {file}: starting one here", flush=True
            )
    if given:
        raise UserError("RAY_ADDRESS=auto, but no Ray cluster runs here; start it (`ray start --head`), or unset it")
    return ""


def _await_node(head: str) -> None:
    """Raises UserError unless a node of a Ray cluster runs on this machine, which a driver needs."""
    until = time.monotonic() + PATIENCE_S
    while not core.node_runs_here():
        if time.monotonic() > until:
            raise UserError(
                f"the Ray head at {head} answers, but no node of it runs on this machine; run the command on one of "
                "its nodes, or unset RAY_ADDRESS to use this machine alone"
            )
        time.sleep(0.5)


def unreachable(head: str, patience_s: float) -> str:
    """Why no Ray head answers our calls at this address, for a message; "" when one does."""
    import grpc

    try:
        core.ask_cluster_id(head, patience_s, patience_s > _LEFT_S)
    except grpc.RpcError as error:
        code = error.code()
        if code == grpc.StatusCode.UNAUTHENTICATED:
            return _TOKEN
        if code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
            return f"no answer within {patience_s:g} s" if code.name.startswith("DEADLINE") else "nothing listens there"
        return f"what answers is no Ray head: {code.name.lower()}"
    return ""


def make_room() -> None:
    """Set RAY_TMPDIR for a Ray that we start where Ray's default folder cannot be used; and a token where none can be
    stored. Raises UserError when RAY_TMPDIR is given and cannot be used, or when no folder can.
    """
    if not home.writable() and not os.path.exists(os.path.expanduser("~/.ray/auth_token")):
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))  # else Ray writes one to a file in the home
    if given := os.environ.get("RAY_TMPDIR"):
        if why := _unfit(given):
            raise UserError(f"RAY_TMPDIR={given} {why}; set it to a short path that can be written, such as /tmp/mine")
        return
    own = f"/tmp/ray-{os.getuid()}"  # noqa: S108 - _unfit checks that it belongs to this user
    usual = os.environ.get("TMPDIR") or "/tmp"  # noqa: S108 - Ray's own choice
    if not _unfit(usual):
        return
    for place in dict.fromkeys(("/tmp", own, tempfile.gettempdir(), os.getcwd())):  # noqa: S108
        if not _unfit(place, make=place == own):
            os.environ["RAY_TMPDIR"] = place
            return
    raise UserError(
        f"Ray's temporary files: {usual} {_unfit(usual)}; set RAY_TMPDIR to a short path that can be written"
    )


def _unfit(place: str, make: bool = False) -> str:
    """Why Ray cannot keep its files below a folder; "" when it can."""
    if (size := len(os.fsencode(os.path.abspath(place)))) > ROOM:
        return f"is {size} bytes long, and Ray's sockets leave room for {ROOM}"
    try:
        if make:
            os.makedirs(place, mode=0o700, exist_ok=True)
            if os.stat(place).st_uid != os.getuid():
                return "belongs to another user"
    except OSError as error:
        return f"cannot be made ({error.strerror})"
    below = os.path.join(place, "ray")
    there = below if os.path.lexists(below) else place
    if not os.path.isdir(there):
        return f"is of no use, {there} is no folder" if os.path.lexists(there) else "does not exist"
    return "" if os.access(there, os.R_OK | os.W_OK | os.X_OK) else f"is of no use, {there} cannot be written"


def check_folder() -> None:
    """Raises UserError when a file in the current folder, which Ray puts first on its workers' path, shadows a library,
    or when that folder was removed.
    """
    try:
        folder = os.getcwd()
    except OSError as error:
        raise UserError("the current folder does not exist any more; change to another one") from error
    if message := shadow.clash(folder):
        raise UserError(message)
