"""Bytes on a local disk or on S3, under one set of names.

In: URIs: a local path, `file://...`, or `s3://bucket/key` (another endpoint by AWS_ENDPOINT_URL).
Out: whole objects. A reader sees the old bytes or the new ones, never a torn mixture.

S3 goes through boto3, which verifies the checksum of every body; pyarrow's reader accepts cut and flipped
bodies in silence. An outage of S3 is waited out: a few seconds, or RAYTRAIN_BRATS_PATIENCE_S where that is set, as it
is in Ray's processes (`cluster.connect`).
"""

import contextlib
import errno
import fcntl
import os
import random
import time
import uuid
from collections.abc import Callable, Iterator
from functools import lru_cache, wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from raytrain_brats.errors import UserError

P = ParamSpec("P")
R = TypeVar("R")

PATIENCE = "RAYTRAIN_BRATS_PATIENCE_S"
_HICCUP_S = 3.0  # the least patience: one refused connection is nothing to bother a person with
_LOCK_S = 30.0
_NETWORK: Any = {"connect_timeout": 5, "read_timeout": 30, "max_pool_connections": 32}
_NOT_ALLOWED = ("NoSuchBucket", "403", "AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch")
_EXPIRED = ("RequestTimeTooSkewed", "ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired", "InvalidToken")
_OVERLOADED = ("SlowDown", "RequestTimeout", "Throttling", "ThrottlingException", "TooManyRequests", "429")


def is_s3(uri: str) -> bool:
    return uri.startswith("s3://")


def normal(uri: str | os.PathLike[str]) -> str:
    """One spelling per place: `s3://bucket/key` without a trailing slash, or an absolute local path.

    Raises UserError for any other scheme.
    """
    text = os.fspath(uri)
    if is_s3(text):
        return text.rstrip("/")
    if text.startswith("file://"):
        text = text[len("file://") :]
    if "://" in text or text.startswith("s3:"):
        raise UserError(f"{uri}: only local paths and s3:// are known; copy the data to one of them")
    return str(Path(text).expanduser().absolute())


def join(uri: str, *parts: str) -> str:
    return "/".join([uri.rstrip("/"), *(part.strip("/") for part in parts)])


@lru_cache(maxsize=1)
def _client(_pid: int) -> Any:
    import boto3
    from botocore.config import Config

    retries: Any = {"mode": "standard", "total_max_attempts": 1}  # `_patient` does it, bodies included, to a deadline
    return boto3.client("s3", config=Config(retries=retries, **_NETWORK))


def _s3(uri: str) -> tuple[Any, str, str]:
    bucket, _, key = uri[len("s3://") :].partition("/")
    return _client(os.getpid()), bucket, key  # keyed by process: a client must not cross a fork


class _OutageError(OSError):
    """S3 cannot be reached, is overloaded or broke off: the same request may well succeed later."""


@contextlib.contextmanager
def _s3_errors(uri: str) -> Iterator[None]:
    from botocore import exceptions as boto
    from botocore.parsers import ResponseParserError

    try:
        yield
    except boto.ClientError as error:
        code = error.response["Error"]["Code"]
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        if code in ("404", "NoSuchKey"):
            raise FileNotFoundError(uri) from error
        if code in ("PreconditionFailed", "ConditionalRequestConflict"):
            raise FileExistsError(f"{uri}: another writer was first") from error
        if code in _NOT_ALLOWED:
            raise UserError(f"{uri}: S3 answers {code}; check the bucket's name and the credentials") from error
        if code in _EXPIRED:
            raise UserError(f"{uri}: S3 answers {code}; renew the credentials, or set this machine's clock") from error
        outage = code in _OVERLOADED or (status >= 500 and status != 501)
        raise (_OutageError if outage else OSError)(f"{uri}: S3 answers {error}") from error
    except boto.NoCredentialsError as error:
        raise UserError(f"{uri}: no AWS credentials found; set a profile or AWS_ACCESS_KEY_ID") from error
    except (
        boto.HTTPClientError,
        boto.ConnectionError,
        boto.IncompleteReadError,
        boto.ChecksumError,
        boto.FlexibleChecksumError,
        ResponseParserError,
    ) as error:
        raise _OutageError(f"{uri}: {error}") from error
    except boto.BotoCoreError as error:
        raise OSError(f"{uri}: {error}") from error


