"""metrics.jsonl, in which an interruption leaves no trace: on resuming it is cut back to the step of the checkpoint.

Steps do not descend from line to line, so that only the lines of the end are read for that, whatever the file's size.
"""

import json
import mmap
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from laep_jax.files import MAX_LINE, parse_record
from laep_jax.tracking.growing_file import Attempts, GrowingFile


class MetricsFile:
    """The file of a run that has `resume_step` steps; 0 is a new run and empties it. `UserError` on a damaged line.

    Of the resumed step every record stays: which of them came before its checkpoint shows when the first one that came
    after it is written again. That one and those behind it are then replaced.
    """

    def __init__(self, path: Path, resume_step: int, attempt: Attempts):
        self._path, self._file = path, GrowingFile(path, attempt)
        self.last_step = 0  # of the run before it was interrupted
        self._old: dict[tuple, int] = {}  # where the records of the resumed step begin
        self._new = bytearray()  # what has been written of it since
        if not resume_step:
            path.unlink(missing_ok=True)
        elif path.exists():
            self.last_step, self._old = _cut(path, resume_step)
        self.is_complete = not resume_step or bool(self._old)  # there is a record of every step
        self._file.write(b"")

    def log(self, step: int, record: dict[str, Any]) -> None:
        """Appends a record, on disk at once unless writing fails."""
        record = {"kind": record["kind"], "step": step} | record
        line = (json.dumps(record, allow_nan=False) + "\n").encode()
        start = self._old.get(_identity(record))
        if start is not None:
            self._file.truncate(start)
            self._file.write(bytes(self._new))
            self._old = {identity: place for identity, place in self._old.items() if place < start}
        self._new += line if self._old else b""
        self._file.write(line)

    def sync(self) -> None:
        self._file.sync()

    def close(self) -> None:
        self._file.close()


def _identity(record: dict) -> tuple:
    return record["kind"], record["step"], record.get("when")


def _cut(path: Path, step: int) -> tuple[int, dict[tuple, int]]:
    """Truncates the file behind the records of `step`; returns the last step it had, and where these records begin.

    A torn last line goes in any case.
    """
    size, last, places = None, 0, dict[tuple, int]()
    with path.open("rb") as file:
        for start, end, record in _backwards(file.fileno(), path):
            size, last = end if size is None else size, max(last, record["step"])
            if record["step"] < step:
                break
            if record["step"] > step:
                size, places = start, {}
            else:
                places[_identity(record)] = start
    os.truncate(path, size or 0)
    return last, places


def _backwards(descriptor: int, path: Path) -> Iterator[tuple[int, int, dict]]:
    """Where each record begins and ends, and the record, the last one first."""
    if not os.fstat(descriptor).st_size:
        return
    with mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ) as data:
        end = data.rfind(b"\n") + 1
        while end:
            start = data.rfind(b"\n", 0, end - 1) + 1
            yield start, end, parse_record(data[start : min(end, start + MAX_LINE + 1)], f"{path} at byte {start}")
            end = start
