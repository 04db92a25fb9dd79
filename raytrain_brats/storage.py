"""Bytes on a local disk or on S3, under one set of names.

In: URIs: a local path, `file://...`, or `s3://bucket/key` (another endpoint by AWS_ENDPOINT_URL).
Out: whole objects. A reader sees the old bytes or the new ones, never a torn mixture.

S3 is asked by `s3`, which waits out an outage: a few seconds, or RAYTRAIN_BRATS_PATIENCE_S where that is set, as it is
in Ray's processes (`cluster.connect`). Ray and pyarrow read no data: their reader accepts cut and flipped bodies in
silence.
"""

import contextlib
import errno
import hashlib
import os
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from mmap import mmap
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock, Timeout

from raytrain_brats import s3
from raytrain_brats.errors import UserError

T = TypeVar("T")

PATIENCE = s3.PATIENCE
_LOCK_S = 30.0


class ChangedError(OSError):
    """What is there is not what was expected there."""


def is_s3(uri: str) -> bool:
    return uri.startswith("s3://")


def normal(uri: str | os.PathLike[str]) -> str:
    """One spelling per place: `s3://bucket/key` without a trailing slash, or an absolute local path.

    Raises UserError for any other scheme, and for a name that is no UTF-8: nothing could print or record it.
    """
    text = os.fspath(uri)
    if not _is_utf8(text):
        raise UserError(f"{os.fsencode(text).decode(errors='backslashreplace')}: the name is no UTF-8; rename it")
    if is_s3(text):
        return text.rstrip("/")
    if text.startswith("file://"):
        text = text[len("file://") :]
    if "://" in text or text.startswith("s3:"):
        raise UserError(f"{uri}: only local paths and s3:// are known; copy the data to one of them")
    return str(Path(text).expanduser().absolute())


def join(uri: str, *parts: str) -> str:
    return "/".join([uri.rstrip("/"), *(part.strip("/") for part in parts)])


def read_bytes(uri: str) -> bytes:
    """The whole object. Raises FileNotFoundError."""
    return s3.get(uri)[0] if is_s3(uri) else Path(normal(uri)).read_bytes()


@s3.patient
def read_checked(uris: Sequence[str], sha256: str | None, size: int | None = None) -> list[bytes]:
    """These objects, whole; `sha256` is the checksum of all their bytes in this order, where it is known.

    A bit that flips on the way from S3 looks like a changed object; so changed is what two reads agree upon.
    Raises ChangedError, FileNotFoundError.
    """
    wrong = None
    for _ in range(2):
        contents = [s3.get(uri, check=sha256 is None)[0] if is_s3(uri) else read_bytes(uri) for uri in uris]
        found, digest = sum(map(len, contents)), hashlib.sha256()
        for content in [] if sha256 is None else contents:
            digest.update(content)
        if size in (None, found) and sha256 in (None, digest.hexdigest()):
            return contents
        agreed = wrong == (found, digest.digest()) and sum(s3.head(uri)[0] for uri in uris) == found  # not cut twice
        if agreed or not is_s3(uris[0]):
            detail = "another checksum" if size in (None, found) else f"{found:,} bytes instead of {size:,}"
            raise ChangedError(f"{', '.join(uris)}: {detail}")
        wrong = (found, digest.digest())
    raise s3.OutageError(f"{', '.join(uris)}: altered on the way, each time in another manner")