def _patient(operation: Callable[P, R]) -> Callable[P, R]:
    """Try again while S3 is out, as long as RAYTRAIN_BRATS_PATIENCE_S says. Only for what may be done twice."""

    @wraps(operation)
    def patient(*arguments: P.args, **options: P.kwargs) -> R:
        deadline = time.monotonic() + max(_HICCUP_S, float(os.environ.get(PATIENCE) or 0))
        longest = 0.4
        while True:
            try:
                return operation(*arguments, **options)
            except _OutageError:
                left_s = deadline - time.monotonic()
                if left_s <= 0:
                    raise
            time.sleep(min(left_s, random.uniform(longest / 2, longest)))  # apart, or all ranks come back at once
            longest = min(2 * longest, 8.0)

    return patient


@_patient
def _get(uri: str, **options: Any) -> tuple[bytes, str]:
    """(content, ETag) of an S3 object."""
    client, bucket, key = _s3(uri)
    with _s3_errors(uri):
        found = client.get_object(Bucket=bucket, Key=key, **options)
        return bytes(found["Body"].read()), found["ETag"]


@_patient
def _put(uri: str, content: bytes, **condition: str) -> None:
    """Put an S3 object. With a condition FileExistsError may be said of our own put, when its answer was lost."""
    client, bucket, key = _s3(uri)
    with _s3_errors(uri):
        client.put_object(Bucket=bucket, Key=key, Body=content, **condition)


def _get_for_change(uri: str) -> tuple[bytes | None, dict[str, str]]:
    """The content, None when there is no object; the condition under which a put replaces just that."""
    try:
        content, tag = _get(uri)
    except FileNotFoundError:
        return None, {"IfNoneMatch": "*"}
    return content, {"IfMatch": tag}


def read_bytes(uri: str) -> bytes:
    """The whole object. Raises FileNotFoundError."""
    return _get(uri)[0] if is_s3(uri) else Path(normal(uri)).read_bytes()


