"""Harm to a file, as disks, file systems and people do it."""

import os
from collections.abc import Callable
from pathlib import Path


def flip_bit(path: Path, bit: int | None = None) -> None:
    """Changes one bit, by default the one in the middle; size and times stay."""
    times = path.stat()
    content = bytearray(path.read_bytes())
    byte, bit = divmod(4 * len(content) if bit is None else bit, 8)
    content[byte] ^= 1 << bit
    path.write_bytes(content)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def halve(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def empty(path: Path) -> None:
    os.truncate(path, 0)


DAMAGES: dict[str, Callable[[Path], None]] = {
    "one bit flipped": flip_bit,
    "cut in half": halve,
    "emptied": empty,
    "deleted": Path.unlink,
}
