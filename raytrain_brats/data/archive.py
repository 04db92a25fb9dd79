"""The plain files of a tar, one after the other, from any header on; nothing is ever unpacked by the tar's own names.

In: `read(offset, size)`, the archive's bytes wherever they lie.
Out: `Member`s; `ArchiveError` for what no data set needs (links, devices, sparse files, `..`), for damage, and beyond
caps on count and size. `unpacked_size` holds a .gz against its own checksum, within a cap on what it unpacks to.

`tarfile` parses the headers and compares their sums, no more: its own iteration takes a damaged header for the end of
the archive, and gives names, modes and links to trust.
"""

import re
import tarfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

MAX_HEADERS = 20_000  # Task01 has some 1,240 files; macOS adds one `._` file to each
MAX_MEMBER_BYTES = 64 << 20  # its largest has 12 MB
MAX_METADATA_BYTES = 1 << 16
MAX_UNPACKED_BYTES, MAX_RATIO, RATIO_FLOOR_BYTES = 1 << 30, 200, 64 << 20  # a label is all but empty: 300 to 1
BLOCK = tarfile.BLOCKSIZE
_PLAIN = (tarfile.REGTYPE, tarfile.AREGTYPE)
_METADATA = (
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)
_KINDS = {
    tarfile.LNKTYPE: "a hard link",
    tarfile.SYMTYPE: "a symbolic link",
    tarfile.CHRTYPE: "a device",
    tarfile.BLKTYPE: "a device",
    tarfile.FIFOTYPE: "a pipe",
    tarfile.GNUTYPE_SPARSE: "a sparse file",
}
_OTHER_CONTENT = re.compile(rb"(?:^|\n)\d+ (?:size|GNU\.sparse[^=\n]*)=")  # what would make more or less of the content

Read = Callable[[int, int], bytes]


class ArchiveError(Exception):
    """The archive is damaged, or holds what a data set has no use for; the message names the place."""


@dataclass(frozen=True)
class Member:
    """A plain file: `name` as the archive has it, `size` bytes at `offset`; the next header is at `end`."""

    name: str
    offset: int
    size: int
    end: int


def members(read: Read, again: Read, archive_bytes: int, start: int = 0) -> Iterator[Member]:
    """Every plain file whose headers begin at `start` or later. `again` reads anew what arrived damaged.

    Raises ArchiveError.
    """
    offset, headers = start, 0
    while header := _header(read, again, archive_bytes, offset):
        headers += 1
        if headers > MAX_HEADERS:
            raise ArchiveError(f"more than {MAX_HEADERS:,} entries")
        content, metadata = offset + BLOCK, header.type in _METADATA
        size = 0 if header.isdir() else header.size
        _refuse(header, metadata)
        filler = -size % BLOCK
        offset = content + size + filler
        if content + size > archive_bytes:
            raise ArchiveError(f"it is cut off in the middle of {header.name!r}")
        if metadata and _OTHER_CONTENT.search(read(content, size)):
            raise ArchiveError(f"an extended header at byte {content:,} gives its file another size")
        if header.type in _PLAIN:
            yield Member(header.name, content, size, offset)
        if filler and read(content + size, filler).strip(b"\0"):
            again(content + size, filler)  # altered on the way, which the md5 of the whole would show; or just so
    while offset < archive_bytes:  # the rest of the last record
        rest = read(offset, min(1 << 16, archive_bytes - offset))
        if rest.strip(b"\0") and again(offset, len(rest)).strip(b"\0"):
            raise ArchiveError(f"something follows its end mark, from byte {offset:,} on")
        offset += len(rest)


def _header(read: Read, again: Read, archive_bytes: int, offset: int) -> tarfile.TarInfo | None:
    """The header at `offset`, None at the end mark; damaged is what two reads agree upon."""
    if offset + BLOCK > archive_bytes:
        raise ArchiveError("it is cut off: the end mark is missing")
    block, before = read(offset, BLOCK), b""
    while block != before:
        try:
            # surrogateescape: any bytes may be a name, and none of ours is
            return tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            return None
        except (tarfile.HeaderError, ValueError, OverflowError):
            before, block = block, again(offset, BLOCK)
    raise ArchiveError(f"the header at byte {offset:,} is damaged")


def _refuse(header: tarfile.TarInfo, metadata: bool) -> None:
    name = repr(header.name)
    if not (metadata or header.type in _PLAIN or header.isdir()):
        raise ArchiveError(f"{name} is {_KINDS.get(header.type, 'of an unknown kind')}, not a plain file")
    if not metadata and (header.name.startswith("/") or ".." in header.name.split("/")):
        raise ArchiveError(f"{name} points out of the archive's folder")
    most = MAX_METADATA_BYTES if metadata else MAX_MEMBER_BYTES
    if not 0 <= header.size <= most:
        raise ArchiveError(f"{name} has {header.size:,} bytes, more than the {most:,} allowed")


def unpacked_size(content: bytes) -> int:
    """Bytes that a .gz unpacks to, all its checksums compared, without keeping them. Raises ArchiveError."""
    total, left = 0, content
    most = min(MAX_UNPACKED_BYTES, max(RATIO_FLOOR_BYTES, MAX_RATIO * len(content)))
    try:
        while left:
            stream = zlib.decompressobj(wbits=31)
            while not stream.eof:
                total += len(stream.decompress(left, 1 << 20))
                if total > most:
                    raise ArchiveError(f"{len(content):,} bytes unpack to more than {most:,}")
                if not stream.eof and not stream.unconsumed_tail:
                    raise ArchiveError("its gzip stream is cut off")
                left = stream.unused_data if stream.eof else stream.unconsumed_tail
    except zlib.error as error:
        raise ArchiveError(f"its gzip stream is damaged ({error})") from error
    if not content:
        raise ArchiveError("it is empty")
    return total
