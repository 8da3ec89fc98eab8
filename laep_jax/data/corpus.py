"""A corpus as a whole: which documents are held out, and a hash of everything in it."""

import hashlib
from typing import NamedTuple

from laep_jax.config import DataConfig
from laep_jax.data.sources import Document, read_documents
from laep_jax.errors import require


class Corpus(NamedTuple):
    """What a corpus holds; `sha256` covers names and texts, in order."""

    sha256: str
    num_train: int
    num_heldout: int
    num_bytes: int


def is_heldout(name: str, share: float) -> bool:
    """Whether a document is held out: its name alone decides, and `share` of all names are.

    >>> sum(is_heldout(f"{i}.txt", 0.05) for i in range(1000))
    50
    """
    return int.from_bytes(hashlib.sha256(_name_bytes(name)).digest()[:8]) < share * 2**64


def add_to_hash(sha, document: Document) -> None:
    """Adds a document to a corpus hash, lengths included, so that borders count too."""
    name = _name_bytes(document.name)
    sha.update(b"%d %d %b" % (len(name), len(document.text), name))
    sha.update(document.text)


def survey(config: DataConfig) -> Corpus:
    """Reads the corpus once. `UserError` where one side of the split would have no document."""
    sha, num_documents, num_heldout, num_bytes = hashlib.sha256(), 0, 0, 0
    for document in read_documents(config):
        add_to_hash(sha, document)
        num_documents += 1
        num_heldout += is_heldout(document.name, config.heldout_share)
        num_bytes += len(document.text)
    field, value = corpus_field(config)
    require(num_documents > 0, field, value, "holds no text")
    for side, count in (("training", num_documents - num_heldout), ("held-out", num_heldout)):
        rule = f"leaves no {side} document: {field}={value!r} holds {num_documents}"
        require(count > 0, "DataConfig.heldout_share", config.heldout_share, rule)
    return Corpus(sha.hexdigest(), num_documents - num_heldout, num_heldout, num_bytes)


def corpus_field(config: DataConfig) -> tuple[str, str]:
    """The setting that says which corpus it is, and its value."""
    return ("DataConfig.path", config.path) if config.path else ("DataConfig.source", config.source)


def _name_bytes(name: str) -> bytes:
    return name.encode("utf-8", "surrogateescape")  # file names need not be UTF-8
