"""report.html: what a run was, what happened in it, and its figures, in one file of its own.

Texts of a run may come from anyone: each is escaped, and the page's policy allows no script but its own. One run, or
two side by side.
"""

import base64
import hashlib
from collections.abc import Callable, Sequence
from importlib import resources

from laep_jax.report import facts, page_figures, svg
from laep_jax.report.html import caption, escaped, key, long_table, section
from laep_jax.report.page_sections import SECTIONS, layers, layers_of, most_pruned_layer, story
from laep_jax.report.run_data import RunData

REFRESH_SECONDS = 60  # of a page that is renewed


def page(runs: Sequence[RunData], *, refresh: bool = False) -> str:
    """The HTML of one run, or of two side by side. refresh: whether it loads itself again while it is open."""
    with svg.style():
        body = _top(runs) + "".join(_section(runs, title, part) for title, part in SECTIONS.items())
    script, style = (
        resources.files("laep_jax.report").joinpath(name).read_text(encoding="utf-8")
        for name in ("page.js", "page.css")
    )
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-{digest}'"
    again = f'<meta http-equiv="refresh" content="{REFRESH_SECONDS}">\n' if refresh else ""
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
{again}<title>{escaped(_names(runs))}</title>
<style>
{style}</style>
</head>
<body>
{body}
<script>{script}</script>
</body>
</html>
"""


def _names(runs: Sequence[RunData]) -> str:
    return " and ".join(run.name for run in runs)


def _top(runs: Sequence[RunData]) -> str:
    """The title, what two runs have not in common, and the story of each."""
    compared = _comparison(*runs) if len(runs) > 1 else ""
    return f"<h1>{escaped(_names(runs))}</h1>{compared}{_beside(runs, story, 'columns two')}"


def _comparison(first: RunData, second: RunData) -> str:
    figure = page_figures.draw_comparison((first, second))
    keys = (key("blue", first.name), key("vermillion", second.name), key("ink", "prune", "dotted"))
    text = "training loss, smoothed, with the validation losses as dots, and how unevenly the devices are loaded"
    drawing = svg.to_svg(figure, "compared", f"{first.name} and {second.name}: {text}")
    head = ("setting", first.name, second.name)
    differences = long_table(head, facts.differing_settings(first, second), "config.json")
    return (
        f'<div class="columns two"><figure>{drawing}{caption(_names((first, second)), text, keys)}</figure>'
        f"<div><h3>Settings that differ</h3>{differences}</div></div>"
    )


def _section(runs: Sequence[RunData], title: str, part: Callable[[RunData, str], list[str]]) -> str:
    return section(title, (_choose(runs) if part is layers else "") + _beside(runs, part))


def _beside(runs: Sequence[RunData], part: Callable[[RunData, str], list[str]], columns: str = "columns") -> str:
    """The blocks of one run in columns, of two runs each in a column of its own.

    The text that `part` is called with is unique to the run, for names of elements.
    """
    if len(runs) == 1:
        return f'<div class="{columns}">{"".join(part(runs[0], "r0"))}</div>'
    blocks = "".join(f"<div>{''.join(part(run, f'r{i}'))}</div>" for i, run in enumerate(runs))
    return f'<div class="columns two">{blocks}</div>'


def _choose(runs: Sequence[RunData]) -> str:
    """The list of layers; without scripts it stays hidden, and all of them are shown."""
    layers, most = sorted({layer for run in runs for layer in layers_of(run)}), max(run.num_layers for run in runs)
    first = most_pruned_layer(runs[0])
    options = "".join(
        f'<option value="{layer}"{" selected" if layer == first else ""}>{layer}</option>' for layer in layers
    )
    some = f" ({len(layers)} of {most} are in this file)" if len(layers) < most else ""
    return f'<label class="choose" hidden>layer <select id="layer">{options}</select>{some}</label>'
