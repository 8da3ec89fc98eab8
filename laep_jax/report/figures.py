"""Draws a run's loads: the paper's Figures 1 and 2, device loads, a heat map of the experts, their stability.

Every function takes a `RunData` and returns a Matplotlib `Figure`; none touches pyplot's global state.

Axes: L layers, E experts of the original model, P devices of the expert axis.
"""

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import PatchCollection
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

from laep_jax.laep.balance import imbalance
from laep_jax.report import series
from laep_jax.report.drawing import (
    BLUE,
    GREEN,
    GREY,
    MAX_LAYERS,
    ORANGE,
    PLAN_LINE,
    PRUNE_LINE,
    PURPLE,
    TOKENS,
    VERMILLION,
    add_title,
    if_pruned,
    transition_handles,
)
from laep_jax.report.run_data import RunData


def draw_tokens_per_expert(run: RunData) -> Figure:
    """Figure 1: each expert's tokens over the run, and beside it the sorted loads at the end."""
    layers = series.chosen_layers(run.num_layers, MAX_LAYERS)
    rows = math.ceil(len(layers) / 2)
    figure = Figure(figsize=(15.5, 1.4 + 2.9 * rows), layout=ConstrainedLayoutEngine(w_pad=0.1))
    panels = figure.subplots(rows, 4, squeeze=False, width_ratios=[2, 1, 2, 1]).reshape(-1, 2)
    for layer, (trend, ranks) in zip(layers, panels, strict=False):
        _draw_trend(trend, run, layer)
        _draw_final_loads(ranks, run, layer)
    for unused in panels[len(layers) :].flat:
        unused.remove()
    lightest = min(line.tokens.min(initial=np.inf) for layer in layers for line in series.expert_lines(run, layer))
    _share_range([trend for trend, _ in panels[: len(layers)]], low=lightest / 2 if lightest > 20 else 0)
    handles = [
        Line2D([], [], color=BLUE, label="kept expert"),
        *if_pruned(run, Line2D([], [], color=VERMILLION, marker="x", label="pruned expert")),
        Line2D([], [], color="black", linestyle="--", label="mean over the experts of the layer"),
        *transition_handles(run),
    ]
    add_title(figure, "Tokens per expert over the run, and sorted at its end", run, layers, handles)
    return figure


def _draw_trend(axes: Axes, run: RunData, layer: int) -> None:
    for line in sorted(series.expert_lines(run, layer), key=lambda line: line.pruned):
        color = VERMILLION if line.pruned else BLUE
        axes.plot(line.steps, line.tokens, color=color, linewidth=0.9, alpha=0.65)
        if line.pruned:
            axes.plot(line.steps[-1:], line.tokens[-1:], "x", color=color, markersize=4, clip_on=False)
    steps, mean = series.mean_line(run, layer)
    axes.plot(steps, mean, color="black", linestyle="--", linewidth=1.3)
    for transition in run.prunes:
        axes.axvline(transition.step, **PRUNE_LINE)
    axes.set_yscale("symlog", linthresh=10, linscale=0.5)  # some experts get no token at all
    axes.yaxis.set_major_formatter(TOKENS)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.set(title=f"layer {layer}", xlabel="step", ylabel="tokens per step", xlim=(0, run.steps[-1]))


def _draw_final_loads(axes: Axes, run: RunData, layer: int) -> None:
    loads = series.final_loads(run, layer)
    at_first = len(run.present(layer, 0))
    axes.bar(np.arange(1, len(loads) + 1), loads, color=BLUE, width=0.85)
    axes.axhline(loads.mean(), color="black", linestyle="--", linewidth=1.3)
    spread = f"max/min {loads[-1] / loads[0]:,.3g}" if loads[0] > 0 else "min 0"
    left = f"{len(loads)} of {at_first} experts" if len(loads) < at_first else f"{at_first} experts"
    axes.text(0.05, 0.95, f"{left}\n{spread}", transform=axes.transAxes, va="top", fontsize=9)
    axes.yaxis.set_major_formatter(TOKENS)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.set(title=f"layer {layer}, end", xlabel="experts by load", ylabel="tokens per step")
    axes.margins(y=0.25)


