"""Fetch a public data set: `raytrain-brats download --out URI`, MSD Task01_BrainTumour by default.

In: a tar in a public bucket, read in ranges, without credentials (another endpoint by AWS_ENDPOINT_URL).
Out: its images, labels and dataset.json, local or on s3://, and `download.json` beside them: where each came from, its
size and sha256, how far the tar has been read. The same command again goes on from there; nothing is fetched twice.
"""

import contextlib
import gzip
import hashlib
import io
import json
import os
import re
import shutil
import sys
import zlib
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Literal

from rich.progress import DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

from raytrain_brats import s3, storage
from raytrain_brats.cli import Uri, entry
from raytrain_brats.data import archive
from raytrain_brats.data.archive import ArchiveError, Member
from raytrain_brats.errors import RunFailed, UserError

STATE = "download.json"
RANGE_BYTES, RANGES_AHEAD = 8 << 20, 4
_PATIENCE_S = "180"
_MOVE = "move it elsewhere to have the published one there, or give another --out"
_BEGIN_ANEW = "remove what was made, or give another --out, and begin anew"


@dataclass(frozen=True)
class Published:
    """A tar in a public bucket; `files` are the names wanted of its `folder`."""

    uri: str
    region: str
    md5: str
    folder: str
    files: re.Pattern[str]
    licence: str


SOURCES = {
    "msd": Published(
        "s3://msd-for-monai/Task01_BrainTumour.tar",
        "us-west-2",
        "240a19d752f0d9e9101544901065d872",  # as MONAI's DecathlonDataset has it
        "Task01_BrainTumour",
        re.compile(r"(imagesTr|labelsTr|imagesTs)/BRATS_\d{3}\.nii\.gz|dataset\.json", re.ASCII),
        "Medical Segmentation Decathlon, CC-BY-SA 4.0",
    )
}


@dataclass(frozen=True)
class Args:
    """Stream a public data set's archive and write its files as they arrive; the same command again goes on."""

    out: Uri
    """Folder for imagesTr/, labelsTr/, imagesTs/ and dataset.json (local or s3://)."""
    source: Literal["msd"] = "msd"
    """msd: Task01_BrainTumour of the Medical Segmentation Decathlon, 7 GB."""


@dataclass
class State:
    """What `download.json` says. `offset`: all that stands before it in the archive is done."""

    source: str
    etag: str
    bytes: int
    offset: int = 0
    complete: bool = False
    md5: str = ""
    """Of the whole archive; not known when it was read in several goes."""
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    """{our name: {"at": offset in the archive, "bytes", "sha256"}}."""


class RangePrefetcher:
    """The archive's bytes in order, some ranges fetched ahead of the reader; their md5 as they are done with."""

    def __init__(self, source: Published, state: State) -> None:
        self._source, self._etag, self._bytes = source, state.etag, state.bytes
        self._next = self._done = state.offset
        self._parts: dict[int, Future[bytes] | bytes] = {}  # by their place in the archive
        self._pool = ThreadPoolExecutor(max(1, RANGES_AHEAD))
        self._md5 = None if state.offset else hashlib.md5(usedforsecurity=False)

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)

    @s3.patient
    def fetch(self, offset: int, size: int) -> bytes:
        """Straight from the bucket. Raises RunFailed when the archive is another one by now."""
        wanted = {"Range": f"bytes={offset}-{offset + size - 1}", "IfMatch": self._etag}
        try:
            content = s3.get(self._source.uri, check=False, public_region=self._source.region, **wanted)[0]
        except FileExistsError as error:
            raise RunFailed(f"{self._source.uri} was replaced while it was read; {_BEGIN_ANEW}") from error
        if len(content) != size:
            raise s3.OutageError(f"{self._source.uri}: {len(content):,} bytes arrive instead of {size:,}")
        return content

    def read(self, offset: int, size: int) -> bytes:
        """What stands before `offset` is taken as found good, and not needed any more."""
        if self._md5:
            for start in range(self._done, offset, RANGE_BYTES):
                self._md5.update(self._slice(start, min(RANGE_BYTES, offset - start)))
        self._done = offset
        for start in [s for s in self._parts if s + RANGE_BYTES <= offset]:
            del self._parts[start]
        return self._slice(offset, size)

    def _slice(self, offset: int, size: int) -> bytes:
        while self._next < min(self._bytes, offset + size + RANGES_AHEAD * RANGE_BYTES):
            some = min(RANGE_BYTES, self._bytes - self._next)
            self._parts[self._next] = self._pool.submit(self.fetch, self._next, some)
            self._next += some
        found = []
        for start in sorted(self._parts):
            if start < offset + size and start + RANGE_BYTES > offset:
                part = self._part(start)
                found.append(part[max(0, offset - start) : offset + size - start])
        return b"".join(found)

    def again(self, offset: int, size: int) -> bytes:
        """Fetch anew what arrived damaged."""
        content = self.fetch(offset, size)
        for start in self._parts:
            if start < offset + size and start + RANGE_BYTES > offset:
                part, low, high = bytearray(self._part(start)), max(start, offset), offset + size
                part[low - start : high - start] = content[low - offset :][: len(part) - (low - start)]
                self._parts[start] = bytes(part)
        return content

    def _part(self, start: int) -> bytes:
        part = self._parts[start]
        return part.result() if isinstance(part, Future) else part

    def md5(self) -> str:
        """Of the whole archive, "" when it was not read from its start."""
        self.read(self._bytes, 0)
        return self._md5.hexdigest() if self._md5 else ""


