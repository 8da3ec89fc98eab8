"""TensorBoard event files, in the form that tensorboardX defines, without its writer.

That one has a thread, which ends at the first failed write, and then the run waits for ever at a full queue.

Axes: E experts.
"""

import socket
import struct
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyrefly: ignore[missing-module-attribute]
from tensorboardX.proto.summary_pb2 import HistogramProto  # pyrefly: ignore[missing-module-attribute]
from tensorboardX.proto.types_pb2 import DT_STRING  # pyrefly: ignore[missing-module-attribute]
from tensorboardX.record_writer import masked_crc32c

from laep_jax.tracking.growing_file import Attempts, GrowingFile
from laep_jax.tracking.tracker import scalars

MAX_LAYERS = 20  # with a histogram
NUM_BINS = 30  # of a histogram; TensorBoard shows no more


class EventFile:
    """A file that is made with its first number. It hides what earlier ones hold from step `purge_step` on."""

    def __init__(self, folder: Path, purge_step: int, attempt: Attempts):
        name = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}.{time.time_ns()}"
        self._file = GrowingFile(folder / name, attempt)
        self._waiting = [
            Event(file_version="brain.Event:2", wall_time=time.time()),
            Event(step=purge_step, session_log=SessionLog(status=SessionLog.START), wall_time=time.time()),
        ]

    def log(self, step: int, record: dict[str, Any]) -> None:
        """Adds the numbers of a record, and what waits for them."""
        numbers = scalars(record)
        if not numbers:
            return
        summary = self._summary(step)
        for tag, value in numbers.items():
            summary.value.add(tag=tag, simple_value=value)
        for event in self._waiting:
            self._file.write(_framed(event.SerializeToString()))
        self._waiting.clear()

    def text(self, step: int, tag: str, text: str) -> None:
        """Adds a text, which is shown as it stands; written with the next number."""
        value = self._summary(step).value.add(tag=tag)
        value.metadata.plugin_data.plugin_name = "text"
        value.tensor.dtype = DT_STRING
        value.tensor.tensor_shape.dim.add(size=1)
        code = "".join(f"    {line}\n" for line in text.splitlines())  # the plugin reads Markdown
        value.tensor.string_val.append(code.encode(errors="backslashreplace"))

    def histograms(self, step: int, tokens_per_expert: Sequence[np.ndarray]) -> None:
        """Adds how the tokens of a step spread over the experts, [E] of each layer; written with the next number.

        Of more than MAX_LAYERS layers as many, the first and the last among them.
        """
        summary, last = self._summary(step), len(tokens_per_expert) - 1
        for layer in sorted({round(x) for x in np.linspace(0, last, min(last + 1, MAX_LAYERS))}):
            summary.value.add(tag=f"tokens_per_expert/layer_{layer}", histo=_histogram(tokens_per_expert[layer]))

    def close(self) -> None:
        self._file.close()

    def _summary(self, step: int) -> Any:
        event = Event(step=step, wall_time=time.time())
        self._waiting.append(event)
        return event.summary


def _histogram(tokens_E: np.ndarray) -> HistogramProto:
    """How many experts have how many tokens."""
    experts, edges = np.histogram(tokens_E, bins=NUM_BINS)
    tokens_E = tokens_E.astype(np.float64)
    return HistogramProto(
        min=tokens_E.min(),
        max=tokens_E.max(),
        num=tokens_E.size,
        sum=tokens_E.sum(),
        sum_squares=np.square(tokens_E).sum(),
        bucket_limit=edges[1:],
        bucket=experts,
    )


def _framed(data: bytes) -> bytes:
    """A record as TensorFlow's files have it: length and data, each with its checksum."""
    length = struct.pack("<Q", len(data))
    return length + struct.pack("<I", masked_crc32c(length)) + data + struct.pack("<I", masked_crc32c(data))
