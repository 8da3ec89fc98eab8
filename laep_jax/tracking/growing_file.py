"""Log files: where one cannot be written, the run continues, reports it once, and tries again."""

import os
from collections.abc import Callable
from pathlib import Path


class Attempts:
    """Attempts to write. A failure is reported, once until all that failed has succeeded. report: shows a line."""

    def __init__(self, report: Callable[[str], None]):
        self._report = report
        self._failing: set[Path] = set()

    def __call__(self, path: Path, write: Callable[[], object]) -> bool:
        """Whether `write`, which writes to `path`, succeeded."""
        try:
            write()
        except OSError as error:
            if not self._failing:
                self._report(f"{path} cannot be written: {error.strerror}; logs wait in memory and are tried again")
            self._failing.add(path)
            return False
        if path in self._failing:
            self._failing.remove(path)
            if not self._failing:
                self._report("the logs that waited are written")
        return True

    def report_missing(self) -> None:
        """Names what is still to be written when the run ends."""
        if self._failing:
            self._report(f"not complete, since it could not be written: {', '.join(map(str, sorted(self._failing)))}")


class GrowingFile:
    """A file that is appended to; made with the first bytes. What cannot be written waits for the next attempt.

    A write that is cut short is continued where it ended, so that the file is complete once everything is written.
    """

    def __init__(self, path: Path, attempt: Attempts):
        self._path, self._attempt = path, attempt
        self._descriptor: int | None = None
        self._waiting = bytearray()

    def write(self, data: bytes) -> None:
        """Appends, or keeps for later. Does not sync."""
        self._waiting += data
        self._attempt(self._path, self._write_waiting)

    def sync(self) -> None:
        """Tries to bring everything to disk."""
        if self._waiting or self._descriptor is not None:
            self._attempt(self._path, self._sync)

    def truncate(self, size: int) -> None:
        """Drops what is behind `size` bytes and what waits."""
        self._waiting.clear()
        os.truncate(self._path, size)

    def close(self) -> None:
        """Closes after a last attempt."""
        self.sync()
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _write_waiting(self) -> None:
        if self._descriptor is None:
            self._path.parent.mkdir(exist_ok=True)
            self._descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        while self._waiting:
            del self._waiting[: os.write(self._descriptor, self._waiting)]

    def _sync(self) -> None:
        self._write_waiting()
        assert self._descriptor is not None
        os.fsync(self._descriptor)
