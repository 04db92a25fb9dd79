"""Die at a chosen call: a child process that counts what reaches the disk or S3, and ends before the n-th.

Power loss is worse than a kill: a file falls back to what it was at its last fsync, and a name to what it was at the
last fsync of its folder, as a disk may do.
"""

import builtins
import io
import os
import shutil
import traceback
from collections.abc import Callable
from typing import Any

from botocore.client import BaseClient

from raytrain_brats import storage

CALLS = ("open", "write", "fsync", "replace", "unlink", "rmdir", "mkdir")


class Disk:
    """Counts what reaches the disk; dies before call number `last`. Knows what would be lost with the power."""

    def __init__(self, last: int, power_loss: bool) -> None:
        self.left, self.power_loss = last, power_loss
        self.names: dict[int, str] = {}
        self.unsynced: dict[str, int] = {}  # path -> bytes that a power loss leaves
        self.unnamed: dict[str, bytes | None] = {}  # path -> what a power loss puts there; None: nothing
        self.real = {name: getattr(os, name) for name in CALLS}
        for name in CALLS:
            setattr(os, name, self.counted(name, self.real[name]))
        self.plain_open = builtins.open
        storage.open = self.open  # type: ignore[attr-defined]

    def tick(self) -> None:
        if self.left == 0:
            self.lose()
            os._exit(9)
        self.left -= 1

    def lose(self) -> None:
        """The end, before a call or after all of them."""
        for name in CALLS:
            setattr(os, name, self.real[name])
        if not self.power_loss:
            return
        for path, length in self.unsynced.items():
            if os.path.exists(path):
                os.truncate(path, length)
        for path, before in sorted(self.unnamed.items(), reverse=True):  # what is in a folder before the folder
            if before is not None:
                with self.plain_open(path, "wb") as file:
                    file.write(before)
                    file.flush()
            elif os.path.isdir(path):
                shutil.rmtree(path)
            elif os.path.exists(path):
                os.unlink(path)

    def named(self, name: str, arguments: Any) -> None:
        """A name is about to appear, change or go."""
        path = os.path.abspath(arguments[1] if name == "replace" else arguments[0])
        if name == "unlink":
            self.unnamed.pop(path, None)  # that it may come back is not played through
        elif not os.path.exists(path):
            self.unnamed.setdefault(path, None)
        elif name == "replace":
            with self.plain_open(path, "rb") as file:
                self.unnamed.setdefault(path, file.read())
        if name == "replace":
            self.unnamed.pop(os.path.abspath(arguments[0]), None)

    def counted(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            self.tick()
            if name == "write":
                path = self.names[arguments[0]]
                self.unsynced.setdefault(path, os.path.getsize(path))
            elif name in ("replace", "unlink", "mkdir") or (name == "open" and arguments[1] & os.O_CREAT):
                self.named(name, arguments)
            result = real(*arguments, **options)
            if name == "open":
                self.names[result] = os.fspath(arguments[0])
            elif name == "fsync":
                file = arguments[0] if isinstance(arguments[0], int) else arguments[0].fileno()
                synced = self.names.get(file, "")
                self.unsynced.pop(synced, None)
                if os.path.isdir(synced):
                    here = os.path.abspath(synced)
                    self.unnamed = {p: b for p, b in self.unnamed.items() if os.path.dirname(p) != here}
            elif name == "replace" and os.fspath(arguments[0]) in self.unsynced:
                self.unsynced[os.fspath(arguments[1])] = self.unsynced.pop(os.fspath(arguments[0]))
            return result

        return call

    def open(self, path: Any, mode: str = "r") -> Any:
        if not set(mode) & set("wa"):
            return self.plain_open(path, mode)
        self.tick()
        self.named("open", [path])
        file = self.plain_open(path, mode)
        self.names[file.fileno()] = os.fspath(path)
        real = file.write

        class Counted(io.IOBase):
            def write(_, content: Any) -> int:  # noqa: N805
                self.tick()
                self.unsynced.setdefault(os.fspath(path), os.path.getsize(path))
                count = real(content)
                file.flush()
                return int(count)

            def flush(_) -> None:  # noqa: N805
                file.flush()

            def fileno(_) -> int:  # noqa: N805
                return file.fileno()

            def close(_) -> None:  # noqa: N805
                file.close()

        return Counted()


def die_before_request(last: int) -> Callable[[], None]:
    """Die before put or delete number `last` reaches S3."""
    left, real = [last], BaseClient._make_api_call

    def call(self: Any, operation: str, arguments: Any) -> Any:
        if not operation.startswith(("Get", "Head", "List")):
            if left[0] == 0:
                os._exit(9)
            left[0] -= 1
        return real(self, operation, arguments)

    BaseClient._make_api_call = call
    return lambda: None


def in_child(*todo: Callable[[], Any]) -> int:
    """Exit code of a process of its own that does all this."""
    child = os.fork()
    if child == 0:
        try:
            for do in todo:
                do()
        except BaseException:  # noqa: BLE001 (or the child would go on with the tests)
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
