"""By what a run was made: command, code, libraries, machine. Runs in any process.

In: this process: its arguments, the folder of the package and the current one, what is installed.
Out: facts for the run's events and for records of outputs; what is not known is left out.
"""

import contextlib
import os
import platform
import re
import shlex
import subprocess
import sys
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

LIBRARIES = ("ray", "torch", "monai", "numpy")
_GIT_S = 5.0
"""A checkout on a network disk may be slow; then nothing is said of it."""
_SECRET = re.compile(r"(?<=//)[^/@\s]+@")


def of_launch() -> dict[str, Any]:
    """Command, package, commits, versions and machine of this process."""
    return {"command": command(), "version": version(), **commits(), "versions": versions(), "machine": machine()}


def command() -> str:
    """What was typed, without names and passwords of addresses; a program's or a notebook's own arguments where it is
    none of ours."""
    arguments = list(getattr(sys, "argv", []))
    if not arguments:
        return ""
    name = os.path.basename(arguments[0])
    if arguments[0].endswith(("/raytrain_brats/__main__.py", "/bin/raytrain-brats")):
        name = "raytrain-brats"
    elif "/raytrain_brats/" in arguments[0] and name.endswith(".py"):
        name = f"raytrain-brats {name.removesuffix('.py')}"
    return _SECRET.sub("...@", f"{name} {shlex.join(arguments[1:])}".strip())


def version() -> str:
    """Of this package."""
    return str(getattr(sys.modules[__package__ or ""], "__version__", ""))


@lru_cache(maxsize=1)
def commits() -> dict[str, Any]:
    """{"code": the package's checkout, "folder": that of the current folder, if it is another one}, each {"commit",
    "dirty"}. Nothing for what is in no checkout."""
    found = {}
    here = Path(__file__).parent
    if _git(here, "ls-files", "--error-unmatch", "__init__.py"):  # else installed, maybe within somebody's checkout
        found["code"] = _commit(here)
    with contextlib.suppress(OSError):
        folder = Path.cwd()
        top = _git(folder, "rev-parse", "--show-toplevel")
        if top and top != _git(here, "rev-parse", "--show-toplevel"):
            found["folder"] = _commit(folder)
    return {name: about for name, about in found.items() if about}


def _commit(folder: Path) -> dict[str, Any]:
    """ "dirty": whether a file that git knows was changed since."""
    if not (commit := _git(folder, "rev-parse", "HEAD")):
        return {}
    changed = _git(folder, "status", "--porcelain", "--untracked-files=no")
    return {"commit": commit, "dirty": bool(changed)}


def _git(folder: Path, *arguments: str) -> str:
    words = ["git", "-C", str(folder), *arguments]
    try:
        done = subprocess.run(  # noqa: S603 - git of the path
            words, capture_output=True, text=True, timeout=_GIT_S, check=True, stdin=subprocess.DEVNULL
        )
        return done.stdout.strip()
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return ""


@lru_cache(maxsize=1)
def versions() -> dict[str, str]:
    """Of Python and of the libraries that decide the numbers, without importing them."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


@lru_cache(maxsize=1)
def machine() -> dict[str, Any]:
    """{"kind", "cpu", "cpus", "memory_gb", "driver"}: the kind is EC2's instance type there, else what the maker calls
    it; the driver is NVIDIA's."""
    found: dict[str, Any] = {"cpus": os.cpu_count() or 0}
    with contextlib.suppress(OSError):
        found["kind"] = Path("/sys/devices/virtual/dmi/id/product_name").read_text().strip()
    with contextlib.suppress(OSError):
        if cpu := re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE):
            found["cpu"] = cpu[1].strip()
    with contextlib.suppress(OSError, ValueError):
        found["memory_gb"] = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1)
    with contextlib.suppress(OSError):
        about = Path("/proc/driver/nvidia/version").read_text()
        if driver := re.search(r"Kernel Module\D*?\s(\d+(?:\.\d+)+)", about):
            found["driver"] = driver[1]
    return {name: value for name, value in found.items() if value}
