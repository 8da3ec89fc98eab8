"""What a checkpoint's directory must hold: every file with its size, and the small ones with their hash.

Written last, and itself protected by a hash. Large files are array data, which nobody but the hosts that need it should
read: what is in them is covered by the fingerprints (`laep_jax.state.fingerprint`).
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from laep_jax.errors import UserError
from laep_jax.files import MAX_JSON, parse_json, read_bytes

MANIFEST_FILE = "manifest.json"
HASHED_BYTES = 2**20  # larger files are known by their size only


class DamagedError(UserError):
    """A checkpoint is not what was saved; the message names the file, or the leaf, layer and expert.

    step: which checkpoint, where that is known.
    """

    step: int | None = None


def sealed(content: Any) -> str:
    """JSON that carries its own hash. `ValueError` for NaN, which is no JSON."""
    return json.dumps({"sha256": _hash_of(content), "content": content}, separators=(",", ":"), allow_nan=False)


def read_sealed(path: Path) -> Any:
    """What `sealed` was given, as JSON makes it; `DamagedError` where it is not that."""
    text = read_file(path, MAX_JSON)
    try:
        found = parse_json(text, "it")
        digest, content = found["sha256"], found["content"]
        is_whole = digest == _hash_of(content)
    except (UserError, KeyError, TypeError, RecursionError) as error:
        raise DamagedError(f"{path} is damaged: it does not read as JSON of laep_jax") from error
    if not is_whole:
        raise DamagedError(f"{path} is damaged: it does not have its own hash")
    return content


def read_file(path: Path, most: int, sha256: str | None = None) -> bytes:
    """A file's bytes; `DamagedError` where they do not read, are more than `most` or do not have this hash."""
    try:
        content = read_bytes(path, "it", most)
    except UserError as error:
        raise DamagedError(f"{path} does not read: {getattr(error.__cause__, 'strerror', error)}") from error
    if sha256 is not None and hashlib.sha256(content).hexdigest() != sha256:
        raise DamagedError(f"{path} is damaged: it does not have the hash it was saved with")
    return content


def write_manifest(directory: Path) -> None:
    """Lists every file that is there now, but for an earlier manifest."""
    files = {}
    for path in sorted(path for path in directory.rglob("*") if path.is_file() and path.name != MANIFEST_FILE):
        size = path.stat().st_size
        digest = hashlib.sha256(path.read_bytes()).hexdigest() if size <= HASHED_BYTES else None
        files[path.relative_to(directory).as_posix()] = [size, digest]
    (directory / MANIFEST_FILE).write_text(sealed(files), encoding="utf-8")


def check_files(directory: Path) -> None:
    """`DamagedError` naming the first file that is not as the manifest says; more files may be there."""
    for name, (size, digest) in read_sealed(directory / MANIFEST_FILE).items():
        path = directory / name
        found = path.stat().st_size if path.is_file() else None
        if found != size:
            raise DamagedError(f"{path} " + ("is missing" if found is None else f"has {found} bytes instead of {size}"))
        if digest:
            read_file(path, size, digest)


def bring_to_disk(directory: Path) -> None:
    """Syncs every file below a directory and every directory, itself last."""
    for root, _, files in os.walk(directory, topdown=False):
        for name in (*files, "."):
            sync(Path(root, name))


def sync(path: Path) -> None:
    """Syncs one file, or the names in one directory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _hash_of(content: Any) -> str:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