def read_tail(uri: str, size: int) -> bytes:
    """The last `size` bytes, or all when there are fewer. Raises FileNotFoundError."""
    if is_s3(uri):
        length = s3.head(uri)[0]
        return s3.get(uri, Range=f"bytes=-{size}")[0] if length > size else s3.get(uri)[0][-size:]
    with open(normal(uri), "rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - size))
        return file.read()


def write_bytes(uri: str, content: bytes | mmap) -> None:
    """Put the whole object: on a local disk by temporary name, fsync, rename and fsync of the folder."""
    if is_s3(uri):
        s3.put(uri, content)
        return
    path = Path(normal(uri))
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    with _named(path, temporary):
        _make_folder(path.parent)
        try:
            with open(temporary, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        sync_folder(path.parent)


@contextlib.contextmanager
def _named(path: Path, temporary: Path | None = None) -> Iterator[None]:
    """An OSError from within names the file it is about, which a full disk's does not."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename not in (None, str(temporary)):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def _make_folder(path: Path) -> None:
    """With those above it, durably: a file in a folder that a power loss takes is lost with it."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in missing:
        sync_folder(folder.parent)


def sync_folder(path: Path) -> None:
    """Make the names in a local folder durable: fsync of a file keeps its content, not its name."""
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def append(path: str, text: str) -> None:
    """Add whole lines at the end of a local file; several writers may.

    One O_APPEND write, made durable (NFS does not order those of several machines).
    """
    place, content = Path(normal(path)), text.encode()
    _make_folder(place.parent)
    with _named(place):
        new = not place.exists()
        file = os.open(place, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            if os.write(file, content) != len(content):
                raise OSError(errno.ENOSPC, "only a part could be written; the disk is full", str(place))
            os.fsync(file)
        finally:
            os.close(file)
        if new:
            sync_folder(place.parent)


def swap(uri: str, before: bytes | None, after: bytes) -> bool:
    """Put a small object if it still holds `before` (None: is not there); False when it does not.

    Atomic among swaps. `after` must be content that nobody else would put.
    """
    if not is_s3(uri):
        with _locked(Path(normal(uri))) as path:
            if (path.read_bytes() if path.exists() else None) != before:
                return False
            write_bytes(str(path), after)
            return True
    for attempt in range(30):
        found, condition = s3.get_for_change(uri)
        if found != before:
            return attempt > 0 and found == after  # the last put had arrived, only its answer was lost
        with contextlib.suppress(FileExistsError):
            s3.put(uri, after, **condition)
            return True
        time.sleep(0.05 * (attempt + 1))
    raise OSError(f"{uri}: S3 refuses every conditional put")


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[Path]:
    """Hold the lock of a local file: on a hidden sibling, as the file itself is replaced."""
    _make_folder(path.parent)
    lock = FileLock(path.with_name(f".{path.name}.lock"), _LOCK_S, poll_interval=0.02, fallback_to_soft=False)
    try:
        held = lock.acquire()
    except Timeout as error:  # whoever holds it was stopped just there
        raise OSError(errno.EAGAIN, f"another process has held its lock for {_LOCK_S:g} s", path) from error
    except OSError as error:
        if error.filename:  # the file itself: a full disk, or no right to it
            raise
        raise UserError(
            f"{path.parent}: its file system does not lock files ({error.strerror}); mount it with locks "
            "(Lustre: -o flock), or give a place on another one or on S3"
        ) from error
    with held:
        yield path


def exists(uri: str) -> bool:
    """Whether an object (or a local folder) is there."""
    return s3.exists(uri) if is_s3(uri) else Path(normal(uri)).exists()


def is_folder(uri: str) -> bool:
    """Whether a local place is a folder."""
    return not is_s3(uri) and Path(normal(uri)).is_dir()


@dataclass(frozen=True)
class Listing:
    """What lies below a folder, by path relative to it; hidden names (`.x`, macOS's `._x`) are left out.

    `files`: {path: (bytes, version)}; the version is the time of the last change in nanoseconds, on S3 the ETag: when
    both are as before nobody has put other bytes there. `unreadable`: {path: why} of what can be seen, not opened.
    """

    files: dict[str, tuple[int, str]]
    unreadable: dict[str, str]


def listing(uri: str) -> Listing:
    """Everything below a folder, by one listing."""
    found: dict[str, tuple[int, str]] = {}
    unreadable: dict[str, str] = {}
    if is_s3(uri):
        found = s3.list_below(uri)
    else:
        root = Path(normal(uri))
        been = {os.path.realpath(root)}

        def closed(error: OSError) -> None:
            if not isinstance(error, FileNotFoundError):
                unreadable[os.path.relpath(error.filename, root)] = f"cannot be opened ({error.strerror})"

        for folder, subfolders, names in os.walk(root, onerror=closed, followlinks=True):
            paths = {name: os.path.realpath(os.path.join(folder, name)) for name in subfolders}
            subfolders[:] = [name for name, path in paths.items() if path not in been]  # links may go round in a ring
            been.update(paths.values())
            for name in names:
                path = Path(folder) / name
                try:
                    about = path.stat()
                    if not os.access(path, os.R_OK):
                        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
                    found[path.relative_to(root).as_posix()] = about.st_size, str(about.st_mtime_ns)
                except FileNotFoundError:  # a file may go while we look; a link that leads nowhere stays
                    if path.is_symlink():
                        unreadable[path.relative_to(root).as_posix()] = "is a link that leads nowhere"
                except OSError as error:
                    unreadable[path.relative_to(root).as_posix()] = f"cannot be opened ({error.strerror})"
    for name in [name for name in found if not _is_utf8(name)]:
        del found[name]
        unreadable[name] = "has a name that is no UTF-8; rename it"
    shown = {os.fsencode(path).decode(errors="backslashreplace"): why for path, why in unreadable.items()}
    return Listing(_unhidden(found), _unhidden(shown))


def _is_utf8(path: str) -> bool:
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True


def _unhidden(rows: dict[str, T]) -> dict[str, T]:
    parts = {path: path.split("/") for path in sorted(rows)}
    return {
        path: rows[path] for path, names in parts.items() if path == "." or not any(p.startswith(".") for p in names)
    }


def list_files(uri: str) -> dict[str, int]:
    """{path relative to `uri`: bytes} of every object below a folder; empty when there is none.

    Hidden names and what cannot be opened are left out.
    """
    return {path: size for path, (size, _) in listing(uri).files.items()}


def delete(uri: str) -> None:
    """Remove one object; fine when it is gone already."""
    if is_s3(uri):
        s3.delete(uri)
    else:
        Path(normal(uri)).unlink(missing_ok=True)


PROBE = "write-probe"
"""What `check_writable` puts and removes; stays behind where it is killed in between."""


def check_writable(uri: str) -> None:
    """Raises UserError, with the remedy, unless an object can be put below `uri`."""
    probe = join(uri, PROBE)
    try:
        write_bytes(probe, b"")
        delete(probe)
    except OSError as error:
        raise UserError(f"cannot write to {uri} ({error}); choose another folder or mend its rights") from error


def sweep(uri: str) -> None:
    """Remove the temporary files below a folder of writers that were killed.

    Only what is an hour old: another one may be writing now.
    """
    if not is_s3(uri):
        for path in Path(normal(uri)).rglob(".*.tmp"):
            with contextlib.suppress(FileNotFoundError):
                if time.time() - path.stat().st_mtime > 3600:
                    path.unlink()


def for_ray(uri: str) -> tuple[str, Any]:
    """(path, pyarrow filesystem or None) for Ray's own files, honouring AWS_ENDPOINT_URL."""
    if not is_s3(uri):
        return normal(uri), None
    from pyarrow import fs

    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    scheme, _, host = (endpoint or "").rpartition("://")
    options = {"endpoint_override": host, "scheme": scheme or "https"} if host else {}
    return uri[len("s3://") :], fs.S3FileSystem(**options)
