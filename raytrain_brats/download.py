"""Fetch MSD Task01_BrainTumour: `raytrain-brats download --out URI`.

In: a tar in a public bucket, read in ranges, without credentials (another endpoint by AWS_ENDPOINT_URL).
Out: its images, labels and dataset.json, local or on s3://, and `download.json` beside them: where each came from, its
size and sha256, how far the tar has been read. The same command again goes on from there; nothing is fetched twice.

`tarfile` reads the headers and its `data` filter judges every member. Writing is ours, as tarfile knows no s3://: a
member is checked, put under a name of ours and noted before the next one, so that a cut costs one member at most.
"""

import hashlib
import json
import os
import re
import shutil
import sys
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from raytrain_brats import s3, storage
from raytrain_brats.cli import Uri, entry
from raytrain_brats.data import gunzip
from raytrain_brats.errors import RunFailed, UserError

STATE = "download.json"
RANGE_BYTES = 16 << 20
TRIES = 5
"""Reads of one place before we believe that it is damaged: a bit that flips on the way looks the same."""
MAX_MEMBERS = 20_000  # Task01 has some 1,240 files; macOS adds one `._` file to each
MAX_HEADER_BYTES, MAX_MEMBER_BYTES = 1 << 16, 64 << 20  # of a member; Task01's largest has 12 MB
MAX_RATIO = 200  # of a .gz beyond 64 MB; the label of an empty volume has 300, but is small
_PATIENCE_S = "180"
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


TASK01 = Published(
    "s3://msd-for-monai/Task01_BrainTumour.tar",
    "us-west-2",
    "240a19d752f0d9e9101544901065d872",  # as MONAI's DecathlonDataset has it
    "Task01_BrainTumour",
    re.compile(r"(imagesTr|labelsTr|imagesTs)/BRATS_\d{3}\.nii\.gz|dataset\.json", re.ASCII),
    "Medical Segmentation Decathlon, CC-BY-SA 4.0",
)


@dataclass(frozen=True)
class Args:
    """Stream Task01_BrainTumour of the Medical Segmentation Decathlon, 7 GB, and write its files as they arrive.

    The same command again goes on.
    """

    out: Uri
    """Folder for imagesTr/, labelsTr/, imagesTs/ and dataset.json (local or s3://)."""


@dataclass
class State:
    """What `download.json` says. `offset`: all that stands before it in the archive is done; `md5`: of the whole
    archive, "" when it was read in several goes; `files`: {our name: {"at": offset, "bytes", "sha256"}}."""

    source: str
    etag: str
    bytes: int
    offset: int = 0
    complete: bool = False
    md5: str = ""
    files: dict[str, dict[str, Any]] = field(default_factory=dict)


class ArchiveError(Exception):
    """The archive is damaged, or holds what no data set needs; the message names the place."""


class Remote:
    """The archive in its bucket, as much of a file as tarfile needs, and the md5 of what was `done`."""

    def __init__(self, source: Published, state: State) -> None:
        self._source, self._etag, self.bytes = source, state.etag, state.bytes
        self._md5 = None if state.offset else hashlib.md5(usedforsecurity=False)
        self.begin(state.offset)

    def begin(self, offset: int) -> None:
        """Read on from here; what was fetched and is not done is fetched anew."""
        self._start, self._buffer = offset, bytearray()  # of the archive, from byte `start` on
        self._at = self._done = offset
        self.limit = offset + MAX_HEADER_BYTES
        """Where a member's headers must have ended: sizes that a header made up must not fill the memory."""

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

    def take(self, offset: int, size: int) -> bytes:
        """These bytes; fewer at the end of the archive."""
        end = min(offset + size, self.bytes)
        while (fetched := self._start + len(self._buffer)) < end:
            self._buffer += self.fetch(fetched, min(RANGE_BYTES, self.bytes - fetched))
        return bytes(self._buffer[offset - self._start : end - self._start])

    def done(self, offset: int) -> str:
        """What stands before `offset` was found good. The md5 of it all; "" when it was not read from the start."""
        if self._md5:
            self._md5.update(self.take(self._done, offset - self._done))
        self._done = offset
        del self._buffer[: max(0, offset - 1 - self._start)]  # tarfile looks one byte back
        self._start = max(self._start, offset - 1)
        return self._md5.hexdigest() if self._md5 else ""

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int) -> None:
        self._at = offset

    def read(self, size: int) -> bytes:
        """For tarfile, which reads headers alone."""
        if not 0 <= size <= self.limit - self._at:
            raise ArchiveError(f"headers at byte {self._at:,} have more than the {MAX_HEADER_BYTES:,} bytes allowed")
        found = self.take(self._at, size)
        self._at += len(found)
        return found