def draw_cumulative_load(run: RunData) -> Figure:
    """Figure 2: cumulative load over the experts by ascending load, with the alpha and the beta line."""
    layers = series.chosen_layers(run.num_layers, MAX_LAYERS)
    figure, panels = _grid(len(layers), width=3.9, height=3.3)
    for layer, axes in zip(layers, panels, strict=True):
        load = series.cumulative_load(run, layer)
        _draw_cumulative(axes, load)
        pruned = f", {load.pruned.sum()} of {len(load.pruned)} pruned" if run.prunes else ""
        alpha = f"{load.alpha:.3g}" if math.isfinite(load.alpha) else "∞"
        axes.set_title(f"layer {layer}: α = {alpha}{pruned}", fontsize=11)
    bounds = series.cumulative_load(run, layers[0])
    handles = [
        Line2D([], [], color=BLUE, marker="o", markersize=4, label="kept expert"),
        *if_pruned(run, Line2D([], [], color=VERMILLION, marker="o", markersize=4, label="pruned expert")),
        Line2D([], [], color=ORANGE, linestyle="--", label=f"β line: {100 * bounds.beta:.3g} % of the tokens"),
        Line2D([], [], color=PURPLE, linestyle="-.", label="α line: experts of at most α x mean load"),
        Line2D([], [], color=GREEN, linestyle=":", label="experts of at most the mean load"),
        Patch(color=VERMILLION, alpha=0.12, label="under both bounds in this window"),
    ]
    when = f"before the plan of step {run.prunes[0].plan_step}" if run.prunes else "at the end"
    add_title(figure, f"Cumulative load in the window {when}", run, layers, handles)
    return figure


def _draw_cumulative(axes: Axes, load: series.CumulativeLoad) -> None:
    count = np.arange(len(load.share))
    axes.plot(count, load.share, color=BLUE, linewidth=1.5, marker="o", markersize=3, markevery=slice(1, None))
    chosen = np.flatnonzero(load.pruned) + 1
    axes.plot(chosen, load.share[chosen], "o", color=VERMILLION, markersize=4, zorder=3)
    axes.axvspan(0, load.eligible, color=VERMILLION, alpha=0.12, linewidth=0)
    axes.axhline(load.beta, color=ORANGE, linestyle="--", linewidth=1.5)
    axes.axvline(load.below_alpha, color=PURPLE, linestyle="-.", linewidth=1.5)
    axes.axvline(load.below_mean, color=GREEN, linestyle=":", linewidth=1.8)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.set(xlabel="experts, lightest first", ylabel="share of the layer's tokens", ylim=(0, 1.02))


def draw_device_loads(run: RunData) -> Figure:
    """Tokens on each device before and after the last prune, and what the prune did without rearranging."""
    layers = series.chosen_layers(run.num_layers, MAX_LAYERS)
    loads = series.device_loads(run)
    groups = [(loads.before, GREY, "before the prune" if run.prunes else "at the end")]
    if loads.in_order is not None and loads.placed is not None:
        groups += [(loads.in_order, ORANGE, "after it, had the experts kept their order")]
        groups += [(loads.placed, BLUE, "after it, as rearranged")]
    figure, panels = _grid(len(layers), width=3.9, height=2.9, footer=2.8)
    for layer, axes in zip(layers, panels, strict=True):
        _draw_devices(axes, [(load_LP[layer], color) for load_LP, color, _ in groups])
        axes.set(title=f"layer {layer}", xlabel="device of the expert axis", ylabel="tokens per step")
    _share_range(panels, low=0)
    _draw_imbalance(figure.axes[-1], [(load_LP, color) for load_LP, color, _ in groups])
    handles = [
        *(Patch(color=color, label=label) for _, color, label in groups),
        Line2D([], [], color="black", linestyle="--", label="mean over the devices"),
    ]
    when = f"around step {run.prunes[-1].step}" if run.prunes else "at the end"
    add_title(figure, f"Load of each device {when}", run, layers, handles)
    return figure


def _draw_devices(axes: Axes, groups: list[tuple[np.ndarray, str]]) -> None:
    width = 0.8 / len(groups)
    for i, (load_P, color) in enumerate(groups):
        places = np.arange(len(load_P)) + (i - (len(groups) - 1) / 2) * width
        axes.bar(places, load_P, color=color, width=0.92 * width)
    axes.axhline(groups[-1][0].mean(), color="black", linestyle="--", linewidth=1)
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    axes.yaxis.set_major_formatter(TOKENS)


def _draw_imbalance(axes: Axes, groups: list[tuple[np.ndarray, str]]) -> None:
    for (load_LP, color), marker in zip(groups, "sDo", strict=False):
        axes.plot([imbalance(load_P) for load_P in load_LP], color=color, marker=marker, markersize=5, linewidth=1)
    axes.axhline(1, color="black", linestyle="--", linewidth=1)
    axes.xaxis.set_major_locator(MaxNLocator(25, integer=True))
    axes.margins(x=0.02)
    axes.set(title="every layer: imbalance of the devices", xlabel="layer", ylabel="max / mean")