def work(args: Args) -> None:
    source, out = SOURCES[args.source], storage.normal(args.out)
    size, etag = s3.head(source.uri, source.region)  # whether the bucket answers is told at once
    state = _open(out, source, State(source.uri, etag, size))
    os.environ.setdefault(storage.PATIENCE, _PATIENCE_S)  # from here on an outage is waited out
    ahead, before = RangePrefetcher(source, state), len(state.files)
    try:
        mended = _mend(out, state, ahead)
        if state.offset < state.bytes:
            _save(out, state)  # before there is any file, or the next run would not know it for its own
            with _shown(state) as show:
                _stream(out, source, state, ahead, show)
        if not state.complete:
            _check_set(out, source, state)
    except ArchiveError as error:
        raise RunFailed(f"{source.uri}: {error}") from error
    finally:
        ahead.close()
    total = sum(noted["bytes"] for noted in state.files.values())
    fetched = len(state.files) - before + mended
    print(f"{len(state.files)} files ({fetched} fetched now), {total / 1e6:,.1f} MB in {out}: {source.licence}")
    known = "equal to the published one" if state.md5 else "not compared, as it was read in several goes"
    print(f"sizes and sha256 are in {STATE}; md5 of the archive: {known}")


def _open(out: str, source: Published, fresh: State) -> State:
    """The state to go on from. Raises UserError when --out holds something else, or cannot hold it all."""
    here = storage.list_files(out)
    state = fresh
    if STATE in here:
        where = storage.join(out, STATE)
        try:
            state = State(**json.loads(storage.read_bytes(where)))
            strange = [name for name in state.files if not source.files.fullmatch(name)]
            if strange:
                raise ValueError(strange[0])
        except (ValueError, TypeError) as error:
            raise UserError(f"{where} is damaged; {_BEGIN_ANEW}") from error
        if (state.source, state.etag, state.bytes) != (fresh.source, fresh.etag, fresh.bytes):
            old, new = (f"{s.source}, {s.bytes:,} bytes, ETag {s.etag}" for s in (state, fresh))
            raise UserError(f"{out} was begun from {old}; now there is {new}; {_BEGIN_ANEW}")
    elif here:
        raise UserError(f"--out {out} holds other files ({', '.join(list(here)[:3])}); give an empty or new folder")
    lost = [name for name, noted in state.files.items() if here.get(name) != noted["bytes"]]
    for name in lost:
        if name in here and _is_sound(name, storage.read_bytes(storage.join(out, name))):
            raise UserError(f"{storage.join(out, name)} was changed since it was fetched; {_MOVE}")
    storage.check_writable(out)
    needed = state.bytes - state.offset + sum(state.files[name]["bytes"] for name in lost)
    if not storage.is_s3(out) and not state.complete and shutil.disk_usage(out).free < needed:
        raise UserError(f"--out {out}: {needed / 1e9:.1f} GB are needed, fewer are free; give another place")
    return state


def _is_sound(name: str, content: bytes) -> bool:
    """Whether a file is a whole one, somebody's, and not what a failing disk left of ours."""
    try:
        if not name.endswith(".gz"):
            return bool(content) and json.loads(content) is not None
        with gzip.open(io.BytesIO(content)) as file:
            while file.read(1 << 20):
                pass
        return bool(content)
    except (OSError, EOFError, ValueError, zlib.error):
        return False


def _save(out: str, state: State) -> None:
    storage.write_bytes(storage.join(out, STATE), json.dumps(vars(state), indent=1).encode())


