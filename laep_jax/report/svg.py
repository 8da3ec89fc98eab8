"""A Matplotlib figure as SVG within an HTML page, so that CSS alone makes it light, dark or fit for paper.

Text stays text, in the font of the page. Colours become the page's variables (`page.css`). Names of elements get a
prefix, since one page has many figures.
"""

import contextlib
import io
import re
from collections.abc import Iterator
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from laep_jax.report.drawing import BLUE, GREEN, GREY, ORANGE, PURPLE, VERMILLION
from laep_jax.report.html import escaped

INK, FAINT = "#222222", "#cccccc"
VARIABLES = {
    INK: "ink",
    "#000000": "ink",
    FAINT: "faint",
    "#ffffff": "paper",
    BLUE: "blue",
    ORANGE: "orange",
    VERMILLION: "vermillion",
    GREEN: "green",
    PURPLE: "purple",
    GREY: "grey",
}
DROPPED = r"<!--.*?-->|<metadata>.*?</metadata>|<style.*?</style>"
STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "laep_jax",
    "font.size": 9,
    "axes.titlesize": 9,
    "legend.fontsize": 8.5,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.5,
    "grid.alpha": 1.0,
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
}


@contextlib.contextmanager
def style() -> Iterator[None]:
    """Figures made and turned into SVG in it look like those of the page."""
    with matplotlib.rc_context(STYLE):
        yield


def to_svg(figure: Figure, name: str, title: str) -> str:
    """An `<svg>` element as wide as the page lets it be. name: unique on the page. title: for who cannot see it."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True)
    text = buffer.getvalue()
    text = re.sub(DROPPED, "", text[text.index("<svg") :], flags=re.DOTALL)
    used = set(re.findall(r'(?:url\(|href=")#([^")]+)', text))
    box = re.search(r'viewBox="[\d. ]+"', text)
    assert box
    inner = re.sub(r"<[^>]+>", lambda tag: _of_page(tag[0], name, used), text[text.index(">") + 1 :])
    return f'<svg {box[0]} role="img" aria-label="{escaped(title)}">' + re.sub(r"\s*\n\s*", "\n", inner).strip()


def _of_page(tag: str, name: str, used: set[str]) -> str:
    """A tag with the page's colours, shorter numbers and names that are unique on the page."""
    tag = re.sub(r'(?<= style=")[^"]*', _with_variables, tag)
    tag = re.sub(r'(?<= d=")[^"]*', lambda path: re.sub(r"\d+\.\d+", _rounded, path[0]), tag)
    tag = re.sub(r' id="([^"]*)"', lambda found: f' id="{name}-{found[1]}"' if found[1] in used else "", tag)
    return re.sub(r'(url\(|href=")#', rf"\1#{name}-", tag)


def _with_variables(style: re.Match) -> str:
    return re.sub(r"#[0-9a-fA-F]{6}", lambda color: _variable(color[0]), style[0])


def _variable(color: str) -> str:
    names = {hexadecimal.lower(): name for hexadecimal, name in VARIABLES.items()}
    return f"var(--{names[color.lower()]})" if color.lower() in names else color


def _rounded(number: re.Match) -> str:
    return f"{float(number[0]):.1f}".removesuffix(".0")
