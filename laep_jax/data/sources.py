"""Where text comes from: named documents of UTF-8 bytes, always in the same order.

A document's name is its path relative to the corpus, with "#" and its number where a file holds several.
What cannot be read stops the run, and so does what is no regular file, too long, or grows out of all proportion when
unpacked; only hidden files, blank lines, empty texts and links to folders are passed over.
"""

import contextlib
import glob
import gzip
import math
import os
import sysconfig
import zlib
from collections.abc import Iterable, Iterator, Set
from pathlib import Path
from typing import NamedTuple

from laep_jax.config import DataConfig
from laep_jax.data.synthetic import synthetic_documents
from laep_jax.errors import UserError, require
from laep_jax.files import open_regular, parse_json, read_bytes

NOT_STDLIB = (  # folders of it that are not read
    {"site-packages", "dist-packages", "__pycache__"}
    | {"test", "tests", "idlelib", "turtledemo", "__phello__"}
    | {"encodings", "pydoc_data"}  # tables of characters; one generated file of 0.8 MB
    | {"distutils", "lib2to3"}  # newer versions lack them
)
RECORDS_AT_ONCE = 1024
MOST_TEXT = 2**27  # bytes of a document
MOST_LINE = 2**26  # bytes of a JSON line
MOST_GROWTH = 100  # of a gzip file, in units of its size; text grows to 3 to 10 times


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
    yield name, _utf8(read_bytes(path, _name(path, config), MOST_TEXT), _field(config), name)


def _read_jsonl(name: str, path: Path, config: DataConfig) -> Iterator[tuple[str, bytes]]:
    """One document a line, named by its line; compressing the file changes no name."""
    name = name.removesuffix(".gz")
    try:
        for number, line in enumerate(_lines(path, config), 1):
            if line.strip():
                yield f"{name}#{number}", _json_text(line, f"line {number} of {name}", config)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{_field(config)} holds a damaged gzip file: {path}") from error


def _lines(path: Path, config: DataConfig) -> Iterator[bytes]:
    """The lines of a file, unpacked where it is compressed."""
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(open_regular(path, _name(path, config)))
        left = math.inf
        if path.suffix == ".gz":
            left = MOST_GROWTH * os.fstat(file.fileno()).st_size
            file = stack.enter_context(gzip.open(file))
        while line := file.readline(MOST_LINE + 1):
            left -= len(line)
            if len(line) > MOST_LINE:
                raise UserError(f"{_field(config)} holds a line of more than {MOST_LINE} bytes: {path}")
            if left < 0:
                raise UserError(f"{_field(config)} holds a gzip file that grows more than {MOST_GROWTH} times: {path}")
            yield line


def _json_text(line: bytes, where: str, config: DataConfig) -> bytes:
    """The document in one line of JSON."""
    value = parse_json(line, f"{_field(config)}: {where}")
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
    open_regular(path, _name(path, config)).close()
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
        fixed = next((i for i, part in enumerate(root.parts) if glob.has_magic(part)), None)
        if fixed is not None:
            root, pattern = Path(*root.parts[:fixed]), str(Path(*root.parts[fixed:]))
            found = list(_matches(root, pattern))
    require(bool(found), "DataConfig.path", config.path, "is neither a file, a folder with files nor a glob of files")
    return _named(found, root)


def _matches(root: Path, pattern: str) -> Iterator[Path]:
    """What matches but folders, hidden ones only where the pattern has a dot; `**` enters no links, which may loop."""
    hidden = pattern.startswith(".") or "/." in pattern
    try:
        for path in set(root.glob(pattern)):
            if not path.is_dir() and (hidden or not any(part.startswith(".") for part in path.relative_to(root).parts)):
                yield path
    except ValueError as error:  # as of **.txt, in some versions of Python
        raise UserError(f"DataConfig.path={str(root / pattern)!r} is no pattern: {error}") from error


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


def _name(path: Path, config: DataConfig) -> str:
    return f"{_field(config)}: {path}"


def _field(config: DataConfig) -> str:
    return f"DataConfig.path={config.path!r}"
