"""The files of a corpus, in the order of their names: below a folder, matching a glob, or one.

Links are followed. A file that several names or links lead to is read once, under the name that is no link where there
is one; what is passed over for that is listed. Hidden files are left out, unless a glob asks for them.
"""

import contextlib
import fnmatch
import glob
import os
import stat
import sysconfig
from collections.abc import Iterable, Iterator, Sequence, Set
from pathlib import Path
from typing import NamedTuple

from laep_jax.config import DataConfig
from laep_jax.data.bucket import list_bucket
from laep_jax.errors import UserError, require, short
from laep_jax.paths import is_bucket

NOT_STDLIB = (  # folders of it that are not read
    {"site-packages", "dist-packages", "__pycache__"}
    | {"test", "tests", "idlelib", "turtledemo", "__phello__"}
    | {"encodings", "pydoc_data"}  # tables of characters; one generated file of 0.8 MB
    | {"distutils", "lib2to3"}  # newer versions lack them
)
NOT_FOUND = "is neither a file, a folder with files nor a glob of files"
# compressing a file changes no document's name
PACKED_SUFFIXES = (".gz", ".gzip", ".bz2", ".bz", ".xz", ".zst", ".zstd")


class File(NamedTuple):
    """name: relative to the corpus, without the suffix of a compression. size: bytes. mtime_ns: last modification.

    path: an address, text, where the corpus is in a bucket.
    """

    name: str
    path: Path | str
    size: int
    mtime_ns: int


class Listing(NamedTuple):
    """aliases: names of files and folders that are read under another name."""

    files: tuple[File, ...]
    aliases: tuple[str, ...]


def corpus_field(config: DataConfig) -> tuple[str, str]:
    """The setting that says which corpus it is, and its value."""
    if config.mixture is not None:
        return "DataConfig.mixture", ", ".join(name for name, _, _ in config.mixture)
    return ("DataConfig.path", config.path) if config.path else ("DataConfig.source", config.source)


@contextlib.contextmanager
def of_mixture(name: str) -> Iterator[None]:
    """What is wrong with a source of `DataConfig.mixture` is raised with its name; "" is a single corpus."""
    try:
        yield
    except UserError as error:
        if not name:
            raise
        raise type(error)(f"{name!r} of DataConfig.mixture: {error}") from error


def corpus_text(config: DataConfig) -> str:
    """The same as the beginning of a message."""
    field, value = corpus_field(config)
    return f"{field}={short(value)}"


def list_files(config: DataConfig) -> Listing:
    """Names, sizes and times; no file is opened. `UserError` at a path that is no file, unlistable or doubled."""
    if config.source == "synthetic":
        return Listing((), ())
    if is_bucket(config.path):
        files = _find_in_bucket(config)
        _refuse(files, config)
        return Listing(tuple(files), ())
    try:
        root, found, again = _find_stdlib() if config.source == "stdlib" else _find(config)
        files, names_again = _distinct(found, root, config)
    except OSError as error:
        raise UserError(f"{corpus_text(config)} cannot be read: {error.filename}: {error.strerror}") from error
    _refuse(files, config)
    return Listing(tuple(files), tuple(sorted(names_again + [path.relative_to(root).as_posix() for path in again])))


def _find_stdlib() -> tuple[Path, list[Path], list[Path]]:
    """Sources of the running Python, without what its build wrote (paths and flags of some machine)."""
    root = Path(sysconfig.get_path("stdlib"))
    found, again = _walk(root, NOT_STDLIB)
    built = ("config-", "_sysconfigdata")
    return root, [p for p in found if p.suffix == ".py" and not str(p.relative_to(root)).startswith(built)], again


def _find(config: DataConfig) -> tuple[Path, list[Path], list[Path]]:
    """(what names are relative to, files, folders passed over) of `DataConfig.path`."""
    root, found, again = Path(config.path), [], []
    if root.is_dir():
        found, again = _walk(root)
    elif root.is_file():
        root, found = root.parent, [root]
    else:
        fixed = next((i for i, part in enumerate(root.parts) if glob.has_magic(part)), None)
        if fixed is not None:
            pattern, root = root.parts[fixed:], Path(*root.parts[:fixed])
            found, again = _matching(root, pattern)
    require(bool(found), "DataConfig.path", config.path, NOT_FOUND)
    return root, found, again


def _find_in_bucket(config: DataConfig) -> list[File]:
    root, stored = list_bucket(config.path)
    named = [(file.address.removeprefix(f"{root}/"), file) for file in stored]
    if not any(part.startswith(".") for part in config.path.split("/")):
        named = [(name, file) for name, file in named if not any(part.startswith(".") for part in name.split("/"))]
    require(bool(named), "DataConfig.path", config.path, NOT_FOUND)
    return [File(_plain_name(name), *file) for name, file in sorted(named)]