def draw_load_heatmap(run: RunData) -> Figure:
    """Share of its layer's tokens that each expert takes, before the first prune and at the end."""
    last = int(run.steps[-1])
    panels = [(f"before the prune after step {run.prunes[0].step}", run.prunes[0].step)] if run.prunes else []
    panels += [("at the end", last)]
    shares = [(title, series.shares(run, step)) for title, step in panels]
    size = (1.5 + 6.5 * len(shares), min(max(2.2 + 0.22 * run.num_layers, 3.6), 14))
    figure = Figure(figsize=size, layout="constrained")
    top = max(np.nanmax(share_LE) for _, share_LE in shares)
    bottom = top / 1000  # and below: some experts get no token at all
    norm = LogNorm(bottom, top, clip=True)
    for i, (title, share_LE) in enumerate(shares):
        axes = figure.add_subplot(1, len(shares), i + 1)
        gone = np.isnan(share_LE)  # pruned, or the layer never had so many
        shown = np.ma.masked_array(np.maximum(np.nan_to_num(share_LE), bottom), gone)
        axes.imshow(shown, norm=norm, cmap="viridis", aspect="auto", interpolation="nearest")
        axes.set_facecolor("#eeeeee")
        cells = [
            Rectangle((expert - 0.5, layer - 0.5), 1, 1)
            for layer, expert in np.argwhere(gone & (run.pruned_at_LE >= 0))
        ]
        axes.add_collection(PatchCollection(cells, facecolor="none", edgecolor="#aaaaaa", hatch="////", linewidth=0))
        axes.xaxis.set_major_locator(MaxNLocator(9, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(13, integer=True))
        axes.set(title=title, xlabel="expert (original id)", ylabel="layer")
    bar = figure.colorbar(
        figure.axes[-1].images[-1],
        ax=figure.axes,
        label="share of the layer's tokens",
        extend="min",
        aspect=3.5 * size[1],
    )
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:g} %"))
    handles = [Patch(facecolor="#eeeeee", edgecolor="#aaaaaa", hatch="////", label="pruned")]
    add_title(figure, "Load of every expert", run, list(range(run.num_layers)), handles if run.prunes else [])
    return figure


def draw_stability(run: RunData) -> Figure:
    """The two phases: how much the loads of each layer change from window to window."""
    changes = series.stability(run)
    layers = series.chosen_layers(run.num_layers, MAX_LAYERS)
    figure = Figure(figsize=(12, 4.5), layout="constrained")
    panels = figure.subplots(1, 2, sharex=True)
    for axes, of_layer_NL in zip(panels, (changes.moved_NL, changes.rank_correlation_NL), strict=True):
        for layer in layers:
            axes.plot(changes.steps, of_layer_NL[:, layer], "o-", markersize=3, linewidth=1, color=f"C{layer % 10}")
        for transition in run.prunes:
            axes.axvline(transition.plan_step, **PLAN_LINE)
            axes.axvline(transition.step, **PRUNE_LINE)
        if not len(changes.steps):
            text = f"no two windows of {run.window} steps to compare"
            axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center")
        axes.set(xlabel="step", xlim=(0, run.steps[-1]))
        axes.grid(alpha=0.3)
    panels[0].axhline(run.max_moved, color=VERMILLION, linestyle="--")
    panels[0].yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    panels[0].set(ylabel="tokens that moved since the window before", ylim=(0, None))
    panels[1].set(ylabel="rank correlation with the window before", ylim=(None, 1.02))
    handles = [
        *(Line2D([], [], color=f"C{layer % 10}", marker="o", markersize=3, label=f"layer {layer}") for layer in layers),
        Line2D([], [], color=VERMILLION, linestyle="--", label=f"stable: at most {run.max_moved:g} (max_moved)"),
        *if_pruned(run, Line2D([], [], **PLAN_LINE, label="plan made")),
        *transition_handles(run),
    ]
    add_title(figure, f"Change of the loads between windows of {run.window} steps", run, layers, handles)
    return figure


def _grid(count: int, *, width: float, height: float, footer: float = 0.0) -> tuple[Figure, list[Axes]]:
    """A figure of `count` panels, at most four in a row, over one as wide as all where `footer` is its height."""
    columns = min(count, 4)
    rows = math.ceil(count / columns)
    figure = Figure(figsize=(max(width * columns, 7), 1.3 + height * rows + footer), layout="constrained")
    heights = [height] * rows + [footer] * bool(footer)
    grid = figure.add_gridspec(len(heights), columns, height_ratios=heights)
    panels = [figure.add_subplot(grid[i // columns, i % columns]) for i in range(count)]
    if footer:
        figure.add_subplot(grid[rows, :])
    return figure, panels


def _share_range(panels: Sequence[Axes], low: float) -> None:
    """The same range of values on every panel, from `low` to the largest of theirs."""
    high = max(axes.get_ylim()[1] for axes in panels)
    for axes in panels:
        axes.set_ylim(low, high)
