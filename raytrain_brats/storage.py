"""Bytes on a local disk or on S3, under one set of names.

In: URIs: a local path, `file://...`, or `s3://bucket/key` (another endpoint by AWS_ENDPOINT_URL).
Out: whole objects. A reader sees the old bytes or the new ones, never a torn mixture.

S3 goes through boto3, which verifies the checksum of every body; pyarrow's reader accepts cut and flipped
bodies in silence.
"""

import contextlib
import errno
import os
import time
import uuid
from functools import lru_cache
from pathlib import Path
from typing import Any

from raytrain_brats.errors import UserError


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
    if "://" in text:
        raise UserError(f"{uri}: only local paths and s3:// are known; copy the data to one of them")
    return str(Path(text).expanduser().absolute())


def join(uri: str, *parts: str) -> str:
    return "/".join([uri.rstrip("/"), *(part.strip("/") for part in parts)])


@lru_cache(maxsize=1)
def _client(_pid: int) -> Any:
    import boto3
    from botocore.config import Config

    retries: Any = {"mode": "standard", "total_max_attempts": 8}
    return boto3.client("s3", config=Config(retries=retries, max_pool_connections=32))


def _s3(uri: str) -> tuple[Any, str, str]:
    bucket, _, key = uri[len("s3://") :].partition("/")
    return _client(os.getpid()), bucket, key  # keyed by process: a client must not cross a fork


@contextlib.contextmanager
def _s3_errors(uri: str) -> Any:
    from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError

    try:
        yield
    except ClientError as error:
        code = error.response["Error"]["Code"]
        if code in ("404", "NoSuchKey"):
            raise FileNotFoundError(uri) from error
        if code in ("PreconditionFailed", "ConditionalRequestConflict"):
            raise FileExistsError(f"{uri}: another writer was first") from error
        if code in ("NoSuchBucket", "403", "AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch"):
            raise UserError(f"{uri}: S3 answers {code}; check the bucket's name and the credentials") from error
        raise OSError(f"{uri}: S3 answers {error}") from error
    except NoCredentialsError as error:
        raise UserError(f"{uri}: no AWS credentials found; set a profile or AWS_ACCESS_KEY_ID") from error
    except BotoCoreError as error:
        raise OSError(f"{uri}: {error}") from error


def read_bytes(uri: str) -> bytes:
    """The whole object. Raises FileNotFoundError."""
    if not is_s3(uri):
        return Path(normal(uri)).read_bytes()
    client, bucket, key = _s3(uri)
    for attempt in range(4):  # boto3 retries the request, but not a body that breaks off
        try:
            with _s3_errors(uri):
                return bytes(client.get_object(Bucket=bucket, Key=key)["Body"].read())
        except (FileNotFoundError, UserError):
            raise
        except OSError:
            if attempt == 3:
                raise
            time.sleep(0.2 * 4**attempt)
    raise AssertionError("unreachable")


def read_tail(uri: str, size: int) -> bytes:
    """The last `size` bytes, or all when there are fewer. Raises FileNotFoundError."""
    if not is_s3(uri):
        with open(normal(uri), "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - size))
            return file.read()
    client, bucket, key = _s3(uri)
    with _s3_errors(uri):
        if not client.head_object(Bucket=bucket, Key=key)["ContentLength"]:
            return b""
        return bytes(client.get_object(Bucket=bucket, Key=key, Range=f"bytes=-{size}")["Body"].read())


def write_bytes(uri: str, content: bytes) -> None:
    """Put the whole object: on a local disk by temporary name, fsync, rename and fsync of the folder."""
    if is_s3(uri):
        client, bucket, key = _s3(uri)
        with _s3_errors(uri):
            client.put_object(Bucket=bucket, Key=key, Body=content)
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


def append(uri: str, text: str) -> None:
    """Add whole lines at the end; several writers may.

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
    client, bucket, key = _s3(uri)
    put: bytes | None = None
    for attempt in range(30):
        before, condition = b"", {"IfNoneMatch": "*"}
        with contextlib.suppress(FileNotFoundError), _s3_errors(uri):
            found = client.get_object(Bucket=bucket, Key=key)
            before, condition = found["Body"].read(), {"IfMatch": found["ETag"]}
        if put is not None and before.startswith(put):
            return  # the last put had arrived, only its answer was lost
        put = before + text.encode()
        with contextlib.suppress(FileExistsError), _s3_errors(uri):
            client.put_object(Bucket=bucket, Key=key, Body=put, **condition)
            return
        time.sleep(0.05 * (attempt + 1))
    raise OSError(f"{uri}: other writers never left a gap")


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


def delete(uri: str) -> None:
    """Remove one object; fine when it is gone already."""
    if is_s3(uri):
        client, bucket, key = _s3(uri)
        with _s3_errors(uri):
            client.delete_object(Bucket=bucket, Key=key)
    else:
        Path(normal(uri)).unlink(missing_ok=True)


def check_writable(uri: str) -> None:
    """Raises UserError, with the remedy, unless an object can be put below `uri`."""
    probe = join(uri, "write-probe")
    try:
        write_bytes(probe, b"")
        delete(probe)
    except OSError as error:
        raise UserError(f"cannot write to {uri} ({error}); choose another folder or mend its rights") from error


def for_ray(uri: str) -> tuple[str, Any]:
    """(path, pyarrow filesystem or None) for Ray's own files, honouring AWS_ENDPOINT_URL."""
    if not is_s3(uri):
        return normal(uri), None
    from pyarrow import fs

    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    scheme, _, host = (endpoint or "").rpartition("://")
    options = {"endpoint_override": host, "scheme": scheme or "https"} if host else {}
    return uri[len("s3://") :], fs.S3FileSystem(**options)
