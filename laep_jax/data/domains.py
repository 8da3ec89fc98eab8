"""The domain of a document: the part of a corpus whose loss and loads are measured on their own."""

import re

from laep_jax.errors import printable

OTHER = "(other)"  # the domain that small ones are pooled in; no other is called so
SHARD = re.compile(  # what differs between the names of shards: a UUID, a hash, a number
    r"(?<![^\W_])(?:[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}|(?=[a-f]*\d)[0-9a-f]{8,})(?![^\W_])|\d+", re.IGNORECASE
)
SINGLE = {"stdlib": "(modules)", "text": ".", "datasets": "."}  # outside any folder, by `DataConfig.source`


def domain(name: str, source: str) -> str:
    """The domain of a document that states none: the first folder of its name.

    Outside any folder it is the file that holds it, where all shards of one name are one. What lies there in `stdlib`,
    single modules, is one domain, and so are the single files of `text` and those of one saved dataset.

    >>> domain("json/decoder.py", "stdlib"), domain("abc.py", "stdlib"), domain("web.jsonl#7", "jsonl")
    ('json', '(modules)', 'web.jsonl')
    >>> domain("part-00001-of-01024.jsonl#7", "jsonl")
    'part-*-of-*.jsonl'
    """
    first, in_folder, _ = name.partition("/")
    if in_folder:
        return domain_name(first)
    return SINGLE.get(source) or printable(SHARD.sub("*", first.rpartition("#")[0]))


def domain_name(text: str) -> str:
    """A folder, a field's value or the name of a source as a domain: always printable, and not that of the pool."""
    return printable(text) if text != OTHER else f"./{OTHER}"