def _mend(out: str, state: State, ahead: RangePrefetcher) -> int:
    """Fetch again what was done but is not there any more; how many files."""
    here = storage.list_files(out)
    lost = {name: noted for name, noted in state.files.items() if here.get(name) != noted["bytes"]}
    for name, noted in lost.items():
        for _ in range(3):
            content = ahead.fetch(noted["at"], noted["bytes"])
            if hashlib.sha256(content).hexdigest() == noted["sha256"]:
                storage.write_bytes(storage.join(out, name), content)
                break
        else:
            raise ArchiveError(f"{name} comes with another checksum than before; {_BEGIN_ANEW}")
    return len(lost)


def _stream(out: str, source: Published, state: State, ahead: RangePrefetcher, show: Any) -> None:
    """Every wanted member is checked, written, then noted; so a kill at any point costs one member at most."""
    here = storage.list_files(out)
    for member in archive.members(ahead.read, ahead.again, state.bytes, state.offset):
        show(member.offset, len(state.files))
        name = member.name.removeprefix("./").removeprefix(f"{source.folder}/")
        if not source.files.fullmatch(name):
            continue  # macOS's `._` files, notes: read for the md5, never written
        if name in state.files:
            raise ArchiveError(f"{member.name!r} stands in it twice")
        content = _checked(member, ahead)
        found = storage.read_bytes(storage.join(out, name)) if name in here else content
        if found != content and _is_sound(name, found):  # put there since the set was begun, by somebody
            raise UserError(f"{storage.join(out, name)} is another file than the published one; {_MOVE}")
        storage.write_bytes(storage.join(out, name), content)
        checksum = hashlib.sha256(content).hexdigest()
        state.files[name] = {"at": member.offset, "bytes": member.size, "sha256": checksum}
        state.offset = member.end
        _save(out, state)
    state.md5 = ahead.md5() or state.md5
    state.offset = state.bytes
    _save(out, state)


def _checked(member: Member, ahead: RangePrefetcher) -> bytes:
    """The member's content, by its gzip checksums, or where it has none by two reads that agree.

    A bit that flips on the way looks like a damaged archive; so damaged is what two reads agree upon.
    """
    content, before = ahead.read(member.offset, member.size), None
    for _ in range(6):
        wrong: ArchiveError | None = None
        if member.name.endswith(".gz"):
            try:
                archive.unpacked_size(content)
                return content
            except ArchiveError as error:
                wrong = ArchiveError(f"{member.name}: {error}")
        if content == before:
            if wrong:
                raise wrong
            return content
        before, content = content, ahead.again(member.offset, member.size)
    raise RunFailed(f"{member.name} is altered on the way, each time in another manner")


def _check_set(out: str, source: Published, state: State) -> None:
    """Raises RunFailed unless the archive is the published one, and holds all that its dataset.json names."""
    if state.md5 not in ("", source.md5):
        raise RunFailed(
            f"{source.uri} arrived with the md5 {state.md5}, the published one has {source.md5}, although every file "
            f"fits its own checksum: it is another edition, or what lies between the files was altered; {_BEGIN_ANEW}"
        )
    noted = state.files.get("dataset.json")
    if noted is None:
        raise RunFailed(f"{source.uri} holds no dataset.json")
    about = json.loads(storage.read_checked([storage.join(out, "dataset.json")], noted["sha256"])[0])
    named = [path for row in about.get("training", []) for path in (row["image"], row["label"])]
    named += about.get("test", [])
    missing = [name for name in (path.removeprefix("./") for path in named) if name not in state.files]
    if missing:
        raise RunFailed(f"{source.uri} lacks {len(missing)} files that its dataset.json names, as {missing[0]}")
    state.complete = True
    _save(out, state)


@contextlib.contextmanager
def _shown(state: State) -> Iterator[Any]:
    """A bar on a terminal; else a line at each twentieth."""
    columns = (*Progress.get_default_columns()[:2], DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    told = [state.offset * 20 // max(1, state.bytes)]
    with Progress(*columns, disable=not sys.stdout.isatty()) as bar:
        task = bar.add_task("downloading", total=state.bytes, completed=state.offset)

        def show(offset: int, files: int) -> None:
            bar.update(task, completed=offset)
            if bar.disable and offset * 20 // state.bytes > told[0]:
                told[0] = offset * 20 // state.bytes
                print(f"{5 * told[0]} %: {offset / 1e6:,.0f} of {state.bytes / 1e6:,.0f} MB, {files} files", flush=True)

        yield show


def main(argv: list[str] | None = None) -> int:
    return entry(Args, work, "download", argv)


if __name__ == "__main__":
    sys.exit(main())
