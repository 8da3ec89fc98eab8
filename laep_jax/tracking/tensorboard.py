"""TensorBoard event files, in the form that tensorboardX defines, without its writer.

That one has a thread, which ends at the first failed write, and then the run waits for ever at a full queue.
"""

import socket
import struct
import time
from pathlib import Path
from typing import Any

import numpy as np
from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyrefly: ignore[missing-module-attribute]
from tensorboardX.record_writer import masked_crc32c

from laep_jax.tracking.growing_file import Attempts, GrowingFile

MAX_ENTRIES = 20  # of a field that has one number for each domain


class EventFile:
    """A file that is made with its first number. It hides what earlier ones hold from step `purge_step` on."""

    def __init__(self, folder: Path, purge_step: int, attempt: Attempts):
        name = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}.{time.time_ns()}"
        self._file = GrowingFile(folder / name, attempt)
        start = SessionLog(status=SessionLog.START)
        self._waiting = [
            Event(file_version="brain.Event:2"),
            Event(step=purge_step, session_log=start),
        ]

    def write(self, step: int, numbers: list[tuple[str, float]]) -> None:
        """Adds numbers by their tags."""
        if not numbers:
            return
        event = Event(step=step)
        for tag, value in numbers:
            event.summary.value.add(tag=tag.encode(errors="backslashreplace").decode(), simple_value=value)
        self._waiting.append(event)
        for event in self._waiting:
            event.wall_time = time.time()
            self._file.write(_framed(event.SerializeToString()))
        self._waiting.clear()

    def close(self) -> None:
        self._file.close()


def _framed(data: bytes) -> bytes:
    """A record as TensorFlow's files have it: length and data, each with its checksum."""
    length = struct.pack("<Q", len(data))
    return length + struct.pack("<I", masked_crc32c(length)) + data + struct.pack("<I", masked_crc32c(data))


def scalars(tag: str, value: Any) -> list[tuple[str, float]]:
    """TensorBoard's view of a field: a number as it is, numbers by layer as least, mean and largest.

    Of a dictionary with more than MAX_ENTRIES entries the first ones only.

    >>> scalars("train", {"loss": 2.5, "device_imbalance": [1.0, 2.0]})
    [('train/loss', 2.5), ('train/device_imbalance/min', 1.0), ('train/device_imbalance/mean', 1.5), \
('train/device_imbalance/max', 2.0)]
    """
    if isinstance(value, dict):
        shown = list(value.items())[:MAX_ENTRIES]
        return [scalar for name, item in shown for scalar in scalars(f"{tag}/{name}", item)]
    if isinstance(value, list):
        numbers = [item for item in value if isinstance(item, (int, float))]
        if not numbers:
            return []
        return [(f"{tag}/{name}", float(of(numbers))) for name, of in (("min", min), ("mean", np.mean), ("max", max))]
    if isinstance(value, (int, float)):
        return [(tag, float(value))]
    return []
