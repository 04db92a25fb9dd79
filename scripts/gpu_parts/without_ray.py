"""Import the package's modules on a machine without Ray: names of Ray that cannot be used, in its place.

In: nothing. Out: `import ray` works where Ray is not installed; whoever calls anything of it fails.

The modules that bring voxels and save (`run.feed`, `run.saver`, `data.resident`) need Ray only to be imported: what
they import defines Ray's datasources beside code that does without. So what is measured is the package's own code.
"""

import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


class _Kind(type):
    """Of classes that have every attribute: another such class."""

    def __getattr__(cls, name: str) -> Any:
        return _named(name)

    def __getitem__(cls, _: Any) -> Any:
        return cls


class _Module(ModuleType):
    def __getattr__(self, name: str) -> Any:
        return _named(name)


def _named(name: str) -> Any:
    """A base class, an annotation, a constant: nothing more."""
    if name.startswith("__"):
        raise AttributeError(name)
    return _Kind(name, (), {})


class _Finder(MetaPathFinder, Loader):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return ModuleSpec(fullname, self, is_package=True) if fullname.split(".")[0] == "ray" else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _Module(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


def absent() -> bool:
    """Whether Ray is not installed, or only stands in."""
    try:
        found = importlib.util.find_spec("ray")
    except ImportError:
        return True
    return found is None or isinstance(found.loader, _Finder)


def stand_in() -> None:
    if absent() and not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
