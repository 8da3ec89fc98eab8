"""Subcommand dispatch: command lines that begin with the name of a module.

A table has for every name its module and a line about it; only the module that is meant is imported.
"""

import importlib
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType

from laep_jax.errors import UserError, did_you_mean

Table = Mapping[str, tuple[str, str]]


def program(command: str) -> str:
    """How a command is started here: by the installed script, or, as this program was, by Python."""
    by_python = Path(sys.argv[0]).name in ("__main__.py", "train.py")
    return f"python -m laep_jax {command}" if by_python else f"laep-jax {command}"


def chosen(argv: Sequence[str], table: Table, noun: str, usage: str) -> ModuleType | None:
    """The module that `argv` begins with, or None where help was asked for and is printed.

    noun: what one of the table is called. usage: the help, with {} where the table goes. `UserError` where there is
    none of that name.
    """
    if not argv or argv[0] in ("-h", "--help"):
        print(usage.format("\n".join(f"  {name:<16} {text}" for name, (_, text) in table.items())))
        return None
    if argv[0] not in table:
        raise UserError(f"there is no {noun} {argv[0]!r}; {did_you_mean(argv[0], table)}")
    return load(table[argv[0]][0])


def load(module: str) -> ModuleType:
    """The module, imported. `UserError` where a package that it needs is not installed."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package == "laep_jax":
            raise
        raise UserError(f"{package} is not installed: pip install -r requirements.txt") from error
