"""Decompress gzip into reused memory. Runs in data tasks.

In: the bytes of a .gz file; how many bytes are wanted.
Out: exactly those, with checksum and length compared, in a buffer of this thread; or `Damaged`, `WrongLength`.

Two things decide the cost, both measured (240x240x155x4 as int16 and float32, ms CPU on an Intel Xeon, 2 cores). The
library: libdeflate 40, 60; cramjam 76, 125; ISA-L 90, 145; zlib-ng 91, 137; zlib 121, 201. And page faults, one for
every 4 KB of fresh memory: libdeflate into a fresh buffer takes 62, 102. The `deflate` package contains libdeflate in
130 KB (imagecodecs in 80 MB), but its Python functions allocate, hold the interpreter's lock and do not return where a
member ended; so the C function that it exports is called directly. Files that libdeflate does not accept are decided by
zlib.
"""

import ctypes
import re
import sys
import threading
import zlib
from collections.abc import Iterator
from typing import Any

import deflate._deflate
import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]
SMALL_BYTES = 1 << 20
"""Below this a fresh buffer is as cheap as a reused one."""
KEPT_BYTES = 512 << 20
"""Limit for a thread's buffers that nobody views; the largest are dropped first."""
_DEFLATE_RATIO = 1032  # no deflate stream expands to more than this many times its length
_STEP_BYTES = 1 << 16
_HEADER_CHECKSUM = 2  # flag in byte 3 of a member
_NOT_ZERO = re.compile(rb"[^\0]")


class Damaged(Exception):  # noqa: N818 - a property of a file, not an error of ours
    """The stream is cut off, altered or followed by something else."""


class WrongLength(Exception):  # noqa: N818 - likewise
    """The stream holds fewer or more bytes than wanted."""


def head(content: bytes, num_bytes: int) -> bytes:
    """The first `num_bytes` decompressed bytes, or all when there are fewer. Raises Damaged."""
    found = b""
    for piece in pieces(content):
        found += piece
        if len(found) >= num_bytes:
            break
    return found[:num_bytes]


def unpack(content: bytes, wanted: int) -> Bytes:
    """The `wanted` bytes of a whole gzip file, of one member or more. Raises Damaged, WrongLength."""
    if wanted > _DEFLATE_RATIO * len(content):
        raise WrongLength(f"{len(content)} bytes cannot hold {wanted}")
    whole = take(wanted)
    if not (LIBDEFLATE and _by_libdeflate(content, whole)):
        _by_zlib(content, whole)
    return whole


def _exported() -> Any:
    """The C functions of libdeflate inside the `deflate` package; None where a build hides them."""
    library = ctypes.CDLL(deflate._deflate.__file__)
    size, address = ctypes.c_size_t, ctypes.c_void_p
    try:
        library.libdeflate_alloc_decompressor.restype = address
        library.libdeflate_free_decompressor.argtypes = [address]
        counts = [ctypes.POINTER(size)] * 2
        library.libdeflate_gzip_decompress_ex.argtypes = [address, address, size, address, size, *counts]
    except AttributeError:
        return None
    return library


LIBDEFLATE = _exported()


def _by_libdeflate(content: bytes, whole: Bytes) -> bool:
    """True when valid members fill `whole` exactly and nothing follows; False leaves the decision to zlib."""
    source = np.frombuffer(content, np.uint8)
    read, written, used, made = 0, 0, ctypes.c_size_t(), ctypes.c_size_t()
    decompressor = LIBDEFLATE.libdeflate_alloc_decompressor()
    if not decompressor:
        raise MemoryError("no decompressor")
    try:
        while read < source.size:
            if source.size - read < 18 or source[read + 3] & _HEADER_CHECKSUM:
                return False  # a header checksum, which libdeflate does not compare; hardly any file has one
            places = source.ctypes.data + read, source.size - read, whole.ctypes.data + written, whole.size - written
            if LIBDEFLATE.libdeflate_gzip_decompress_ex(decompressor, *places, used, made):
                return False
            read, written = read + used.value, written + made.value
    finally:
        LIBDEFLATE.libdeflate_free_decompressor(decompressor)
    return written == whole.size


def _by_zlib(content: bytes, whole: Bytes) -> None:
    filled = 0
    for piece in pieces(content):
        if filled + len(piece) > whole.size:
            raise WrongLength(f"more than {whole.size} bytes")
        whole[filled : filled + len(piece)] = np.frombuffer(piece, np.uint8)
        filled += len(piece)
    if filled < whole.size:
        raise WrongLength(f"{filled} bytes instead of {whole.size}")


def pieces(content: bytes) -> Iterator[bytes]:
    """The decompressed bytes of all members, at most _STEP_BYTES at a time; zeros after the last one are padding."""
    position = 0
    # The search ends at the next member. A look to the end of the file for each would take hours for 10^6 of them.
    while not position or _NOT_ZERO.search(content, position):
        member = zlib.decompressobj(31)
        try:
            while not member.eof:
                packed = content[position : position + _STEP_BYTES]
                if not packed:
                    raise Damaged("cut off")
                position += len(packed)
                while packed and not member.eof:
                    yield member.decompress(packed, _STEP_BYTES)
                    packed = member.unconsumed_tail
        except zlib.error as error:
            raise Damaged(str(error)) from error
        position -= len(member.unused_data)


class _Kept(threading.local):
    def __init__(self) -> None:
        self.buffers: list[Bytes] = []


_KEPT = _Kept()


def _references(buffers: list[Bytes], number: int) -> int:
    return sys.getrefcount(buffers[number])


_UNVIEWED = _references([np.empty(0, np.uint8)], 0)


def take(num_bytes: int) -> Bytes:
    """That many bytes to write to, of any content: where possible a buffer of this thread that nobody views any more.

    Every array, memoryview or tensor over a buffer holds a reference to it, so the reference count shows when it is
    free: callers return nothing, and nothing is overwritten while it can still be read.
    """
    if num_bytes < SMALL_BYTES:
        return np.empty(num_bytes, np.uint8)
    buffers = _KEPT.buffers
    free = [number for number in range(len(buffers)) if _references(buffers, number) == _UNVIEWED]
    free.sort(key=lambda number: buffers[number].size)
    for number in free:
        if num_bytes <= buffers[number].size <= 2 * num_bytes:
            return buffers[number][:num_bytes]
    room, dropped = KEPT_BYTES - num_bytes, set()
    for number in free:
        room -= buffers[number].size
        if room < 0:
            dropped.add(number)
    buffers[:] = [buffer for number, buffer in enumerate(buffers) if number not in dropped]
    buffers.append(np.empty(num_bytes, np.uint8))
    return buffers[-1][:num_bytes]
