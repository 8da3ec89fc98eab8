"""Paths as users write them: which are refused, and how the command line expands `~` and `$NAME`."""

import importlib.util
import os
import re

from laep_jax.errors import UserError, require

BUCKET = "gs://"


def require_path(name: str, text: str, *, bucket: bool = False) -> None:
    """`UserError` unless `text` names a file or folder literally: a slip must not become a folder of that name.

    bucket: whether it may be in a bucket of Cloud Storage, gs://BUCKET/FOLDER.
    """
    require(bool(text), name, text, "must not be empty")
    if bucket and "://" in text:
        rule = "must be a path or gs://BUCKET/FOLDER; there are no other addresses"
        require(bool(re.match(r"gs://[^/]+/[^/]", text)) and "//" not in text[5:], name, text, rule)
    else:
        require("://" not in text, name, text, "must be mounted: a path, not an address")
    require(text.strip() == text, name, text, "must not begin or end with white space")
    require(not re.search(r"[\x00-\x1f\x7f]", text), name, text, "must not hold control characters")
    require(
        not re.search(r"[\ud800-\udfff]", text),
        name,
        text,
        "must be valid UTF-8; where only the locale is not, set PYTHONUTF8=1",
    )
    require(not text.startswith("~"), name, text, "must not begin with ~: write the home folder out")
    require(not re.search(r"\$[\w{]", text), name, text, "must not hold variables: write their values out")


def is_bucket(path: str | os.PathLike[str]) -> bool:
    """Whether it is in a bucket of Google Cloud Storage."""
    return os.fspath(path).startswith(BUCKET)


def require_gcsfs(address: str) -> None:
    """`UserError` naming what must be installed to read and write in a bucket."""
    if importlib.util.find_spec("gcsfs") is None:
        raise UserError(f"{address} needs gcsfs: pip install 'laep_jax[gcs]', or gcsfs")


def expanded(text: str) -> str:
    """The path with `~` and the variables of the environment replaced, as a shell does where `=` is not in its way."""
    return os.path.expandvars(os.path.expanduser(text))
