"""Token streams on disk: made once for a corpus and a tokenizer, and memory-mapped.

A `.tokens` file is named by the hash of the corpus and what its tokens depend on. It holds 64 hexadecimal digits, the
SHA-256 of the header; the header, one JSON line of HEADER bytes in all; then the training and the validation tokens.
A `.json` record is named by the settings and by the names, sizes and modification times of the corpus files. It holds
what was found in them, and which tokens file is theirs, with its size and modification time. A source of a mixture has
the same two files as if it were the only corpus.

Promised: the corpus is read and hashed when a record is made, and at no start after it, as long as no name, size or
modification time differs; where one does, it is read again, and tokenized again only if its content differs.
The tokens are hashed where the file's modification time is not the recorded one; at every opening the record, the
header and the file's size are checked. Damaged files are made again.
Not promised: to find a corpus file changed with its size and time kept, or bits of the tokens that flip on the disk.

One process makes a record and its tokens while others that share the cache wait for it; they take over if it dies.
On a file system without locks, and with caches of their own, each makes them.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import logging
import os
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from laep_jax.config import DataConfig
from laep_jax.data.corpus import Corpus, add_to_hash, is_validation, survey
from laep_jax.data.listing import Listing, corpus_field
from laep_jax.data.sources import Document, read_documents
from laep_jax.data.tokenizer import Tokenizer
from laep_jax.errors import UserError, require
from laep_jax.paths import is_bucket

VERSION = 2  # of both files, of reading, of domains and of tokenizing: another one makes every cache anew
RECORD_VERSION = 3  # of what a record holds: another one reads every corpus once more, and tokenizes none
DIGEST, HEADER = 64, 4096  # bytes
DOCUMENTS_CHUNK, BYTES_CHUNK = 256, 1 << 24  # tokenized together
CHUNK = 1 << 22  # bytes hashed at a time

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Tokens:
    """Both sides of a corpus as streams: documents in order, each closed by the end-of-document token.

    train, validation: uint16 or uint32, memory-mapped. sha256: of both. run_ends: for each of
    `corpus.validation_runs` the place of its last token in `validation`.
    """

    train: np.ndarray
    validation: np.ndarray
    sha256: str
    corpus: Corpus
    run_ends: np.ndarray


def open_tokens(config: DataConfig, listing: Listing, tokenizer: Tokenizer) -> Tokens:
    """The tokens of a corpus from the cache, which is made where it is missing, out of date or damaged."""
    cache_dir = Path(config.cache_dir)
    files = [(os.fsencode(file.name), file.size, file.mtime_ns) for file in listing.files]
    corpus = config.source, _absolute(config.path), config.text_field, config.domain_field, files
    key = (VERSION, RECORD_VERSION, *corpus, *_token_settings(config, tokenizer))
    record = cache_dir / f"{_hash(key)}.json"
    try:
        if tokens := _open_recorded(record, tokenizer):
            return tokens
        cache_dir.mkdir(parents=True, exist_ok=True)
        with _alone(record.with_suffix(".lock")):
            return _open_recorded(record, tokenizer) or _make(record, config, tokenizer)
    except OSError as error:
        rule = f"cannot hold the cache: {error.filename or cache_dir}: {error.strerror}"
        raise UserError(f"DataConfig.cache_dir={config.cache_dir!r} {rule}") from error


def _absolute(path: str) -> str:
    return os.path.abspath(path) if path and not is_bucket(path) else path


def _hash(key: tuple) -> str:
    return hashlib.sha256(repr(key).encode()).hexdigest()[:32]


def _token_settings(config: DataConfig, tokenizer: Tokenizer) -> tuple:
    return tokenizer.identity, tokenizer.eod, config.validation_fraction


def _open_recorded(record: Path, tokenizer: Tokenizer) -> Tokens | None:
    """The content of a record and its tokens; None if either is missing or damaged."""
    try:
        values = _unsealed(record.read_bytes())
        runs = tuple((name, number, size) for name, number, size in values["corpus"].pop("validation_runs"))
        unheld = tuple(values["corpus"].pop("unheld_domains"))
        corpus = Corpus(**values["corpus"], validation_runs=runs, unheld_domains=unheld)
        path = record.with_name(values["tokens"])
        is_new = path.stat().st_mtime_ns != values["mtime_ns"]
        train, validation, sha256 = _read_tokens(path, tokenizer.dtype, check=is_new)
    except (FileNotFoundError, ValueError):
        return None
    if is_new:
        with contextlib.suppress(OSError):  # of a cache that is only read: the next start hashes again
            _write_record(record, path, corpus, values["run_ends"])
    return Tokens(train, validation, sha256, corpus, np.array(values["run_ends"], np.int64))


def _make(record: Path, config: DataConfig, tokenizer: Tokenizer) -> Tokens:
    """Reads the corpus, and tokenizes it where its tokens are not there yet."""
    if record.exists():
        log.warning("cache %s is damaged or without its tokens: reading the corpus anew", record)
    corpus = survey(config)
    path = record.with_name(f"{_hash((VERSION, corpus.sha256, *_token_settings(config, tokenizer)))}.tokens")
    try:
        streams = _read_tokens(path, tokenizer.dtype, check=True)
    except ValueError as error:
        log.warning("cache %s is damaged (%s): tokenizing anew", path, error)
        streams = None
    except FileNotFoundError:
        streams = None
    if not streams:
        _write_tokens(path, config, corpus, tokenizer)
        streams = _read_tokens(path, tokenizer.dtype, check=False)
    ends = np.flatnonzero(streams[1] == tokenizer.eod)
    rule = f"writes the end of a document, token {tokenizer.eod}, also inside one for validation"
    require(len(ends) == corpus.num_validation, "DataConfig.tokenizer", config.tokenizer, rule)
    run_ends = ends[np.cumsum([number for _, number, _ in corpus.validation_runs], dtype=np.int64) - 1]
    _write_record(record, path, corpus, run_ends.tolist())
    return Tokens(*streams, corpus, run_ends)


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Inside is one process at a time. One that waited ends with the `UserError` of the one it waited for."""
    with path.open("a+", encoding="utf-8") as file:
        waited = False
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.warning("waiting for the process that makes %s", path.with_suffix(".json"))
            fcntl.flock(file, fcntl.LOCK_EX)
            waited = True
        except OSError:
            pass  # no locks here: each process makes its own, and the last one's stays
        file.seek(0)
        if (refusal := file.read()) and waited:
            raise UserError(refusal)
        file.truncate(0)
        try:
            yield
        except UserError as error:
            file.write(str(error))
            raise


