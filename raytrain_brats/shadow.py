"""Files of the current folder that Python would take for a library: `nibabel.py`, a `monai/` beside one's scripts.

In: a folder that stands in front of the libraries on Python's path: here under `python -m`, on all of Ray's workers.
Out: a line that names the file, the library and the remedy.
"""

import os
import sys
from importlib.machinery import PathFinder, all_suffixes

_FREQUENT = {"tests", "test", "docs", "examples", "scripts", "tools", "benchmarks", "raytrain_brats"}
"""Names that many packages install by mistake, and that nobody imports; ours may be in a checkout and installed too."""


def clash(folder: str) -> str:
    """What hides a library that a command needs, in one line; "" when nothing does."""
    try:
        names = sorted(os.listdir(folder))
    except OSError:
        return ""
    there = os.path.realpath(folder)
    others = [path for path in sys.path if os.path.realpath(path or os.curdir) != there]
    found = {}
    for file in names:
        name, dot, ending = file.partition(".")
        if not name.isidentifier() or name in _FREQUENT or (dot and f".{ending}" not in all_suffixes()):
            continue
        if not dot and not os.path.isfile(os.path.join(folder, file, "__init__.py")):
            continue  # without it a folder gives way to a package
        if name in sys.stdlib_module_names:
            return _told(folder, file, name)
        spec = PathFinder.find_spec(name, others)
        if spec and spec.origin:
            found[name] = file
    needed = _needed() if found else set()
    return next((_told(folder, file, name) for name, file in found.items() if not needed or name in needed), "")


def _told(folder: str, file: str, name: str) -> str:
    where = os.path.join(folder, file)
    return f"{where} would be taken for the Python library {name}; rename it, or start from another folder"


def _needed() -> set[str]:
    """Top-level names of all that is required, also by others in turn; empty when this package is not installed."""
    import importlib.metadata as metadata  # here: it may not be needed, and takes a while
    import re

    def plain(name: str) -> str:
        return re.sub("[-_.]+", "-", name).lower()

    known, todo = set[str](), ["raytrain-brats"]
    while todo:
        if (name := todo.pop()) not in known:
            known.add(name)
            try:
                lines = metadata.requires(name) or []
            except metadata.PackageNotFoundError:
                continue
            todo += [plain(found[0]) for line in lines if (found := re.match(r"[\w.-]+", line))]
    owners = metadata.packages_distributions()
    return {name for name, dists in owners.items() if any(plain(dist) in known for dist in dists)} if known else set()
