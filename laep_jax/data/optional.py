"""Packages that some corpora need and the base installation lacks; each is an extra."""

import importlib
from typing import Any

from laep_jax.errors import UserError


def import_extra(package: str, extra: str, what: str) -> Any:
    """The module. `UserError` naming the extra where it is missing. what: that needs it, as `a Parquet file`."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        name = package.partition(".")[0]
        raise UserError(f"{what} needs the package {name}: pip install 'laep_jax[{extra}]', or {name}") from error
