"""Die between any two system calls of a commit or of a start: the old state or the new one, never a torn one.

A forked child does the work and dies before its n-th call that touches the disk, for every n until it gets through.
Power loss is worse than a kill: a file falls back to what it was at its last fsync, and a name to what it was at the
last fsync of its folder, as a disk may do.
On S3 the child dies before its n-th put or delete; after the n-th is before the next, or the end.
"""

import builtins
import io
import json
import os
import shutil
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from botocore.client import BaseClient

from raytrain_brats import storage
from raytrain_brats.run import checkpoint, journal
from raytrain_brats.run.journal import MetricsLog

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
        storage.open = journal.open = self.open  # type: ignore[attr-defined]

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


def state_of(seen: int, length: int) -> dict[str, Any]:
    return {"samples_seen": seen, "metrics_bytes": length, "bad_in_epoch": 0}


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


def begun(folder: str) -> None:
    """A run with rows 4 and 8 and a checkpoint at 8, of worker group 1."""
    log = MetricsLog(folder, journal.begin_generation(folder))
    for seen in (4, 8):
        log.add({"samples_seen": seen})
    log.flush()
    checkpoint.save(folder, 8, 1, {"a": torch.ones(4)}, state_of(8, log.bytes))


def go_on(folder: str) -> None:
    """What a worker group does from 8 to 16, checkpoint and clean-up included."""
    generation = journal.current(folder)
    assert generation is not None
    log = MetricsLog(folder, generation)
    log.bytes = len(storage.read_bytes(storage.join(folder, "metrics.jsonl")))
    for seen in (12, 16):
        log.add({"samples_seen": seen})
    log.flush()
    checkpoint.save(folder, 16, generation.number, {"a": torch.zeros(4)}, state_of(16, log.bytes), fence=log.check)
    checkpoint.prune(folder, 1, generation.number)


def start_again(folder: str) -> None:
    journal.begin_generation(folder)


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


def check_every_point(place: Callable[[int], str], work: Any, arm: Callable[[int], Callable[[], None]]) -> int:
    """After each death: a valid checkpoint, old or new, whose rows are all there and no others; a start that works."""
    # `arm` sets a death up; what it returns is called when that was not reached
    ends, wanted = set(), {begun: {0, 8}, go_on: {8, 16}, start_again: {8}}[work]
    for last in range(200):
        folder = place(last)
        if work is not begun:
            begun(folder)

        def until_death(last: int = last, folder: str = folder) -> None:
            end = arm(last)
            work(folder)
            end()

        code = in_child(until_death)
        assert code in (0, 9)

        found, damaged = checkpoint.newest_valid(folder)
        assert not damaged and (found is not None or work is begun)
        seen = found.samples_seen if found else 0
        generation = journal.begin_generation(folder)
        ends.add(generation.samples_seen)
        assert generation.samples_seen == seen
        assert [row["samples_seen"] for row in journal.read_rows(folder)] == [*range(4, seen + 1, 4)]
        events = storage.read_bytes(storage.join(folder, "events.jsonl")).decode()
        assert all(json.loads(line) for line in events.splitlines() if line[-1:] == "}")
        if not storage.is_s3(folder):
            shutil.rmtree(folder, ignore_errors=True)
        if code == 0:
            break
    assert ends == wanted
    assert seen == max(wanted), "what was committed is there for good"
    return last


@pytest.mark.parametrize("power_loss", [False, True], ids=["kill", "power loss"])
@pytest.mark.parametrize("work", [begun, go_on, start_again])
def test_every_crash_point_leaves_a_state_to_go_on_from(tmp_path: Path, work: Any, power_loss: bool) -> None:
    """On a local disk, before every call that touches it."""
    assert 8 < check_every_point(lambda n: str(tmp_path / f"{n}"), work, lambda n: Disk(n, power_loss).lose) < 199


@pytest.mark.parametrize("work", [go_on, start_again])
def test_every_crash_point_on_s3_leaves_a_state_to_go_on_from(s3_server: str, work: Any) -> None:
    """On S3, before every request that changes something."""
    deaths = check_every_point(lambda n: f"{s3_server}/{n}", work, die_before_request)
    assert deaths == (7 if work is go_on else 3)
