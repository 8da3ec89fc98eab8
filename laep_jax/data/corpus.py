"""A corpus as a whole: which documents are held out, what they belong to, and a hash of everything in it."""

import hashlib
from typing import NamedTuple

from laep_jax.config import DataConfig
from laep_jax.data.sources import Document, read_documents
from laep_jax.errors import require


class Corpus(NamedTuple):
    """What a corpus holds; `sha256` covers names and texts, in order, `heldout_domains` has one name a document."""

    sha256: str
    num_train: int
    heldout_domains: tuple[str, ...]
    num_bytes: int

    @property
    def num_heldout(self) -> int:
        return len(self.heldout_domains)


def is_heldout(name: str, share: float) -> bool:
    """Whether a document is held out: its name alone decides, and `share` of all names are.

    >>> sum(is_heldout(f"{i}.txt", 0.05) for i in range(1000))
    50
    """
    return int.from_bytes(hashlib.sha256(_name_bytes(name)).digest()[:8]) < share * 2**64


def domain(name: str, source: str) -> str:
    """What a document belongs to: the first folder of its name.

    Outside any folder it is the file that holds it, but what lies there in `stdlib`, single modules, is one domain,
    and so are the single files of `text`.

    >>> domain("json/decoder.py", "stdlib"), domain("abc.py", "stdlib"), domain("web.jsonl#7", "jsonl")
    ('json', '(modules)', 'web.jsonl')
    """
    first, in_folder, _ = _name_bytes(name).decode(errors="replace").partition("/")
    if in_folder:
        return first
    return {"stdlib": "(modules)", "text": "."}.get(source) or first.rpartition("#")[0]


def add_to_hash(sha, document: Document) -> None:
    """Adds a document to a corpus hash, lengths included, so that borders count too."""
    name = _name_bytes(document.name)
    sha.update(b"%d %d %b" % (len(name), len(document.text), name))
    sha.update(document.text)


def survey(config: DataConfig) -> Corpus:
    """Reads the corpus once. `UserError` where one side of the split would have no document."""
    sha, num_documents, num_bytes, domains = hashlib.sha256(), 0, 0, []
    for document in read_documents(config):
        add_to_hash(sha, document)
        num_documents += 1
        num_bytes += len(document.text)
        if is_heldout(document.name, config.heldout_share):
            domains.append(domain(document.name, config.source))
    field, value = corpus_field(config)
    require(num_documents > 0, field, value, "holds no text")
    for side, count in (("training", num_documents - len(domains)), ("held-out", len(domains))):
        rule = f"leaves no {side} document: {field}={value!r} holds {num_documents}"
        require(count > 0, "DataConfig.heldout_share", config.heldout_share, rule)
    return Corpus(sha.hexdigest(), num_documents - len(domains), tuple(domains), num_bytes)


def corpus_field(config: DataConfig) -> tuple[str, str]:
    """The setting that says which corpus it is, and its value."""
    return ("DataConfig.path", config.path) if config.path else ("DataConfig.source", config.source)


def _name_bytes(name: str) -> bytes:
    return name.encode("utf-8", "surrogateescape")  # file names need not be UTF-8
