"""A corpus in a bucket of Cloud Storage, read with gcsfs: once, to make the local cache of tokens."""

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from laep_jax.errors import UnavailableError
from laep_jax.paths import require_gcsfs


class Stored(NamedTuple):
    """address: gs://BUCKET/NAME. size: bytes. mtime_ns: when it was last written."""

    address: str
    size: int
    mtime_ns: int


def list_bucket(path: str) -> tuple[str, list[Stored]]:
    """What names are relative to, and the files below a folder, matching a glob, or the one of that name."""
    store = _open_store(path)
    try:
        found = store.glob(path, detail=True) if set(path) & set("*?[") else store.find(path, detail=True)
    except Exception as error:  # gcsfs has many for a bucket that refuses
        raise _refused(path, error) from error
    files = [
        Stored(f"gs://{name}", int(info["size"]), _nanoseconds(info))
        for name, info in sorted(found.items())
        if info["type"] == "file"
    ]
    root = path.partition("*")[0].partition("?")[0].partition("[")[0]
    if root != path or [file.address for file in files] == [path]:
        root = root.rpartition("/")[0]
    return root.rstrip("/"), files


def on_disk(path: Path | str) -> contextlib.AbstractContextManager[Path]:
    """The file, or as long as it is read a copy of one that lies in a bucket and whose address is a text."""
    return _fetched(path) if isinstance(path, str) else contextlib.nullcontext(path)


@contextlib.contextmanager
def _fetched(address: str) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="laep_jax-") as folder:
        try:
            _open_store(address).get_file(address, f"{folder}/fetched")
        except Exception as error:
            raise _refused(address, error) from error
        yield Path(folder, "fetched")


def _open_store(path: str) -> Any:
    require_gcsfs(path)
    import gcsfs

    return gcsfs.GCSFileSystem(use_listings_cache=False)  # or it would list what it has listed before


def _nanoseconds(info: dict[str, Any]) -> int:
    return int(info["mtime"].timestamp() * 1e9)


def _refused(path: str, error: Exception) -> UnavailableError:
    return UnavailableError(f"DataConfig.path={path!r} cannot be read: {type(error).__name__}: {error}")
