"""A corpus: which documents are validation text, the domains of all documents, and a hash of their content."""

import hashlib
import itertools
from collections.abc import Iterable
from typing import NamedTuple

from laep_jax.config import DataConfig
from laep_jax.data.listing import corpus_field
from laep_jax.data.sources import Document, read_documents
from laep_jax.errors import printable, require

MAX_NAMED = 8  # in a message


class Corpus(NamedTuple):
    """The contents of a corpus.

    sha256: of names and texts, in order. validation_runs: (domain, number of documents, bytes of their text) of the
    validation documents, in order, neighbours of one domain together. unheld_domains: those without any, sorted.
    """

    sha256: str
    num_train: int
    num_validation: int
    num_bytes: int
    validation_runs: tuple[tuple[str, int, int], ...]
    unheld_domains: tuple[str, ...]


def is_validation(name: str, share: float) -> bool:
    """Whether a document is validation text. Depends on its name only; `share` is the fraction of names that are.

    >>> sum(is_validation(f"{i}.txt", 0.05) for i in range(1000))
    50
    """
    return int.from_bytes(hashlib.sha256(_name_bytes(name)).digest()[:8]) < share * 2**64


def some_names(names: Iterable[str]) -> str:
    """How many there are where not all are named.

    >>> some_names("ab"), some_names("abcdefghij")
    ('a, b', 'a, b, c, d, e, f, g, h, ... (10)')
    """
    names = list(names)
    more = f", ... ({len(names)})" if len(names) > MAX_NAMED else ""
    return printable(", ".join(names[:MAX_NAMED])) + more


def add_to_hash(sha, document: Document) -> None:
    """Adds a document to a corpus hash, lengths included, so that borders count too."""
    name = _name_bytes(document.name)
    sha.update(b"%d %d %b" % (len(name), len(document.text), name))
    sha.update(document.text)


def survey(config: DataConfig) -> Corpus:
    """Reads the corpus once. `UserError` where it has no document to train on."""
    sha, num_documents, num_bytes, validation, domains = hashlib.sha256(), 0, 0, list[tuple[str, int]](), set()
    for document in read_documents(config):
        add_to_hash(sha, document)
        num_documents += 1
        num_bytes += len(document.text)
        domains.add(document.domain)
        if is_validation(document.name, config.validation_fraction):
            validation.append((document.domain, len(document.text)))
    field, value = corpus_field(config)
    require(num_documents > 0, field, value, "holds no text")
    rule = f"leaves no training document: {field}={value!r} holds {num_documents}"
    require(num_documents > len(validation), "DataConfig.validation_fraction", config.validation_fraction, rule)
    runs = [(name, [size for _, size in run]) for name, run in itertools.groupby(validation, lambda pair: pair[0])]
    return Corpus(
        sha.hexdigest(),
        num_documents - len(validation),
        len(validation),
        num_bytes,
        tuple((name, len(sizes), sum(sizes)) for name, sizes in runs),
        tuple(sorted(domains.difference(name for name, _ in runs))),
    )


def _name_bytes(name: str) -> bytes:
    return name.encode("utf-8", "surrogateescape")  # file names need not be UTF-8
