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
from laep_jax.tracking.tracker import identity


class MetricsFile:
    """The file of a run that has `resume_step` steps; 0 is a new run and empties it. `UserError` on a damaged line.

    Of the resumed step every record stays: which of them came before its checkpoint shows when the first one that came
    after it is written again. That one and those behind it are then replaced.
    """

    def __init__(self, path: Path, resume_step: int, attempt: Attempts):
        self._path, self._file = path, GrowingFile(path, attempt)
        self.last_step = 0  # of the run before it was interrupted
        self.before: set[tuple] = set()  # identities of the records that it had from the resumed step on
        self._old: dict[tuple, int] = {}  # where the records of the resumed step begin
        self._new = bytearray()  # what has been written of it since
        if not resume_step:
            path.unlink(missing_ok=True)
        elif path.exists():
            self.before, self._old = _cut(path, resume_step)
            self.last_step = max((step for _, step, _ in self.before), default=0)
        self.is_complete = not resume_step or bool(self._old)  # there is a record of every step
        self._file.write(b"")

    def log(self, step: int, record: dict[str, Any]) -> None:
        """Appends a record, on disk at once unless writing fails."""
        line = (json.dumps({"kind": record["kind"], "step": step} | record, allow_nan=False) + "\n").encode()
        start = self._old.get(identity(step, record))
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


def _cut(path: Path, step: int) -> tuple[set[tuple], dict[tuple, int]]:
    """Truncates the file behind the records of `step`; returns what it had from there on, and where these begin.

    A torn last line goes in any case.
    """
    size, before, places = None, set[tuple](), dict[tuple, int]()
    with path.open("rb") as file:
        for start, end, record in _backwards(file.fileno(), path):
            size = end if size is None else size
            if record["step"] < step:
                break
            name = identity(record["step"], record)
            before.add(name)
            if record["step"] > step:
                size, places = start, {}
            else:
                places[name] = start
    os.truncate(path, size or 0)
    return before, places


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
