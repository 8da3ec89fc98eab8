"""Where the files of a run are: in a directory, or in a bucket of Google Cloud Storage.

Both keep the same promises: `write` puts a file there as a whole or not at all, and when it returns the file is durable
and every process finds it. Names are relative, with slashes. Files of a bucket are read and written by TensorStore's
`KvStore`, as arrays are, with the same credentials and the same attempts after a failure. They are listed by gcsfs,
without its cache: TensorStore takes a listing that is refused for an empty one.
"""

import contextlib
import os
import shutil
from pathlib import Path
from typing import Any, NoReturn

from laep_jax.errors import UnavailableError, UserError, require
from laep_jax.files import read_bytes, replace_file
from laep_jax.paths import is_bucket, require_gcsfs

PATIENCE = 300  # seconds for one file; TensorStore tries again meanwhile


class Disk:
    """A directory, which may not exist yet. root: its path."""

    def __init__(self, root: str | os.PathLike[str]):
        self.root = Path(root).absolute()

    def path(self, name: str) -> str:
        """The absolute path or address of a file or folder."""
        return str(self.root / name)

    def read(self, name: str, most: int) -> bytes:
        """A file's bytes; `UserError` where it is missing, does not read or has more than `most`."""
        return read_bytes(self.root / name, "it", most)

    def write(self, name: str, content: bytes) -> None:
        """Makes or replaces a file."""
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, lambda file: file.write(content))
        self._sync_above(path)

    def move(self, name: str, new: str) -> None:
        """Gives a file another name; replaces one that has it."""
        os.replace(self.root / name, self.root / new)
        self._sync_above(self.root / new)

    def remove(self, name: str) -> None:
        """Removes a file, or a folder with everything below it, if it is there; and the folder it was in, if empty."""
        path = self.root / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
        if path.parent != self.root:
            with contextlib.suppress(OSError):  # others may be in it
                path.parent.rmdir()

    def files(self, folder: str) -> dict[str, int]:
        """The size of every file below a folder by its name there."""
        top = self.root / folder
        paths = [path for path in sorted(top.rglob("*")) if path.is_file()]
        return {path.relative_to(top).as_posix(): path.stat().st_size for path in paths}

    def entries(self, folder: str = "") -> list[str]:
        """The names of the files and folders that are directly in a folder; none where it is not there."""
        top = self.root / folder
        return sorted(path.name for path in top.iterdir()) if top.is_dir() else []

    def sync(self, folder: str) -> None:
        """Makes durable what others have written below a folder."""
        for top, _, names in os.walk(self.root / folder, topdown=False):
            for name in (*names, "."):
                sync(Path(top, name))

    def parent(self) -> "Disk":
        """The folder that this one is in."""
        return Disk(self.root.parent)

    def _sync_above(self, path: Path) -> None:
        """The names of a file and of the folders that it is in."""
        while path != self.root:
            path = path.parent
            sync(path)


def sync(path: Path) -> None:
    """Syncs one file, or the names in one directory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Bucket:
    """A folder of a bucket, with the methods of `Disk`. root: its address; nothing is asked of the bucket yet."""

    def __init__(self, root: str):
        import gcsfs  # neither is needed by those who read runs on disk
        import tensorstore as ts

        self.root = root.rstrip("/")
        self._store: Any = ts.KvStore.open(f"{self.root}/").result()
        self._range = ts.KvStore.KeyRange
        self._lists: Any = gcsfs.GCSFileSystem(use_listings_cache=False)

    def path(self, name: str) -> str:
        return f"{self.root}/{name}"

    def read(self, name: str, most: int) -> bytes:
        found = self._result(self._store.read(name), "read", name)
        if found.state != "value":
            raise UserError(f"{self.path(name)} is missing") from FileNotFoundError(2, os.strerror(2))
        require(len(found.value) <= most, "size of it", len(found.value), f"is above {most} bytes")
        return found.value

    def write(self, name: str, content: bytes) -> None:
        self._result(self._store.write(name, content), "written", name)

    def move(self, name: str, new: str) -> None:
        self.write(new, self.read(name, 2**63))
        self._result(self._store.write(name, None), "removed", name)

    def remove(self, name: str) -> None:
        self._result(self._store.write(name, None), "removed", name)
        self._result(
            self._store.delete_range(self._range(f"{name}/", f"{name}0")), "removed", name
        )  # "0" is next to "/"

    def files(self, folder: str) -> dict[str, int]:
        top = f"{self.path(folder) if folder else self.root}/"
        try:
            found = self._lists.find(top, detail=True)
        except Exception as error:  # gcsfs has many, also for a connection that is lost
            self._refuse(folder, "listed", f"{type(error).__name__}: {error}")
        below = {f"gs://{name}".removeprefix(top): info["size"] for name, info in sorted(found.items())}
        return {name: int(size) for name, size in below.items() if name and "://" not in name and name[-1] != "/"}

    def entries(self, folder: str = "") -> list[str]:
        return sorted({name.partition("/")[0] for name in self.files(folder)})

    def sync(self, folder: str) -> None:
        """What is stored is durable."""

    def parent(self) -> "Bucket":
        return Bucket(self.root.rpartition("/")[0])

    def _result(self, future: Any, what: str, name: str) -> Any:
        try:
            return future.result(timeout=PATIENCE)
        except TimeoutError:
            future.cancel()
            self._refuse(name, what, f"no answer within {PATIENCE} s")
        except ValueError as error:
            self._refuse(name, what, str(error).partition(" [")[0])  # what follows is for debugging

    def _refuse(self, name: str, what: str, reason: str) -> NoReturn:
        raise UnavailableError(f"{self.path(name)} cannot be {what}: {reason}")


Storage = Disk | Bucket


def open_storage(root: str | os.PathLike[str]) -> Storage:
    """The storage at a path or a gs:// address. `UserError` without what a bucket needs."""
    if not is_bucket(root):
        return Disk(root)
    address = os.fspath(root)
    require_gcsfs(address)
    found = sorted({*address} & {*"%#|?*[\\"})
    require(not found, "address", address, f"has {' '.join(found)} in it, which TensorStore or Orbax reads otherwise")
    return Bucket(address)