def _sealed(values: dict[str, Any], length: int = 0) -> bytes:
    """64 hexadecimal digits and the JSON line that they are the hash of, at least `length` bytes in all."""
    line = json.dumps(values).ljust(length - DIGEST - 1).encode() + b"\n"
    return hashlib.sha256(line).hexdigest().encode() + line


def _unsealed(data: bytes) -> dict[str, Any]:
    """What `_sealed` made. `ValueError` where a byte differs."""
    if hashlib.sha256(data[DIGEST:]).hexdigest().encode() != data[:DIGEST]:
        raise ValueError("its header")
    return json.loads(data[DIGEST:])


def _read_tokens(path: Path, dtype: np.dtype, *, check: bool) -> tuple[np.ndarray, np.ndarray, str]:
    """(training stream, validation stream, their hash). `ValueError` where the size or the header is wrong.

    check: and where any byte differs from what was written.
    """
    with path.open("rb") as file:
        header = _unsealed(file.read(HEADER))
        if check and _hash_rest(file) != header["sha256"]:
            raise ValueError("its tokens")
        sizes = header["num_train"], header["num_validation"]
        if os.fstat(file.fileno()).st_size != HEADER + sum(sizes) * dtype.itemsize:
            raise ValueError("its size")
        stream = np.asarray(np.memmap(file, dtype, mode="r", offset=HEADER, shape=(sum(sizes),)))
    return stream[: sizes[0]], stream[sizes[0] :], header["sha256"]


def _hash_rest(file: BinaryIO) -> str:
    sha = hashlib.sha256()
    while chunk := file.read(CHUNK):
        sha.update(chunk)
    return sha.hexdigest()


def _write_record(record: Path, tokens: Path, corpus: Corpus, run_ends: list[int]) -> None:
    times = {"tokens": tokens.name, "mtime_ns": tokens.stat().st_mtime_ns}
    with _replacing(record) as file:
        file.write(_sealed({"corpus": corpus._asdict(), "run_ends": run_ends, **times}))


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write, which is put in place when it is complete."""
    unfinished = path.with_suffix(f".{uuid.uuid4().hex}")  # without locks other processes may be doing the same
    try:
        with unfinished.open("x+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


def _write_tokens(path: Path, config: DataConfig, corpus: Corpus, tokenizer: Tokenizer) -> None:
    with _replacing(path) as file:
        file.seek(HEADER)
        sizes = _write_streams(file, config, corpus, tokenizer)
        file.seek(HEADER)
        header = {"sha256": _hash_rest(file), "num_train": sizes[0], "num_validation": sizes[1]}
        file.seek(0)
        file.write(_sealed(header, HEADER))


def _write_streams(file: BinaryIO, config: DataConfig, corpus: Corpus, tokenizer: Tokenizer) -> tuple[int, int]:
    """Training tokens, then validation ones, which wait in memory; returns the number of each."""
    num_train, validation = 0, []
    for name, tokens in _tokenize(config, corpus, tokenizer):
        if is_validation(name, config.validation_fraction):
            validation.append(tokens)
        else:
            file.write(tokens.data)
            num_train += len(tokens)
    for tokens in validation:
        file.write(tokens.data)
    return num_train, sum(map(len, validation))


def _tokenize(config: DataConfig, corpus: Corpus, tokenizer: Tokenizer) -> Iterator[tuple[str, np.ndarray]]:
    """(name, tokens closed by the end of document) of every document, in order."""
    sha = hashlib.sha256()
    for some in _batches(read_documents(config)):
        for document, tokens in zip(some, tokenizer.encode([document.text for document in some]), strict=True):
            add_to_hash(sha, document)
            yield document.name, np.append(tokens.astype(tokenizer.dtype), tokenizer.dtype.type(tokenizer.eod))
    require(sha.hexdigest() == corpus.sha256, *corpus_field(config), "changed while it was read")


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """All of them in order, a batch closed where it has enough documents or bytes."""
    some, size = [], 0
    for document in documents:
        some.append(document)
        size += len(document.text)
        if len(some) == DOCUMENTS_CHUNK or size >= BYTES_CHUNK:
            yield some
            some, size = [], 0
    if some:
        yield some
