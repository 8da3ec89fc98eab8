"""TensorBoard event files, read back."""

import struct
from collections.abc import Iterator
from pathlib import Path

from tensorboardX.proto.event_pb2 import Event  # pyrefly: ignore[missing-module-attribute]
from tensorboardX.proto.summary_pb2 import Summary  # pyrefly: ignore[missing-module-attribute]


def read_events(path: Path) -> Iterator[Event]:
    """Every event of a file."""
    data = path.read_bytes()
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        yield Event.FromString(data[12 : 12 + length])
        data = data[16 + length :]


def event_files(run_dir: Path) -> list[Path]:
    """The event files of a run, oldest first."""
    return sorted((run_dir / "tensorboard").iterdir(), key=lambda path: path.name.split(".")[-1])


def summaries(run_dir: Path) -> list[tuple[int, Summary.Value]]:
    """The step and the value of everything in them."""
    return [
        (event.step, value)
        for path in event_files(run_dir)
        for event in read_events(path)
        for value in event.summary.value
    ]
