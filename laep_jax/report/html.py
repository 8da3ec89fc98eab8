"""Small pieces of HTML. Every text is escaped here, and nowhere is one put in that was not."""

import html
import re
from collections.abc import Sequence

from laep_jax.errors import printable

MAX_WORD = 12  # characters
MAX_ROWS = 40  # of a table that has no end of its own


def escaped(text: str) -> str:
    """The text as HTML shows it literally; what does not print is escaped, as in the messages of errors.

    >>> escaped("<b>&\\ud800")
    '&lt;b&gt;&amp;\\\\ud800'
    """
    return html.escape(printable(text))


def section(title: str, body: str) -> str:
    return f"<section><h2>{escaped(title)}</h2>{body}</section>\n"


def paragraph(text: str) -> str:
    return f'<p class="soft">{escaped(text)}</p>'


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """In a box of its own, which scrolls where the page is narrower. head: empty where the columns need no names."""
    names = "".join(f"<th>{escaped(name)}</th>" for name in head) if any(head) else ""
    lines = "".join(f"<tr>{''.join(map(_cell, row))}</tr>\n" for row in rows)
    return f'<div class="scroll"><table>{f"<tr>{names}</tr>" if names else ""}\n{lines}</table></div>'


def long_table(head: Sequence[str], rows: Sequence[Sequence[str]], file: str) -> str:
    """The first MAX_ROWS rows, and how many more are in a file of the run."""
    rest = len(rows) - MAX_ROWS
    more = paragraph(f"{rest:,} more are in {file}.") if rest > 0 else ""
    return table(head, rows[:MAX_ROWS]) + more


def _cell(text: str) -> str:
    """Long words, as paths and names of settings, may break behind a separator; what has none, anywhere."""
    words = [_breakable(word) for word in text.split(" ")]
    long = any(len(part) > MAX_WORD for word in words for part in word.split("<wbr>"))
    kind = ' class="long"' if long else ""
    return f"<td{kind}>{' '.join(words)}</td>"


def _breakable(word: str) -> str:
    return re.sub(r"[./_-]+", r"\g<0><wbr>", escaped(word)) if len(word) > MAX_WORD else escaped(word)


def key(color: str, text: str, shape: str = "line") -> str:
    """An entry of a legend. color: a variable of page.css. shape: line, dashed, dotted, dot, diamond or box."""
    return f'<span class="key {shape}" style="--c: var(--{color})">{escaped(text)}</span>'


def caption(name: str, text: str, keys: Sequence[str]) -> str:
    """Of a figure: its run, what it shows, and its legend."""
    legend = f"{' '.join(keys)}<br>" if keys else ""
    return f"<figcaption>{legend}<b>{escaped(name)}</b>: {escaped(text)}</figcaption>"