def members(remote: Remote) -> Iterator[tarfile.TarInfo]:
    """Every file and folder from where `remote` stands, judged by its header. Raises ArchiveError."""
    try:
        tar: Any = tarfile.TarFile(fileobj=remote, errors="surrogateescape")  # type: ignore[arg-type]
        for number, member in enumerate(tar, 1):
            if number > MAX_MEMBERS:
                raise ArchiveError(f"more than {MAX_MEMBERS:,} entries")
            _judge(member, remote.bytes)
            remote.limit = tar.offset + MAX_HEADER_BYTES
            yield member
    except (tarfile.TarError, ValueError, ArithmeticError, LookupError, RecursionError) as error:
        raise ArchiveError(f"before byte {remote.tell():,}: {error}") from error
    # tarfile takes a damaged header for the end of the archive, so what is there must be the end mark.
    rest = remote.take(tar.offset, MAX_MEMBER_BYTES)
    if len(rest) < tarfile.BLOCKSIZE:
        raise ArchiveError("it is cut off: the end mark is missing")
    if rest.strip(b"\0") or tar.offset + len(rest) < remote.bytes:
        raise ArchiveError(f"the header at byte {tar.offset:,} is damaged, or something follows the end mark")


def _judge(member: tarfile.TarInfo, archive_bytes: int) -> None:
    """Raises ArchiveError or tarfile.FilterError for all but a plain file or a folder below the archive's own.

    Stricter than the filter: links, also those that stay within the folder, are nothing that a data set needs.
    """
    name = repr(member.name)
    if not (member.type in (tarfile.REGTYPE, tarfile.AREGTYPE) or member.isdir()) or member.issparse():
        raise ArchiveError(f"{name} is no plain file (type {member.type!r})")
    if any(key == "size" or key.startswith("GNU.sparse") for key in member.pax_headers):
        raise ArchiveError(f"an extended header gives {name} another size")  # two readers would see two archives
    kept = getattr(tarfile, "data_filter", lambda found, _: found)(member, "/archive")  # Python 3.11.4 and later
    if kept.name.startswith("/") or kept.name != member.name or ".." in member.name.split("/"):
        raise ArchiveError(f"{name} points out of the archive's folder")
    if not 0 <= member.size <= MAX_MEMBER_BYTES:
        raise ArchiveError(f"{name} has {member.size:,} bytes, {MAX_MEMBER_BYTES:,} allowed")
    if member.offset_data + member.size * member.isreg() + tarfile.BLOCKSIZE > archive_bytes:  # the end mark's block
        raise ArchiveError(f"it is cut off at {name}")


def check_gzip(content: bytes) -> None:
    """Hold a .gz against its own checksums, within a cap on what it unpacks to. Raises ArchiveError."""
    unpacked, most = 0, max(MAX_MEMBER_BYTES, MAX_RATIO * len(content))
    try:
        for piece in gunzip.pieces(content):
            unpacked += len(piece)
            if unpacked > most:
                raise ArchiveError(f"{len(content):,} bytes unpack to more than {most:,}")
    except gunzip.Damaged as error:
        raise ArchiveError(f"its gzip stream is damaged or cut off ({error})") from error


def work(args: Args) -> None:
    source, out = TASK01, storage.normal(args.out)
    size, etag = s3.head(source.uri, source.region)  # whether the bucket answers is told at once
    state = _open(out, source, State(source.uri, etag, size))
    os.environ.setdefault(storage.PATIENCE, _PATIENCE_S)  # from here on an outage is waited out
    remote, before, tries = Remote(source, state), len(state.files), 0
    mended = _mend(out, state, remote)
    if state.offset < state.bytes:
        _save(out, state)  # before there is any file, or the next run would not know it for its own
    while state.offset < state.bytes:
        began = state.offset
        try:
            _stream(out, source, state, remote)
        except ArchiveError as error:
            tries = 1 if state.offset > began else tries + 1
            if tries == TRIES:
                raise RunFailed(f"{source.uri}: {error}") from error
            remote.begin(state.offset)
    if not state.complete:
        _check_set(out, source, state)
    total = sum(noted["bytes"] for noted in state.files.values())
    fetched = len(state.files) - before + mended
    print(f"{len(state.files)} files ({fetched} fetched now), {total / 1e6:,.1f} MB in {out}: {source.licence}")
    known = "equal to the published one" if state.md5 else "not compared, as it was read in several goes"
    print(f"sizes and sha256 are in {STATE}; md5 of the archive: {known}")


