"""Token streams on disk: made once for a corpus and a tokenizer, checked at each opening, memory-mapped.

A file is 64 hexadecimal digits, the SHA-256 of the header; the header, one JSON line of HEADER bytes in
all; then the training tokens and the held-out tokens. The header holds the SHA-256 of the tokens.
"""

import dataclasses
import hashlib
import json
import logging
import os
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from laep_jax.config import DataConfig
from laep_jax.data.corpus import Corpus, add_to_hash, corpus_field, is_heldout
from laep_jax.data.sources import Document, read_documents
from laep_jax.data.tokenizer import Tokenizer
from laep_jax.errors import UserError, require

VERSION = 1  # of the file, of reading and of tokenizing: another one makes every cache anew
DIGEST, HEADER = 64, 4096  # bytes
DOCUMENTS_AT_ONCE, BYTES_AT_ONCE = 256, 1 << 24  # tokenized together
CHUNK = 1 << 22  # bytes hashed at a time

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Tokens:
    """Both sides of a corpus as streams: documents in order, each closed by the end-of-document token.

    train, heldout: uint16 or uint32, memory-mapped. sha256: of both.
    """

    train: np.ndarray
    heldout: np.ndarray
    sha256: str


def open_tokens(config: DataConfig, corpus: Corpus, tokenizer: Tokenizer) -> Tokens:
    """The tokens of a corpus from the cache, which is made or made anew where it is missing or damaged."""
    parts = (VERSION, corpus.sha256, tokenizer.identity, tokenizer.eod, config.heldout_share)
    key = hashlib.sha256(repr(parts).encode()).hexdigest()
    path = Path(config.cache_dir) / f"{key[:32]}.tokens"
    try:
        if path.exists():
            try:
                return _read(path, tokenizer.dtype)
            except ValueError as error:
                log.warning("cache %s is damaged (%s): tokenizing anew", path, error)
        path.parent.mkdir(parents=True, exist_ok=True)
        _write(path, config, corpus, tokenizer)
        return _read(path, tokenizer.dtype)
    except OSError as error:
        rule = f"cannot hold the cache: {error.filename or path}: {error.strerror}"
        raise UserError(f"DataConfig.cache_dir={config.cache_dir!r} {rule}") from error


def _read(path: Path, dtype: np.dtype) -> Tokens:
    """`ValueError` where any byte differs from what was written."""
    with path.open("rb") as file:
        digest, line = file.read(DIGEST), file.read(HEADER - DIGEST)
        if hashlib.sha256(line).hexdigest().encode() != digest:
            raise ValueError("its header")
        header = json.loads(line)
        if _hash_rest(file) != header["sha256"]:
            raise ValueError("its tokens")
        sizes = header["num_train"], header["num_heldout"]
        stream = np.asarray(np.memmap(file, dtype, mode="r", offset=HEADER, shape=(sum(sizes),)))
    return Tokens(stream[: sizes[0]], stream[sizes[0] :], header["sha256"])


def _hash_rest(file: BinaryIO) -> str:
    sha = hashlib.sha256()
    while chunk := file.read(CHUNK):
        sha.update(chunk)
    return sha.hexdigest()


def _write(path: Path, config: DataConfig, corpus: Corpus, tokenizer: Tokenizer) -> None:
    """Tokenizes into a file of its own and puts it in place when it is complete."""
    unfinished = path.with_suffix(f".{uuid.uuid4().hex}")  # other processes may be doing the same
    try:
        with unfinished.open("x+b") as file:
            file.seek(HEADER)
            sizes = _write_tokens(file, config, corpus, tokenizer)
            file.seek(HEADER)
            line = json.dumps({"sha256": _hash_rest(file), "num_train": sizes[0], "num_heldout": sizes[1]})
            line = line.ljust(HEADER - DIGEST - 1).encode() + b"\n"
            file.seek(0)
            file.write(hashlib.sha256(line).hexdigest().encode() + line)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


def _write_tokens(file: BinaryIO, config: DataConfig, corpus: Corpus, tokenizer: Tokenizer) -> tuple[int, int]:
    """Training tokens, then held-out ones, which wait in memory; returns the number of each."""
    num_train, heldout = 0, []
    for name, tokens in _tokenize(config, corpus, tokenizer):
        if is_heldout(name, config.heldout_share):
            heldout.append(tokens)
        else:
            file.write(tokens.data)
            num_train += len(tokens)
    for tokens in heldout:
        file.write(tokens.data)
    return num_train, sum(map(len, heldout))


def _tokenize(config: DataConfig, corpus: Corpus, tokenizer: Tokenizer) -> Iterator[tuple[str, np.ndarray]]:
    """(name, tokens closed by the end of document) of every document, in order."""
    sha = hashlib.sha256()
    for some in _batches(read_documents(config)):
        for document, tokens in zip(some, tokenizer.encode([text for _, text in some]), strict=True):
            add_to_hash(sha, document)
            yield document.name, np.append(tokens.astype(tokenizer.dtype), tokenizer.dtype.type(tokenizer.eod))
    require(sha.hexdigest() == corpus.sha256, *corpus_field(config), "changed while it was read")


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """All of them in order, a batch closed where it has enough documents or bytes."""
    some, size = [], 0
    for document in documents:
        some.append(document)
        size += len(document.text)
        if len(some) == DOCUMENTS_AT_ONCE or size >= BYTES_AT_ONCE:
            yield some
            some, size = [], 0
    if some:
        yield some
