"""What the figures share: colours, number formats, the prune's line, titles and legends.

Colours are those of Okabe and Ito, which colour-blind readers can tell apart.
"""

from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter

from laep_jax.errors import printable
from laep_jax.report.run_data import RunData, Transition

BLUE, ORANGE, VERMILLION, GREEN, PURPLE, GREY = "#0072B2", "#E69F00", "#D55E00", "#009E73", "#CC79A7", "#999999"
MAX_LAYERS = 8  # that get a panel of their own
MAX_DOMAINS = 40  # that get a line of their own
TOKENS = FuncFormatter(lambda value, _: f"{value:,.0f}" if value < 1e6 else f"{value / 1e6:,g} M")
PLAN_LINE: dict[str, Any] = {"color": GREY, "linestyle": "--", "linewidth": 1.2}
PRUNE_LINE: dict[str, Any] = {"color": "black", "linestyle": ":", "linewidth": 1.2}


def plain(text: str) -> str:
    r"""A text from a run as Matplotlib shows it literally: no formula, and everything escaped that does not print.

    >>> plain("$x$\n")
    '\\$x\\$\\n'
    """
    return printable(text).replace("$", r"\$")


def if_pruned(run: RunData, handle: Line2D) -> list[Line2D]:
    return [handle] if run.prunes else []


def transition_text(transition: Transition) -> str:
    before, after = (sum(len(ids) for ids in order) for order in (transition.before, transition.after))
    return f"pruned after step {transition.step}: {before:,} to {after:,} experts"


def transition_handles(run: RunData) -> list[Line2D]:
    steps = ", ".join(str(transition.step) for transition in run.prunes)
    return [Line2D([], [], **PRUNE_LINE, label=f"plan applied after step {steps}")] if run.prunes else []


def add_title(figure: Figure, title: str, run: RunData, layers: list[int], handles: list) -> None:
    """The run's name and the title on top, a legend at the foot."""
    title = f"{plain(run.name)}: {title}"
    if len(layers) < run.num_layers:
        title += f" (layers {', '.join(map(str, layers))} of {run.num_layers})"
    figure.suptitle(title, fontsize=13)
    if handles:
        figure.legend(
            handles=handles, loc="outside lower center", ncols=min(len(handles), 3 if figure.get_figwidth() > 9 else 2)
        )
