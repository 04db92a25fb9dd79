"""Single requests to S3 that return the result, or raise an error that names the cause.

In: `s3://bucket/key` (another endpoint by AWS_ENDPOINT_URL).
Out: bytes that did arrive as they were sent; FileNotFoundError, FileExistsError, UserError or OSError.

Retries are ours (botocore's are off): jittered, to a deadline, over the whole of a request, its body included, and only
for what may be different the next time. A body must be whole, keep up a least rate, and bear a checksum that fits;
boto3 compares one only where the object has one stored, so else the ETag does, or a second read.
"""

import contextlib
import hashlib
import os
import random
import re
import time
from collections.abc import Callable, Iterator
from functools import lru_cache, wraps
from mmap import mmap
from typing import Any, ParamSpec, TypeVar

from raytrain_brats.errors import UserError

P = ParamSpec("P")
R = TypeVar("R")

PATIENCE = "RAYTRAIN_BRATS_PATIENCE_S"
HICCUP_S = 3.0  # the least patience: one refused connection is nothing to bother a person with
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 8.0
NETWORK: Any = {"connect_timeout": 5, "read_timeout": 30, "max_pool_connections": 32}
FLOOR_BYTES_PER_S, FLOOR_WINDOW_S = 16e3, 10.0  # each byte of a trickle would start the read timeout anew
_NOT_ALLOWED = ("NoSuchBucket", "403", "AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch")
_EXPIRED = ("RequestTimeTooSkewed", "ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired", "InvalidToken")
_OVERLOADED = ("SlowDown", "RequestTimeout", "Throttling", "ThrottlingException", "TooManyRequests", "429")
_ALTERED = ("BadDigest", "IncompleteBody", "XAmzContentSHA256Mismatch", "XAmzContentChecksumMismatch")  # of a put


class OutageError(OSError):
    """S3 cannot be reached, is overloaded, broke off or garbled: the same request may well succeed later."""


@lru_cache(maxsize=4)
def client(_pid: int, public_region: str = "") -> Any:
    """One per process, as a client must not cross a fork; for a public bucket, one that needs no credentials."""
    import boto3
    from botocore import UNSIGNED
    from botocore.config import Config

    retries: Any = {"mode": "standard", "total_max_attempts": 1}  # `patient` does it
    own: Any = {"signature_version": UNSIGNED, "region_name": public_region} if public_region else {}
    return boto3.client("s3", config=Config(retries=retries, **NETWORK, **own))


def locate(uri: str, public_region: str = "") -> tuple[Any, str, str]:
    """(client, bucket, key)."""
    bucket, _, key = uri[len("s3://") :].partition("/")
    return client(os.getpid(), public_region), bucket, key


@contextlib.contextmanager
def translated(uri: str) -> Iterator[None]:
    """Botocore's exceptions as ours, with the place."""
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
        outage = code in _OVERLOADED or code in _ALTERED or (status >= 500 and status != 501)
        raise (OutageError if outage else OSError)(f"{uri}: S3 answers {error}") from error
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
        raise OutageError(f"{uri}: {error}") from error
    except boto.BotoCoreError as error:
        raise OSError(f"{uri}: {error}") from error


def patient(operation: Callable[P, R]) -> Callable[P, R]:
    """Retry while S3 is unreachable, for RAYTRAIN_BRATS_PATIENCE_S. Only for requests that may be sent twice."""

    @wraps(operation)
    def patiently(*arguments: P.args, **options: P.kwargs) -> R:
        deadline = time.monotonic() + max(HICCUP_S, float(os.environ.get(PATIENCE) or 0))
        longest = FIRST_PAUSE_S
        while True:
            try:
                return operation(*arguments, **options)
            except OutageError:
                left_s = deadline - time.monotonic()
                if left_s <= 0:
                    raise
            time.sleep(min(left_s, random.uniform(longest / 2, longest)))  # apart, or all ranks come back at once
            longest = min(2 * longest, LONGEST_PAUSE_S)

    return patiently


class _Floor:
    """The stream from which botocore reads a body; raises OutageError where bytes arrive too slowly."""

    def __init__(self, raw: Any, uri: str) -> None:
        self._raw, self._uri = raw, uri

    def read(self, _amount: int | None = None) -> bytes:
        chunks, mark, since_mark = [], time.monotonic(), 0
        while chunk := self._raw.read1(1 << 18):  # what has arrived; `read` would wait until all of it has
            chunks.append(chunk)
            since_mark += len(chunk)
            passed_s = time.monotonic() - mark
            if passed_s > FLOOR_WINDOW_S:
                if since_mark < FLOOR_BYTES_PER_S * passed_s:
                    raise OutageError(f"{self._uri}: only {since_mark / passed_s:.0f} bytes a second arrive")
                mark, since_mark = time.monotonic(), 0
        return b"".join(chunks)

    def close(self) -> None:
        self._raw.close()


