"""Loading untrusted files safely: opened without blocking, read up to a limit, parsed without executing anything.

A problem with a file raises one `UserError`; `name` is the file's name in its message. A run's own records are limited
only in the length of a line, which is above what a run can write.
"""

import contextlib
import io
import itertools
import json
import math
import os
import shutil
import stat
import uuid
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any, BinaryIO

import numpy as np

from laep_jax.errors import UserError, require, short

MAX_JSON = 2**26  # bytes of a file; a plan for 1,000 layers of 512 experts has 6 MB
MAX_LINE = 2**28  # bytes of a record of a run; a prune of 10,000 layers of 4,096 experts has 200 MB
MAX_ARRAY = 2**33  # bytes of an array


def open_regular(path: Path, name: str) -> BinaryIO:
    """The file, open for reading. A FIFO or a device, which might never end, is refused."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except (OSError, ValueError) as error:  # ValueError: a path with a NUL in it
        raise UserError(f"{name} cannot be read: {getattr(error, 'strerror', error)}") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise UserError(f"{name} is not a regular file")
    return os.fdopen(descriptor, "rb")


def read_bytes(path: Path, name: str, most: int) -> bytes:
    """The file, if it has at most so many bytes."""
    with open_regular(path, name) as file:
        size = os.fstat(file.fileno()).st_size
        require(size <= most, f"size of {name}", size, f"is above {most} bytes")
        try:
            return file.read(size)
        except OSError as error:
            raise UserError(f"{name} cannot be read: {error.strerror}") from error


def parse_json(text: str | bytes, name: str) -> Any:
    """JSON as it is defined: no NaN, no number that a float does not hold, no key twice, no endless nesting."""
    try:
        return json.loads(text, object_pairs_hook=_unique, parse_constant=_finite, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{name} is not JSON: {error}") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in pairs:
        if key in values:
            raise ValueError(f"key {short(key)} stands twice in an object")
        values[key] = value
    return values


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{short(text)} is not a finite number")
    return value


def read_json(path: Path, name: str) -> dict[str, Any]:
    """The object in a JSON file."""
    values = parse_json(read_bytes(path, name, MAX_JSON), name)
    if not isinstance(values, dict):
        raise UserError(f"{name} must hold a JSON object")
    return values


def read_records(path: Path, holding: str = "") -> Iterator[dict[str, Any]]:
    """The records of a metrics.jsonl, one at a time; a last line that is torn is left out.

    holding: only lines with this text in them are parsed, the others skipped.
    """
    with open_regular(path, str(path)) as file:
        for number in itertools.count(1):
            line = file.readline(MAX_LINE + 1)
            if len(line) <= MAX_LINE and not line.endswith(b"\n"):
                return
            if holding.encode() in line:
                yield parse_record(line, f"{path} line {number}")


def parse_record(line: bytes, name: str) -> dict[str, Any]:
    """A line of a metrics.jsonl: an object with `kind` and `step`."""
    require(len(line) <= MAX_LINE, f"length of {name}", len(line), f"is above {MAX_LINE} bytes, so this is no record")
    record = parse_json(line, name)
    if not _is_record(record):
        raise UserError(f"{name} is not a record of a run; remove it to continue")
    return record


def _is_record(record: Any) -> bool:
    if not isinstance(record, dict):
        return False
    kind, step, when = (record.get(name) for name in ("kind", "step", "when"))
    return isinstance(kind, str) and type(step) is int and step >= 0 and isinstance(when, str | None)


def array_names(path: Path, name: str) -> list[str]:
    """The arrays of an .npz file, none of any other: reading that says what is wrong with it."""
    with open_regular(path, name) as file:
        try:
            with zipfile.ZipFile(file) as archive:
                return _array_names(archive)
        except Exception:  # zipfile has many for a damaged file
            return []


def _array_names(archive: zipfile.ZipFile) -> list[str]:
    return [file.removesuffix(".npy") for file in archive.namelist() if file.endswith(".npy")]


def read_array(path: Path, name: str, key: str) -> np.ndarray:
    """The array of a .npy file, or the one called `key` of an .npz file, as `parse_arrays` reads it."""
    with open_regular(path, name) as file:
        zipped = file.read(2) == b"PK"
        file.seek(0)
        if zipped:
            return parse_arrays(file, name, [key])[key]
        try:
            return _parse_array(file, os.fstat(file.fileno()).st_size)
        except Exception as error:
            raise UserError(f"{name} does not read as a .npy or .npz file of numbers: {error}") from error


def read_arrays(path: Path, name: str, keys: Iterable[str]) -> dict[str, np.ndarray]:
    """These arrays of an .npz file, as `parse_arrays` reads them."""
    with open_regular(path, name) as file:
        return parse_arrays(file, name, keys)


def parse_arrays(file: IO[bytes], name: str, keys: Iterable[str] | None = None) -> dict[str, np.ndarray]:
    """These arrays of an .npz file, or all, read-only: integers, floats or booleans, MAX_ARRAY bytes in all."""
    try:
        with zipfile.ZipFile(file) as archive:
            found = _array_names(archive)
            keys = found if keys is None else list(keys)
            missing = [key for key in keys if key not in found]
            require(not missing, f"arrays in {name}", found, f"lack {missing}")
            size = sum(archive.getinfo(f"{key}.npy").file_size for key in keys)
            require(size <= MAX_ARRAY, f"size of the arrays in {name}", size, f"is above {MAX_ARRAY} bytes")
            return {key: _parse_member(archive, archive.getinfo(f"{key}.npy")) for key in keys}
    except UserError:
        raise
    except Exception as error:  # zipfile, zlib and tokenize have many for a damaged file
        raise UserError(f"{name} does not read as an .npz file of numbers: {error}") from error


def to_npz(arrays: dict[str, np.ndarray]) -> bytes:
    """An .npz file, as `parse_arrays` reads it."""
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **arrays)
    return buffer.getvalue()


def _parse_member(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> np.ndarray:
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):  # the others know no bounds
        raise ValueError(f"{info.filename} is compressed as NumPy does not")
    with archive.open(info) as file:
        return _parse_array(file, info.file_size)


def _parse_array(file: IO[bytes], size: int) -> np.ndarray:
    """A .npy file of `size` bytes; its header is believed only where it fits them."""
    if size > MAX_ARRAY or np.lib.format.read_magic(file) != (1, 0):
        raise ValueError(f"an array of {size} bytes, or of another version")
    shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(file)
    length = size - file.tell()
    if dtype.kind not in "biuf" or math.prod(shape) * dtype.itemsize != length:
        raise ValueError(f"{dtype}{list(shape)} in {length} bytes")
    return np.frombuffer(file.read(length), dtype).reshape(shape, order="F" if fortran_order else "C")


def replace_file(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Writes a file beside `path`, syncs it to disk and renames it: written completely or not at all."""
    part = path.with_name(path.name + ".part")
    part.unlink(missing_ok=True)
    with part.open("xb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


@contextlib.contextmanager
def new_folder(out: Path, option: str) -> Iterator[Path]:
    """A folder to fill, which is `out` at the end, or gone. `UserError` where that exists or cannot be written."""
    require(not os.path.lexists(out), option, str(out), "exists; name a new folder")
    part = out.with_name(f"{out.name}.{uuid.uuid4().hex[:8]}.part")
    try:
        part.mkdir(parents=True)
        yield part
        part.rename(out)
    except OSError as error:
        raise UserError(f"{option}={out} cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def refuse_links(run_dir: Path) -> None:
    """`UserError` where something in a run directory is a link: what is written there must not land elsewhere."""
    for path in itertools.chain(run_dir.glob("*"), run_dir.glob("*/*")):
        if path.is_symlink():
            raise UserError(f"{path} is a link; a run writes, replaces and removes in its own directory only")
