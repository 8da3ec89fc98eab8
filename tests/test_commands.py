"""What every entry point does: packages that are missing, letters that the terminal lacks."""

import io
import sys

import pytest

from laep_jax.commands import load
from laep_jax.errors import UserError, run_main


def test_a_package_that_is_missing_is_named_with_what_to_do():
    with pytest.raises(UserError, match=r"^no_such is not installed: pip install -r requirements.txt$"):
        load("no_such.package")
    with pytest.raises(ModuleNotFoundError):
        load("laep_jax.no_such")


@pytest.mark.parametrize("text", ["Часть", "Latin-1 \udce4"])
def test_what_the_terminal_cannot_print_is_escaped(monkeypatch, text):
    bytes_ = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(bytes_, encoding="ascii"))
    assert run_main(lambda argv: print(text) or 0, []) == 0
    assert bytes_.getvalue() == text.encode("ascii", "backslashreplace") + b"\n"