def _open(out: str, source: Published, fresh: State) -> State:
    """The state to go on from. Raises UserError when --out holds something else, or cannot hold it all."""
    here, state, where = storage.list_files(out), fresh, storage.join(out, STATE)
    if STATE in here:
        try:
            state = State(**json.loads(storage.read_bytes(where)))
            if not all(source.files.fullmatch(name) for name in state.files):
                raise ValueError("a name that is none of ours")
        except (ValueError, TypeError) as error:
            raise UserError(f"{where} is damaged; {_BEGIN_ANEW}") from error
        if (state.source, state.etag, state.bytes) != (fresh.source, fresh.etag, fresh.bytes):
            old, new = (f"{s.source}, {s.bytes:,} bytes, ETag {s.etag}" for s in (state, fresh))
            raise UserError(f"{out} was begun from {old}; now there is {new}; {_BEGIN_ANEW}")
    elif here:
        raise UserError(f"--out {out} holds other files ({', '.join(list(here)[:3])}); give an empty or new folder")
    storage.check_writable(out)
    needed = state.bytes - state.offset
    if not storage.is_s3(out) and shutil.disk_usage(out).free < needed:
        raise UserError(f"--out {out}: {needed / 1e9:.1f} GB are needed, fewer are free; give another place")
    return state


def _save(out: str, state: State) -> None:
    storage.write_bytes(storage.join(out, STATE), json.dumps(vars(state), indent=1).encode())


def _mend(out: str, state: State, remote: Remote) -> int:
    """Fetch again what was done but is not there any more; how many files."""
    here = storage.list_files(out)
    lost = {name: noted for name, noted in state.files.items() if here.get(name) != noted["bytes"]}
    for name, noted in lost.items():
        reads = (remote.fetch(noted["at"], noted["bytes"]) for _ in range(TRIES))
        content = next((c for c in reads if hashlib.sha256(c).hexdigest() == noted["sha256"]), None)
        if content is None:
            raise RunFailed(f"{name} comes with another checksum than before; {_BEGIN_ANEW}")
        _write(out, name, content, name in here)
    return len(lost)


def _stream(out: str, source: Published, state: State, remote: Remote) -> None:
    """Every wanted member is checked, written, then noted. Raises ArchiveError; what is noted by then stays."""
    here, shown = storage.list_files(out), state.offset * 20 // state.bytes
    for member in members(remote):
        name, size = member.name.removeprefix("./").removeprefix(f"{source.folder}/"), member.size * member.isreg()
        wanted = member.isreg() and source.files.fullmatch(name)  # not macOS's `._` files
        if wanted:
            if name in state.files:
                raise ArchiveError(f"{member.name!r} stands in it twice")
            content = _checked(member, remote)
            _write(out, name, content, name in here)
            checksum = hashlib.sha256(content).hexdigest()
            state.files[name] = {"at": member.offset_data, "bytes": size, "sha256": checksum}
        state.offset = member.offset_data + size + -size % tarfile.BLOCKSIZE
        remote.done(state.offset)
        if wanted:
            _save(out, state)
        if state.offset * 20 // state.bytes > shown:
            shown = state.offset * 20 // state.bytes
            megabytes = f"{state.offset / 1e6:,.0f} of {state.bytes / 1e6:,.0f} MB"
            print(f"{5 * shown} %: {megabytes}, {len(state.files)} files", flush=True)
    state.md5, state.offset = remote.done(state.bytes), state.bytes
    _save(out, state)


def _checked(member: tarfile.TarInfo, remote: Remote) -> bytes:
    """The member's content, held against its gzip checksums, or where it has none against a second read."""
    content = remote.take(member.offset_data, member.size)
    try:
        if member.name.endswith(".gz"):
            check_gzip(content)
        elif remote.fetch(member.offset_data, member.size) != content:
            raise ArchiveError("two reads differ")
    except ArchiveError as error:
        raise ArchiveError(f"{member.name}: {error}") from error
    return content


def _write(out: str, name: str, content: bytes, there: bool) -> None:
    """Put a file. Raises UserError where another one stands: ours are written whole or not at all."""
    where = storage.join(out, name)
    if there and storage.read_bytes(where) != content:
        raise UserError(f"{where} is another file than the published one; move it elsewhere, or give another --out")
    storage.write_bytes(where, content)


def _check_set(out: str, source: Published, state: State) -> None:
    """Raises RunFailed unless the archive is the published one, and holds all that its dataset.json names."""
    if state.md5 not in ("", source.md5):
        raise RunFailed(
            f"{source.uri} arrived with the md5 {state.md5}, the published one has {source.md5}, although every file "
            f"fits its own checksum: it is another edition, or what lies between the files was altered; {_BEGIN_ANEW}"
        )
    if not (noted := state.files.get("dataset.json")):
        raise RunFailed(f"{source.uri} holds no dataset.json")
    about = json.loads(storage.read_checked([storage.join(out, "dataset.json")], noted["sha256"])[0])
    named = [path for row in about.get("training", []) for path in (row["image"], row["label"])]
    named += about.get("test", [])
    missing = [name for name in (path.removeprefix("./") for path in named) if name not in state.files]
    if missing:
        raise RunFailed(f"{source.uri} lacks {len(missing)} files that its dataset.json names, as {missing[0]}")
    state.complete = True
    _save(out, state)


def main(argv: list[str] | None = None) -> int:
    return entry(Args, work, "download", argv)


if __name__ == "__main__":
    sys.exit(main())
