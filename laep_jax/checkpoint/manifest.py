"""What a step of a run's checkpoints consists of: its folder, every file with its size, and the small ones' hashes.

Written last, which is what makes the step count, and itself protected by a hash. Large files are array data, which
nobody but the hosts that need it should read: what is in them is covered by the fingerprints
(`laep_jax.state.fingerprint`). In a bucket, where each file to read is a request, only sizes are compared.
"""

import hashlib
import json
import re
from collections.abc import Iterable
from typing import Any

from laep_jax.errors import UnavailableError, UserError
from laep_jax.files import MAX_JSON, parse_json
from laep_jax.storage import Disk, Storage

HASHED_BYTES = 2**20  # larger files are known by their size only
FOLDER = "[0-9a-f]{8}"  # a folder's name, drawn for each save


class DamagedError(UserError):
    """A checkpoint is not what was saved; the message names the file, or the leaf, layer and expert.

    step: which checkpoint, where that is known.
    """

    step: int | None = None


def sealed(content: Any) -> str:
    """JSON that carries its own hash. `ValueError` for NaN, which is no JSON."""
    return json.dumps({"sha256": _hash_of(content), "content": content}, separators=(",", ":"), allow_nan=False)


def read_sealed(storage: Storage, name: str) -> Any:
    """What `sealed` was given, as JSON makes it; `DamagedError` where it is not that."""
    text = read_file(storage, name, MAX_JSON)
    try:
        found = parse_json(text, "it")
        digest, content = found["sha256"], found["content"]
        is_whole = digest == _hash_of(content)
    except (UserError, KeyError, TypeError, RecursionError) as error:
        raise DamagedError(f"{storage.path(name)} is damaged: it does not read as JSON of laep_jax") from error
    if not is_whole:
        raise DamagedError(f"{storage.path(name)} is damaged: it does not have its own hash")
    return content


def read_file(storage: Storage, name: str, most: int, sha256: str | None = None) -> bytes:
    """A file's bytes; `DamagedError` where they do not read, are more than `most` or do not have this hash."""
    try:
        content = storage.read(name, most)
    except UnavailableError:
        raise
    except UserError as error:
        reason = getattr(error.__cause__, "strerror", error)
        raise DamagedError(f"{storage.path(name)} does not read: {reason}") from error
    if sha256 is not None and hashlib.sha256(content).hexdigest() != sha256:
        raise DamagedError(f"{storage.path(name)} is damaged: it does not have the hash it was saved with")
    return content


def make_manifest(storage: Storage, step: str, folder: str, names: Iterable[str] = ()) -> str:
    """Lists every file that is now in a folder of a step. names: of files that must be among them."""
    files = {}
    for name, size in storage.files(f"{step}/{folder}").items():
        hashed = isinstance(storage, Disk) and size <= HASHED_BYTES
        content = storage.read(f"{step}/{folder}/{name}", HASHED_BYTES) if hashed else None
        files[name] = [size, None if content is None else hashlib.sha256(content).hexdigest()]
    if missing := sorted({*names} - files.keys()):
        raise ValueError(f"{storage.path(f'{step}/{folder}/{missing[0]}')} was written and is gone")
    return sealed({"folder": folder, "files": files})


def read_manifest(storage: Storage, name: str) -> tuple[str, dict[str, list]]:
    """The folder of a step and its files. `UserError` where it is one of an earlier version."""
    content = read_sealed(storage, name)
    if not isinstance(content, dict) or not re.fullmatch(FOLDER, str(content.get("folder"))):
        raise UserError(f"{storage.path(name)} is of laep_jax 0.1, which reads it; this version does not")
    return content["folder"], content["files"]


def check_files(storage: Storage, step: str, name: str) -> None:
    """`DamagedError` naming the first file that is not as the manifest of that name says; more files may be there."""
    folder, files = read_manifest(storage, f"{step}/{name}")
    found = storage.files(f"{step}/{folder}")
    for file, (size, digest) in files.items():
        path = storage.path(f"{step}/{folder}/{file}")
        if file not in found:
            raise DamagedError(f"{path} is missing")
        if found[file] != size:
            raise DamagedError(f"{path} has {found[file]} bytes instead of {size}")
        if digest and isinstance(storage, Disk):
            read_file(storage, f"{step}/{folder}/{file}", size, digest)


def _hash_of(content: Any) -> str:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
