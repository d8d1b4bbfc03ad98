"""TensorBoard's event files, written without its packages: nothing to install where a run trains.

A file is a sequence of records: length (uint64), its masked CRC-32C, content, the content's masked CRC-32C
(tensorflow/core/lib/io/record_writer.h). A content is an `Event` message (tensorflow/core/util/event.proto), encoded
here by hand: a field is a varint of its number and wire type, then its value.
"""

from __future__ import annotations

import os
import struct
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FOLDER = "tensorboard"
_NAME = (
    "events.out.tfevents.{seconds:010d}.record"  # what TensorBoard takes for an event file, and we for ours
)
_POLYNOMIAL = 0x82F63B78  # Castagnoli's, reflected
_MASK = 0xA282EAD8
_START = 1  # SessionLog.SessionStatus


def _crc_table() -> list[int]:
    table = []
    for byte in range(256):
        value = byte
        for _ in range(8):
            value = value >> 1 ^ (_POLYNOMIAL if value & 1 else 0)
        table.append(value)
    return table


_TABLE = _crc_table()


def crc32c(data: bytes) -> int:
    """Returns the CRC-32 with Castagnoli's polynomial (RFC 3720, B.4)."""
    value = 0xFFFFFFFF
    for byte in data:
        value = value >> 8 ^ _TABLE[(value ^ byte) & 0xFF]
    return value ^ 0xFFFFFFFF


def frame(content: bytes) -> bytes:
    """Returns one record of an event file."""
    length = struct.pack("<Q", len(content))
    return length + _masked(length) + content + _masked(content)


def _masked(data: bytes) -> bytes:
    crc = crc32c(data)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + _MASK) & 0xFFFFFFFF)


def _varint(number: int) -> bytes:
    encoded = bytearray()
    while number > 0x7F:
        encoded.append(number & 0x7F | 0x80)
        number >>= 7
    encoded.append(number)
    return bytes(encoded)


def _message(number: int, content: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def _event(seconds: float, content: bytes, step: int = 0) -> bytes:
    return b"\x09" + struct.pack("<d", seconds) + b"\x10" + _varint(step) + content


class EventFile:
    """Every number of a record as a curve of TensorBoard's; the whole record in one file.

    A start of a run that goes on writes the record again, as it now is, and removes the files that former starts wrote
    here: steps that were done again after a checkpoint stand in it once. Its first event tells an open TensorBoard to
    forget what it has read before.

    Args:
        run_dir: the run directory; the file goes into its `tensorboard/`.
    """

    def __init__(self, run_dir: Path) -> None:
        folder = run_dir / FOLDER
        folder.mkdir(exist_ok=True)
        former = list(folder.glob("events.out.tfevents.*.record"))
        now = max([int(time.time()), *(_seconds_of(path) + 1 for path in former)])
        self.path = folder / _NAME.format(seconds=now)
        self._file = self.path.open("xb")
        self._append(_event(now, _message(3, b"brain.Event:2")))
        self._append(_event(now, _message(7, b"\x08" + _varint(_START))))
        self._flush()
        for path in former:
            path.unlink(missing_ok=True)

    def log(self, line: Mapping[str, Any]) -> None:
        """Appends one line of the record; what is null in it is left out."""
        values = {
            key: value for key, value in line.items() if key != "step" and isinstance(value, int | float)
        }
        summary = b"".join(
            _message(1, _message(1, name.encode()) + b"\x15" + struct.pack("<f", value))
            for name, value in values.items()
        )
        self._append(_event(time.time(), _message(5, summary), line["step"]))
        self._flush()

    def finish(self) -> None:
        """Closes the file."""
        self._flush()
        self._file.close()

    def _append(self, content: bytes) -> None:
        self._file.write(frame(content))

    def _flush(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())


def _seconds_of(path: Path) -> int:
    digits = path.name.split(".")[3]
    return int(digits) if digits.isdigit() else 0