def _matching(root: Path, pattern: Sequence[str]) -> tuple[list[Path], list[Path]]:
    """Files that match, and folders passed over; pathlib's own `**` enters no links, and glob's never leaves a loop."""
    hidden = any(part.startswith(".") for part in pattern)
    found, again = [], []
    if "**" in pattern:
        first = pattern.index("**")
        for top in sorted(_glob(root, pattern[:first])) if first else [root]:
            below, passed = _walk(top, hidden=hidden) if top.is_dir() else ([], [])
            found += [path for path in below if _fits(path.relative_to(top).parts, pattern[first:])]
            again += passed
    else:
        found = [path for path in _glob(root, pattern) if not path.is_dir()]
    if not hidden:
        found = [path for path in found if not any(part.startswith(".") for part in path.relative_to(root).parts)]
    return found, again


def _glob(root: Path, pattern: Sequence[str]) -> set[Path]:
    try:
        return set(root.glob("/".join(pattern)))
    except ValueError as error:  # as of **.txt, in some versions of Python
        raise UserError(f"DataConfig.path={str(root.joinpath(*pattern))!r} is no pattern: {error}") from error


def _fits(parts: Sequence[str], pattern: Sequence[str]) -> bool:
    """Whether the parts of a path match those of a pattern, where `**` stands for any number of them."""
    if not pattern:
        return not parts
    if pattern[0] == "**":
        return any(_fits(parts[skipped:], pattern[1:]) for skipped in range(len(parts) + 1))
    return bool(parts) and fnmatch.fnmatchcase(parts[0], pattern[0]) and _fits(parts[1:], pattern[1:])


def _walk(root: Path, leave_out: Set[str] = frozenset(), *, hidden: bool = False) -> tuple[list[Path], list[Path]]:
    """(files below a folder, folders passed over): each folder is entered once, by links last, so that loops end."""
    found, again, seen = list[Path](), list[Path](), set[tuple[int, int]]()
    tops = [root]
    for top in tops:  # grows on the way
        for folder, folders, files in os.walk(top, onerror=_stop):
            status = os.stat(folder)
            if (status.st_dev, status.st_ino) in seen:
                again.append(Path(folder))
                folders.clear()
                continue
            seen.add((status.st_dev, status.st_ino))
            names = sorted(name for name in _shown(folders, hidden) if name not in leave_out)
            links = {name for name in names if os.path.islink(os.path.join(folder, name))}
            tops += [Path(folder, name) for name in names if name in links]
            folders[:] = [name for name in names if name not in links]
            found += [Path(folder, name) for name in _shown(files, hidden)]
    return found, again


def _stop(error: OSError) -> None:
    raise error


def _shown(names: Iterable[str], hidden: bool) -> Iterator[str]:
    return (name for name in names if hidden or not name.startswith("."))


def _distinct(paths: Iterable[Path], root: Path, config: DataConfig) -> tuple[list[File], list[str]]:
    """Each file once, in the order of the paths' names, and the names passed over."""
    kept, again = dict[tuple[int, int], tuple[str, File]](), []
    for name, path in sorted((path.relative_to(root).as_posix(), path) for path in paths):
        try:
            status = path.stat()
        except OSError as error:
            raise UserError(f"{corpus_text(config)}: {path} cannot be read: {error.strerror}") from error
        if not stat.S_ISREG(status.st_mode):
            raise UserError(f"{corpus_text(config)}: {path} is not a regular file")
        entry = name, File(_plain_name(name), path, status.st_size, status.st_mtime_ns)
        key = status.st_dev, status.st_ino
        other = kept.setdefault(key, entry)
        if other is not entry:
            if Path(other[1].path).is_symlink() and not path.is_symlink():
                kept[key], entry = entry, other
            again.append(entry[0])
    return [file for _, file in sorted(kept.values())], again


def _plain_name(name: str) -> str:
    stem, suffix = os.path.splitext(name)
    return stem if suffix.lower() in PACKED_SUFFIXES else name


def _refuse(files: Sequence[File], config: DataConfig) -> None:
    """JSON lines as text, and doubles as x.jsonl beside x.jsonl.gz: the same documents in the split by names."""
    if config.source == "text" and all(file.name.endswith(".jsonl") for file in files):
        raise UserError(f"{corpus_text(config)} holds JSON lines only, which source='jsonl' reads, not 'text'")
    paths = dict[str, Path | str]()
    for file in files:
        other = paths.setdefault(file.name, file.path)
        if other is not file.path:
            rule = f"holds {file.name} twice: {other} and {file.path}; remove one, or name the files to read by a glob"
            raise UserError(f"{corpus_text(config)} {rule}")