@_patient
def read_tail(uri: str, size: int) -> bytes:
    """The last `size` bytes, or all when there are fewer. Raises FileNotFoundError."""
    if not is_s3(uri):
        with open(normal(uri), "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - size))
            return file.read()
    client, bucket, key = _s3(uri)
    with _s3_errors(uri):
        length = client.head_object(Bucket=bucket, Key=key)["ContentLength"]
    return _get(uri, Range=f"bytes=-{size}")[0] if length else b""


def write_bytes(uri: str, content: bytes) -> None:
    """Put the whole object: on a local disk by temporary name, fsync, rename and fsync of the folder."""
    if is_s3(uri):
        _put(uri, content)
        return
    path = Path(normal(uri))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def append(uri: str, text: str, start: int | None = None) -> None:
    """Add whole lines at the end; several writers may. On S3 `start` is where they begin, for a single writer.

    A local append is one O_APPEND write, made durable (NFS does not order those of several machines). S3 has no append:
    read, then put on condition that nobody put in between, and again if so.
    """
    if not is_s3(uri):
        Path(normal(uri)).parent.mkdir(parents=True, exist_ok=True)
        file = os.open(normal(uri), os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            if os.write(file, text.encode()) != len(text.encode()):
                raise OSError(errno.ENOSPC, "only a part could be written; the disk is full", uri)
            os.fsync(file)
        finally:
            os.close(file)
        return
    put: bytes | None = None
    for attempt in range(30):
        found, condition = _get_for_change(uri)
        if put is not None and found is not None and found.startswith(put):
            return  # the last put had arrived, only its answer was lost
        if start is not None:
            before, there = (found or b"")[:start], (found or b"")[start:]
            if len(before) < start or not text.encode().startswith(there):  # a part may be there from an earlier try
                raise FileExistsError(f"{uri}: {len(found or b'')} bytes, not {start}: another writer was first")
            found = before
        put = (found or b"") + text.encode()
        with contextlib.suppress(FileExistsError):
            _put(uri, put, **condition)
            return
        time.sleep(0.05 * (attempt + 1))
    raise OSError(f"{uri}: other writers never left a gap")


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
        found, condition = _get_for_change(uri)
        if found != before:
            return attempt > 0 and found == after  # the last put had arrived, only its answer was lost
        with contextlib.suppress(FileExistsError):
            _put(uri, after, **condition)
            return True
        time.sleep(0.05 * (attempt + 1))
    raise OSError(f"{uri}: S3 refuses every conditional put")


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[Path]:
    """Hold the lock of a local file: on a hidden sibling, as the file itself is replaced."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock, deadline = path.with_name(f".{path.name}.lock"), time.monotonic() + _LOCK_S
    file = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() > deadline:  # whoever holds it was stopped just there
                    raise OSError(errno.EAGAIN, f"another process has held its lock for {_LOCK_S:g} s", path) from error
                time.sleep(0.02)
            except OSError as error:
                raise UserError(
                    f"{path.parent}: its file system does not lock files ({error.strerror}); mount it with locks "
                    "(Lustre: -o flock), or give a place on another one or on S3"
                ) from error
        yield path
    finally:
        os.close(file)  # ends the lock


@_patient
def exists(uri: str) -> bool:
    """Whether an object (or a local folder) is there."""
    if not is_s3(uri):
        return Path(normal(uri)).exists()
    client, bucket, key = _s3(uri)
    try:
        with _s3_errors(uri):
            _ = client.head_object(Bucket=bucket, Key=key) if key else client.head_bucket(Bucket=bucket)
    except FileNotFoundError:
        return False
    return True


@_patient
def list_files(uri: str) -> dict[str, int]:
    """{path relative to `uri`: bytes} of every object below a folder; empty when there is none.

    Hidden names (`.x`, macOS's `._x`) are left out.
    """
    found: dict[str, int] = {}
    if is_s3(uri):
        client, bucket, key = _s3(uri)
        prefix = f"{key.rstrip('/')}/" if key else ""
        with _s3_errors(uri):
            for page in client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix):
                if "IsTruncated" not in page:  # boto3 takes an answer that broke off after its head for an empty one
                    raise _OutageError(f"{uri}: the listing broke off")
                rows = [row for row in page.get("Contents", []) if not row["Key"].endswith("/")]  # consoles' folders
                found |= {row["Key"][len(prefix) :]: row["Size"] for row in rows}
    else:
        root = Path(normal(uri))
        been = {os.path.realpath(root)}
        for folder, subfolders, names in os.walk(root, followlinks=True):
            paths = {name: os.path.realpath(os.path.join(folder, name)) for name in subfolders}
            subfolders[:] = [name for name, path in paths.items() if path not in been]  # links may go round in a ring
            been.update(paths.values())
            for name in names:
                with contextlib.suppress(FileNotFoundError):  # a file may go while we look
                    path = Path(folder) / name
                    found[path.relative_to(root).as_posix()] = path.stat().st_size
    return {n: size for n, size in sorted(found.items()) if not any(p.startswith(".") for p in n.split("/"))}


@_patient
def delete(uri: str) -> None:
    """Remove one object; fine when it is gone already."""
    if is_s3(uri):
        client, bucket, key = _s3(uri)
        with _s3_errors(uri):
            client.delete_object(Bucket=bucket, Key=key)
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
    """Remove what writers below a folder left that were killed amid a write.

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