@patient
def get(uri: str, *, check: bool = True, public_region: str = "", **options: Any) -> tuple[bytes, str]:
    """(content, ETag) of an object, or of a Range of it. Without `check` the caller knows what should arrive."""
    found = _get(uri, public_region, options)
    if check and not found[2]:
        again = _get(uri, public_region, options)
        agree = again[2] or again == found
        if agree and not again[2] and "Range" not in options:
            agree = len(again[0]) == head(uri, public_region)[0]  # two that were cut at the same place agree too
        if not agree:
            raise OutageError(f"{uri}: arrives without a checksum that fits, and otherwise each time")
        found = again
    return found[:2]


def _get(uri: str, public_region: str, options: dict[str, Any]) -> tuple[bytes, str, bool]:
    """(content, ETag, whether a checksum of it was compared)."""
    from botocore.httpchecksum import StreamingChecksumBody

    at, bucket, key = locate(uri, public_region)
    with translated(uri):
        found = at.get_object(Bucket=bucket, Key=key, **options)
        with contextlib.closing(found["Body"]) as body:
            body._raw_stream = _Floor(body._raw_stream, uri)  # botocore has no other way to read what is there
            content = body.read()  # compares the length, and the object's checksum if it has one
    low, high = re.findall(r"\d+", found.get("ContentRange", ""))[:2] or (0, len(content) - 1)
    if len(content) != int(high) - int(low) + 1:
        raise OutageError(f"{uri}: {len(content):,} bytes arrive as bytes {low} to {high}")
    tag = found["ETag"]
    sure = isinstance(body, StreamingChecksumBody)
    if not sure and "Range" not in options and tag.count("-") == 0:  # one with "-" is no MD5, nor are all without
        sure = tag.strip('"') == hashlib.md5(content, usedforsecurity=False).hexdigest()
    return content, tag, sure


@patient
def put(uri: str, content: bytes | mmap, **condition: str) -> None:
    """Put an object. With a condition, FileExistsError may mean our own put, whose answer was lost."""
    at, bucket, key = locate(uri)
    if isinstance(content, mmap):
        content.seek(0)  # boto reads it like a file, from where an attempt before has left it
    with translated(uri):
        at.put_object(Bucket=bucket, Key=key, Body=content, **condition)


def get_for_change(uri: str) -> tuple[bytes | None, dict[str, str]]:
    """The content, None when there is no object; the condition under which a put replaces just that."""
    try:
        content, tag = get(uri)
    except FileNotFoundError:
        return None, {"IfNoneMatch": "*"}
    return content, {"IfMatch": tag}


@patient
def head(uri: str, public_region: str = "") -> tuple[int, str]:
    """(bytes, ETag) of an object. Raises FileNotFoundError."""
    at, bucket, key = locate(uri, public_region)
    with translated(uri):
        found = at.head_object(Bucket=bucket, Key=key)
    return found["ContentLength"], found["ETag"]


@patient
def exists(uri: str) -> bool:
    """Whether an object, or a bucket, is there."""
    at, bucket, key = locate(uri)
    try:
        with translated(uri):
            _ = at.head_object(Bucket=bucket, Key=key) if key else at.head_bucket(Bucket=bucket)
    except FileNotFoundError:
        return False
    return True


@patient
def list_below(uri: str) -> dict[str, tuple[int, str]]:
    """{key relative to `uri`: (bytes, ETag)} of every object below a prefix."""
    at, bucket, key = locate(uri)
    prefix = f"{key.rstrip('/')}/" if key else ""
    found: dict[str, tuple[int, str]] = {}
    with translated(uri):
        for page in at.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix):
            if "IsTruncated" not in page:  # boto3 takes an answer that broke off after its head for an empty one
                raise OutageError(f"{uri}: the listing broke off")
            rows = [row for row in page.get("Contents", []) if not row["Key"].endswith("/")]  # consoles' folders
            found |= {row["Key"][len(prefix) :]: (row["Size"], row.get("ETag", "").strip('"')) for row in rows}
    return found


@patient
def delete(uri: str) -> None:
    """Remove an object; fine when it is gone already."""
    at, bucket, key = locate(uri)
    with translated(uri):
        at.delete_object(Bucket=bucket, Key=key)
