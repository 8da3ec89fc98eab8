"""A run directory belongs to one run at a time, can be written, and has room for checkpoints."""

import contextlib
import fcntl
import logging
import os
import shutil
import socket
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from laep_jax.errors import UnavailableError, UserError
from laep_jax.files import MAX_JSON
from laep_jax.storage import Disk, Storage

LOCK_FILE = "run.lock"
CHECKPOINTS = "checkpoints"  # the directory of a run's checkpoints
STATES = 2  # of which there must be room: one that is kept, and the next while it is written

log = logging.getLogger(__name__)


class TakenOverError(UserError):
    """Another process has started the run that this one was training."""


@contextlib.contextmanager
def exclusive(run: Storage) -> Iterator[Callable[[], None]]:
    """Keeps a run to this process; gives what raises `TakenOverError` once it is no longer so.

    On disk by a lock, which the kernel releases when the process dies: `UserError` naming the process that is inside,
    or only a warning where the file system has no locks. In a bucket the newest start wins, since nothing there ends
    with a process that was killed: whoever writes its name last has the run, and the one before notices at its next
    checkpoint.
    """
    own = f"process {os.getpid()} on {socket.gethostname()}"
    if isinstance(run, Disk):
        with _locked(run.root, own):
            yield lambda: None
        return
    claim = f"{own} {uuid.uuid4().hex}\n".encode()
    run.write(LOCK_FILE, claim)

    def require_ours() -> None:
        try:
            found = run.read(LOCK_FILE, MAX_JSON)
        except UnavailableError:
            raise
        except UserError:  # somebody has tidied up
            run.write(LOCK_FILE, claim)
            return
        if found != claim:
            other = found.decode(errors="replace").rpartition(" ")[0]
            raise TakenOverError(f"{run.root} was taken over by {other}; this process ends")

    yield require_ours


@contextlib.contextmanager
def _locked(run_dir: Path, own: str) -> Iterator[None]:
    run_dir.mkdir(parents=True, exist_ok=True)
    with _open(run_dir / LOCK_FILE) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise UserError(f"{run_dir} is in use by {file.read().strip() or 'another process'}") from None
        except OSError as error:
            log.warning("%s: nothing keeps a second run out, %s", run_dir, error.strerror)
        file.truncate(0)
        file.write(f"{own}\n")
        file.flush()
        yield


def require_directory(run_dir: Path) -> None:
    """`UserError` where something else has the name of the run directory, of a folder above it, or of one in it."""
    ours = (*reversed(run_dir.absolute().parents), run_dir, run_dir / CHECKPOINTS, run_dir / "loads")
    for path in ours:
        if path.exists() and not path.is_dir():
            raise UserError(f"{path} is not a directory")


def require_savable(run: Storage) -> None:
    """`UserError` where Orbax would take a name on the path for a pattern, and never find what it saved."""
    path = str(run.root)
    found = sorted(set(path) & set("*?[\\"))
    if found:
        raise UserError(f"{path!r} has {' '.join(found)} in it, which Orbax reads as a pattern; use another workdir")


def require_writable(run: Storage) -> None:
    """`UserError` unless a file can be written and removed."""
    name = f".{uuid.uuid4().hex}"
    try:
        run.write(name, b"\0")
        run.remove(name)
    except OSError as error:
        raise UserError(f"{run.root} cannot be written: {error.strerror}") from error


def require_room(run_dir: Path, state_bytes: int) -> None:
    """`UserError` unless the file system of `run_dir`, which exists, has room for two states of this size."""
    free = shutil.disk_usage(run_dir).free
    if free < STATES * state_bytes:
        raise UserError(
            f"{run_dir} has {free / 1e9:,.2f} GB free, and {STATES} checkpoints of"
            f" {state_bytes / 1e9:,.2f} GB must have room"
        )


def _open(path: Path):
    try:
        return path.open("a+", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path.parent} cannot be written: {error.strerror}") from error
