"""Loss of power: what is on disk at a moment, found out without cutting any power."""

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

Syncs = dict[tuple[int, int], tuple[int, int]]  # by device and inode: time of change and size when it was synced


@contextlib.contextmanager
def recorded_syncs() -> Iterator[Syncs]:
    """Every `os.fsync` of this process as long as this lasts."""
    syncs: Syncs = {}
    fsync = os.fsync

    def recording(fd) -> None:
        found = os.fstat(fd)
        fsync(fd)
        syncs[found.st_dev, found.st_ino] = found.st_mtime_ns, found.st_size

    os.fsync = recording
    try:
        yield syncs
    finally:
        os.fsync = fsync


def not_on_disk(directory: Path, syncs: Syncs) -> list[Path]:
    """What may be lost of a directory: files not synced since their last change, directories since a name in them."""
    paths = [directory, *sorted(directory.rglob("*"))]
    states = [(path, path.stat()) for path in paths]
    return [path for path, s in states if syncs.get((s.st_dev, s.st_ino)) != (s.st_mtime_ns, s.st_size)]


@contextlib.contextmanager
def mounted(image: Path, place: Path, *, make: bool = False) -> Iterator[None]:
    """An ext4 image of 64 MiB, mounted at `place` as long as this lasts; make: new. Needs privileges.

    A copy of the image file taken meanwhile holds what a loss of power at that moment would leave.
    """
    if make:
        image.write_bytes(b"")
        os.truncate(image, 2**26)
        subprocess.run(["mkfs.ext4", "-q", str(image)], check=True, capture_output=True)
    place.mkdir(exist_ok=True)
    subprocess.run(["mount", "-o", "loop", str(image), str(place)], check=True, capture_output=True)
    try:
        yield
    finally:
        subprocess.run(["umount", str(place)], check=True, capture_output=True)
