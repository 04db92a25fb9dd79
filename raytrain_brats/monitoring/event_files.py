"""TensorBoard's event files, as bytes. Runs in the driver.

In: scalars by tag at a step; a text.
Out: the content of a file `events.out.tfevents.*` that TensorBoard reads.

Written out here because the libraries that write them cost what a driver must not pay: tensorboardX imports torch,
torch.utils.tensorboard is torch, and where TensorBoard itself is installed, MONAI imports it in every worker. Whole
files suit S3 too. Formats: TFRecord framing with a masked CRC-32C; event.proto, summary.proto (TensorFlow, 2015 on).
"""

import struct
from collections.abc import Mapping, Sequence

NAME = "events.out.tfevents."
"""How the name of each such file begins."""
Point = tuple[float, int, Mapping[str, float]]
"""(wall time in seconds, step, {tag: value})."""
_POLYNOMIAL = 0x82F63B78  # CRC-32C (Castagnoli), bits reversed


def _entry(number: int) -> int:
    for _ in range(8):
        number = number >> 1 ^ (_POLYNOMIAL if number & 1 else 0)
    return number


_TABLE = tuple(map(_entry, range(256)))


def scalars(points: Sequence[Point]) -> bytes:
    """A file of these points, in their order."""
    begun = points[0][0] if points else 0.0
    events = [_event(time, step, b"".join(_scalar(tag, v) for tag, v in tags.items())) for time, step, tags in points]
    return b"".join(map(_record, [_version(begun), *events]))


def text(tag: str, content: str, time: float, step: int) -> bytes:
    """A file of one text, shown as Markdown."""
    tensor = b"\x08\x07" + _bytes(2, _bytes(2, b"\x08\x01")) + _bytes(8, content.encode())  # DT_STRING, shape (1,)
    metadata = _bytes(1, _bytes(1, b"text"))  # plugin_data.plugin_name
    value = _bytes(1, _bytes(1, tag.encode()) + _bytes(9, metadata) + _bytes(8, tensor))
    return b"".join(map(_record, [_version(time), _event(time, step, value)]))


def _version(time: float) -> bytes:
    return b"\x09" + struct.pack("<d", time) + _bytes(3, b"brain.Event:2")


def _event(time: float, step: int, summary: bytes) -> bytes:
    return b"\x09" + struct.pack("<d", time) + b"\x10" + _varint(step) + _bytes(5, summary)


def _scalar(tag: str, value: float) -> bytes:
    return _bytes(1, _bytes(1, tag.encode()) + b"\x15" + struct.pack("<f", value))


def _bytes(field: int, content: bytes) -> bytes:
    """A length-delimited field of a protocol buffer."""
    return _varint(field << 3 | 2) + _varint(len(content)) + content


def _varint(number: int) -> bytes:
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*out, number])


def _record(content: bytes) -> bytes:
    length = struct.pack("<Q", len(content))
    return length + _checksum(length) + content + _checksum(content)


def _checksum(content: bytes) -> bytes:
    crc = 0xFFFFFFFF
    for byte in content:
        crc = _TABLE[(crc ^ byte) & 0xFF] ^ crc >> 8
    crc ^= 0xFFFFFFFF
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)
