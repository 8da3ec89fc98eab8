"""Paths as users write them: which are refused, and how the command line expands `~` and `$NAME`."""

import os
import re

from laep_jax.errors import require


def require_path(name: str, text: str) -> None:
    """`UserError` unless `text` names a file or folder literally: a slip must not become a folder of that name."""
    require(bool(text), name, text, "must not be empty")
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


def expanded(text: str) -> str:
    """The path with `~` and the variables of the environment replaced, as a shell does where `=` is not in its way."""
    return os.path.expandvars(os.path.expanduser(text))
