"""Where text comes from: named documents of UTF-8 bytes, always in the same order.

A document's name is its path relative to the corpus, with "#" and its number where a file holds several.
What cannot be read stops the run; only hidden files, blank lines and empty texts are passed over.
"""

import glob
import gzip
import json
import os
import sysconfig
import zlib
from collections.abc import Iterable, Iterator, Set
from pathlib import Path
from typing import NamedTuple

from laep_jax.config import DataConfig
from laep_jax.data.synthetic import synthetic_documents
from laep_jax.errors import UserError, require

NOT_STDLIB = (  # folders of it that are not read
    {"site-packages", "dist-packages", "__pycache__"}
    | {"test", "tests", "idlelib", "turtledemo", "__phello__"}
    | {"encodings", "pydoc_data"}  # tables of characters; one generated file of 0.8 MB
    | {"distutils", "lib2to3"}  # newer versions lack them
)
RECORDS_AT_ONCE = 1024


class Document(NamedTuple):
    """One text: its name in the corpus and its UTF-8 bytes, at least one."""

    name: str
    text: bytes


def read_documents(config: DataConfig) -> Iterator[Document]:
    """Every document with any text in it. `UserError` at the first that cannot be read."""
    for name, text in _read(config):
        if text:
            yield Document(name, text)


def _read(config: DataConfig) -> Iterator[tuple[str, bytes]]:
    if config.source == "synthetic":
        yield from synthetic_documents()
    elif config.source == "stdlib":
        yield from _read_stdlib()
    else:
        read = {"text": _read_text, "jsonl": _read_jsonl, "array_record": _read_array_record}[config.source]
        try:
            for name, path in _find_files(config):
                yield from read(name, path, config)
        except OSError as error:
            raise UserError(f"{_field(config)} cannot be read: {error.filename}: {error.strerror}") from error


def _read_stdlib() -> Iterator[tuple[str, bytes]]:
    """Sources of the running Python, without what its build wrote (paths and flags of some machine)."""
    root = Path(sysconfig.get_path("stdlib"))
    for name, path in _named(_walk(root, NOT_STDLIB), root):
        if path.suffix == ".py" and not name.startswith(("config-", "_sysconfigdata")):
            yield name, _utf8(path.read_bytes(), "DataConfig.source='stdlib'", name)


def _read_text(name: str, path: Path, config: DataConfig) -> Iterator[tuple[str, bytes]]:
    yield name, _utf8(path.read_bytes(), _field(config), name)


def _read_jsonl(name: str, path: Path, config: DataConfig) -> Iterator[tuple[str, bytes]]:
    """One document a line, named by its line; compressing the file changes no name."""
    name = name.removesuffix(".gz")
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield f"{name}#{number}", _json_text(line, f"line {number} of {name}", config)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{_field(config)} holds a damaged gzip file: {path}") from error


def _json_text(line: bytes, where: str, config: DataConfig) -> bytes:
    """The document in one line of JSON."""
    try:
        value = json.loads(line)
    except ValueError as error:
        raise UserError(f"{_field(config)} must hold JSON lines, but {where} is none: {error}") from error
    field = ("DataConfig.text_field", config.text_field)
    require(isinstance(value, dict) and config.text_field in value, *field, f"is not in {where}")
    text = value[config.text_field]
    require(isinstance(text, str), *field, f"holds no string in {where}")
    try:
        return text.encode()
    except UnicodeEncodeError as error:  # JSON can write one half of a surrogate pair
        raise UserError(f"{_field(config)} holds a text that is not UTF-8: {where}: {error.reason}") from error


def _read_array_record(name: str, path: Path, config: DataConfig) -> Iterator[tuple[str, bytes]]:
    """One document a record, named by its index."""
    from array_record.python.array_record_module import ArrayRecordReader

    problem = f"{_field(config)} holds no ArrayRecord file or a damaged one: {path}"
    try:
        reader = ArrayRecordReader(str(path))
        number = reader.num_records()
        for first in range(0, number, RECORDS_AT_ONCE):
            for index, record in enumerate(reader.read(first, min(first + RECORDS_AT_ONCE, number)), first):
                yield f"{name}#{index}", _utf8(record, _field(config), f"record {index} of {name}")
    except (RuntimeError, IndexError) as error:
        raise UserError(problem) from error
    if not reader.ok():  # without a footer it has no records, and says no more
        raise UserError(problem)


def _find_files(config: DataConfig) -> list[tuple[str, Path]]:
    """(relative name, path) of the file, the files below the folder, or those that match the glob."""
    root, found = Path(config.path), []
    if root.is_dir():
        found = list(_walk(root))
    elif root.is_file():
        root, found = root.parent, [root]
    else:
        found = [Path(path) for path in set(glob.glob(config.path, recursive=True)) if os.path.isfile(path)]
        fixed = next((i for i, part in enumerate(root.parts) if glob.has_magic(part)), 0)
        root = Path(*root.parts[:fixed])
    require(bool(found), "DataConfig.path", config.path, "is neither a file, a folder with files nor a glob of files")
    return _named(found, root)


def _walk(root: Path, leave_out: Set[str] = frozenset()) -> Iterator[Path]:
    """Files below a folder but hidden ones; folders named in `leave_out` are not entered."""

    def stop(error: OSError):
        raise error

    for folder, folders, files in os.walk(root, onerror=stop):
        folders[:] = [name for name in folders if name not in leave_out and not name.startswith(".")]
        yield from (Path(folder, name) for name in files if not name.startswith("."))


def _named(paths: Iterable[Path], root: Path) -> list[tuple[str, Path]]:
    """Each path with its name relative to `root`, in the order of the names."""
    return sorted((path.relative_to(root).as_posix(), path) for path in paths)


def _utf8(data: bytes, field: str, where: str) -> bytes:
    try:
        data.decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{field} holds a text that is not UTF-8: {where}, byte {error.start}") from error
    return data


def _field(config: DataConfig) -> str:
    return f"DataConfig.path={config.path!r}"
