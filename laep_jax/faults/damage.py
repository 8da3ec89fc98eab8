"""Harm to a file, as disks, file systems and people do it."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from laep_jax.training.cut_restore import open_leaves
from laep_jax.training.manifest import write_manifest


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


def change_stored(step: Path, key: str, index: tuple[int, ...]) -> None:
    """Changes the last bit of one float32 of a checkpoint's state; the manifest knows nothing of it.

    step: the checkpoint's directory. key: of the leaf, `params.runs.0.moe.down_EFD`.
    """
    array = open_leaves(step / "state", [key], write=True)[key]
    value = np.asarray(array[index].read().result(), np.float32)
    array[index].write((value.view(np.uint32) ^ 1).view(np.float32)).result()
    write_manifest(step)
