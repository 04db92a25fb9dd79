"""Copy a node's logs to storage that outlives the node: `python -m raytrain_brats.logs --to URI &`, one on each node.

In: Ray's logs of this machine (/tmp/ray/session_latest/logs) and those of our own helpers (/tmp/raytrain_brats-*.log).
Out: below URI/SESSION/NODE what has changed, each minute and once more when this process is ended; never more than
`--limit-mb` there, jobs' own logs first, then what was written last. Nothing on the machine is changed.

A process of its own beside `spot`: a slow upload must not delay a spot notice.
"""

import os
import socket
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from raytrain_brats import interrupt, storage
from raytrain_brats.cli import Uri, default, entry
from raytrain_brats.errors import UserError

MB = 1 << 20
FILE_MAX = 8 * MB
"""Of a longer file its beginning and its end are kept, as it is put anew with each change: S3 has no append."""
HEAD = FILE_MAX // 8
END_S = 60.0
"""What the last copy may take; EC2 gives a machine longer than that."""
Files = dict[str, tuple[Path, int, str]]
"""{name: (path, bytes, time of the last change in nanoseconds)}"""


@dataclass(frozen=True)
class Args:
    """Copy this machine's Ray logs every minute; runs until it is ended.

    A second one on the same machine ends at once, with 0.
    """

    to: Uri = ""
    """Folder for the logs of all nodes; by default RAYTRAIN_BRATS_LOGS."""
    every: float = 60.0
    """Seconds between two copies."""
    limit_mb: int = 256
    """Most that is kept of this node in a session of Ray."""
    session: str = "/tmp/ray/session_latest"  # noqa: S108 - where Ray has it
    """Folder of Ray's session, or a link to it."""


class Copier:
    """Copies one machine's logs to the folder `to`. `helpers` is the folder of our own helpers' logs."""

    def __init__(self, to: str, session: Path, limit: int, helpers: Path | None = None) -> None:
        self._to, self._latest, self._limit, self._helpers = to, session, limit, helpers
        self._session: Path | None = None
        self._seen: dict[str, tuple[int, str]] = {}
        """{name: (bytes, version)} of what was put, as it was on this machine."""
        self._kept: dict[str, int] = {}
        """{name: bytes} of what is stored there."""

    def place(self, session: Path) -> str:
        return storage.join(self._to, session.name, node())

    def look(self) -> int:
        """Put what has changed; how many files. Raises OSError or UserError, with the rest left for the next look."""
        session, put = self._latest.resolve(), 0
        if session != self._session:
            if self._session:
                put = self._copy(self._session)  # the last lines say why Ray ended
            if not session.is_dir():
                return put
            storage.sweep(self.place(session))
            self._kept = storage.list_files(self.place(session))  # of a copier before this one
            self._session, self._seen = session, {}
        return put + self._copy(session)

    def _copy(self, session: Path) -> int:
        found, put = self._find(session), 0
        wanted = self._choose(found)
        for name in wanted:
            path, size, version = found[name]
            if self._seen.get(name) == (size, version):
                continue
            try:
                content = excerpt(path, size)
            except OSError:  # removed, or not readable
                continue
            if not self._make_room(session, name, len(content), wanted):
                continue
            self._kept[name] = max(len(content), self._kept.get(name, 0))  # as either may be stored after an error
            storage.write_bytes(storage.join(self.place(session), name), content)
            self._kept[name], self._seen[name] = len(content), (size, version)
            put += 1
        return put

    def _find(self, session: Path) -> Files:
        logs = session / "logs"
        found = {
            name: (logs / name, size, version)
            for name, (size, version) in storage.listing(str(logs)).files.items()
            if size and not Path(name).name.startswith("debug_state")  # no log: overwritten every ten seconds
        }
        for path in self._helpers.glob("raytrain_brats-*.log") if self._helpers else []:
            about = path.stat()
            if about.st_size:
                found[path.name] = path, about.st_size, str(about.st_mtime_ns)
        return found

    def _choose(self, found: Files) -> list[str]:
        """Names of what is to be kept, the most important first."""
        room, wanted = self._limit, []
        for name in sorted(found, key=lambda name: (not name.startswith("job-driver-"), -int(found[name][2]))):
            if (size := min(found[name][1], FILE_MAX)) <= room:
                wanted.append(name)
                room -= size
        return wanted

    def _make_room(self, session: Path, name: str, size: int, wanted: list[str]) -> bool:
        """Delete what is no longer wanted until a file fits. False when that is not enough: one of those that are
        wanted has become shorter, and is put with this look."""
        others = sum(self._kept.values()) - self._kept.get(name, 0)
        for victim in [kept for kept in self._kept if kept not in wanted]:
            if others + size <= self._limit:
                break
            storage.delete(storage.join(self.place(session), victim))
            others -= self._kept.pop(victim)
            self._seen.pop(victim, None)
        return others + size <= self._limit


def excerpt(path: Path, size: int) -> bytes:
    """The first `size` bytes of a file; of more than FILE_MAX the beginning and the end, FILE_MAX in all."""
    with path.open("rb") as file:
        if size <= FILE_MAX:
            return file.read(size)
        start = file.read(HEAD)
        gap = f"\n... {size - FILE_MAX:,} bytes or more are left out here ...\n".encode()
        file.seek(size - (FILE_MAX - HEAD - len(gap)))
        return start + gap + file.read(FILE_MAX - HEAD - len(gap))


def node() -> str:
    """This machine's name, apart from an earlier machine's at the same address."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text()[:8]
    except OSError:
        boot = "0"
    return f"{socket.gethostname()}-{boot}"


def work(args: Args) -> None:
    if not (to := default(args.to, "LOGS")):
        raise UserError("no folder for the logs given; name one with --to, or set RAYTRAIN_BRATS_LOGS")
    if args.every <= 0 or args.limit_mb <= 0:
        raise UserError("--every and --limit-mb are more than 0")
    helpers = Path(tempfile.gettempdir())
    copier = Copier(storage.normal(to), Path(args.session), args.limit_mb * MB, helpers)
    try:  # start commands are run again with each `ray up`
        with FileLock(helpers / "raytrain_brats-logs.lock", timeout=0):
            _go_on(copier, args.every)
    except Timeout:
        _log("another copier runs on this machine")


def _go_on(copier: Copier, every_s: float) -> None:
    os.nice(19)
    last = ""
    try:
        while True:
            last = _look(copier, last)
            time.sleep(every_s)
    finally:
        interrupt.allow(END_S)
        _look(copier, last)


def _look(copier: Copier, last: str) -> str:
    """Copy once and log the outcome where it differs from the last one, so that an outage is two lines."""
    try:
        copier.look()
        line = "copying"
    except Exception as error:  # noqa: BLE001 - a place that cannot be reached now may be later
        line = f"cannot copy ({' '.join(str(error).split())[:300]}); trying again"
    if line != last:
        _log(line)
    return line


def _log(line: str) -> None:
    print(f"{time.strftime('%F %T')} {line}", flush=True)


def main(argv: list[str] | None = None) -> int:
    return entry(Args, work, "logs", argv)


if __name__ == "__main__":
    sys.exit(main())
