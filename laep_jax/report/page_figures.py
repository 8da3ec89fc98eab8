"""The figures of report.html: narrow, so that their text stays readable on a phone. Legends are the page's.

Made within `svg.style`. Sizes stay bounded however many layers, experts and steps a run has.

Axes: L layers, E experts of the original model, P devices of the expert axis.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from laep_jax.laep.balance import imbalance
from laep_jax.report import facts, series
from laep_jax.report.drawing import BLUE, GREY, MAX_DOMAINS, ORANGE, PLAN_LINE, PRUNE_LINE, TOKENS, VERMILLION, plain
from laep_jax.report.loss_figures import draw_loss_lines, zoom_in
from laep_jax.report.run_data import RunData

WIDTH = 4.0  # inches; 9 points are then 10 pixels on a phone
MAX_POINTS = 8_000  # of the lines of a layer's experts
MAX_LABEL = 20  # characters of a domain's name
COLORS = (BLUE, VERMILLION)  # of two runs


def draw_story(run: RunData, layer: int) -> Figure:
    """Loads of a layer over the run, the plan and the prune, and below the loss around them."""
    zoom = series.steps_around_prune(run)
    figure, (top, below) = _panels(2, height=4.9)
    _draw_loads(top, run, layer)
    if zoom:
        top.axvspan(*zoom, color=GREY, alpha=0.18, linewidth=0)
        _name_marks(top, run)
    draw_loss_lines(below, run, width=5)
    zoom_in(below, run, zoom or (int(run.steps[-1]) // 4, int(run.steps[-1])))
    _finish(below, title="loss (nats per token)" + (", the shaded steps" if zoom else ""), xlabel="step")
    return figure


def draw_layer(run: RunData, layer: int) -> Figure:
    """Every expert's load over the run; below the loads of the window that the plan was made by, sorted."""
    figure, (top, below) = _panels(2, height=4.4)
    _draw_loads(top, run, layer)
    load = series.cumulative_load(run, layer)
    sorted_E = np.diff(load.share)
    mean = sorted_E.mean() or 1.0
    edges = np.arange(len(sorted_E) + 1) + 0.5
    for pruned, color in ((False, BLUE), (True, VERMILLION)):
        heights = np.where(load.pruned == pruned, sorted_E / mean, 0)
        below.stairs(heights, edges, fill=True, color=color, alpha=0.85)
    below.axhline(1, color="black", linestyle="--", linewidth=1)
    if np.isfinite(load.alpha):
        below.axhline(load.alpha, color=ORANGE, linewidth=1.2)
    below.set_yscale("symlog", linthresh=0.01, linscale=0.3)
    below.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    _finish(below, title="load / mean load", xlabel="experts by load")
    return figure


def draw_devices(run: RunData, layer: int) -> Figure:
    """Tokens on each device of the expert axis, without replicas, before the last prune and after it."""
    loads = series.device_loads(run)
    figure, (axes,) = _panels(1, height=2.2)
    edges = np.arange(loads.before.shape[1] + 1) - 0.5
    axes.stairs(loads.before[layer], edges, fill=True, color=GREY, alpha=0.5)
    if loads.in_order is not None and loads.placed is not None:
        axes.stairs(loads.in_order[layer], edges, color=ORANGE, linewidth=1.5)
        axes.stairs(loads.placed[layer], edges, color=BLUE, linewidth=2)
    axes.axhline((loads.before if loads.placed is None else loads.placed)[layer].mean(), **_MEAN)
    axes.yaxis.set_major_formatter(TOKENS)
    axes.set_ylim(0, None)
    _finish(axes, title=f"layer {layer}: tokens per step of each device", xlabel="device of the expert axis")
    return figure


def draw_imbalance(run: RunData) -> Figure:
    """Imbalance of the devices by layer, before and after the last prune, and as rebalanced with replicas."""
    loads, rebalances = series.device_loads(run), facts.rebalances(run)
    figure, (axes,) = _panels(1, height=2.4)
    after = loads.placed if loads.placed is not None else loads.before
    for load_LP, color, marker in [(loads.before, GREY, "s"), (after, BLUE, "o")][loads.placed is None :]:
        axes.plot([imbalance(load_P) for load_P in load_LP], color=color, marker=marker, markersize=4, linewidth=1)
    if rebalances:
        axes.plot(rebalances[-1].levelled_L, color=VERMILLION, marker="D", markersize=3.5, linewidth=1)
    axes.axhline(1, **_MEAN)
    _finish(axes, title="max / mean", xlabel="layer")
    return figure


def draw_imbalance_over_time(run: RunData) -> Figure:
    """Imbalance of the devices in the worst layer: at each rebalancing without and with replicas, else each step."""
    rebalances = facts.rebalances(run)
    figure, (axes,) = _panels(1, height=2.4)
    if rebalances:
        steps = [rebalance.step for rebalance in rebalances]
        axes.plot(steps, [max(r.device_L) for r in rebalances], color=BLUE, marker="o", markersize=3)
        axes.plot(steps, [max(r.levelled_L) for r in rebalances], color=VERMILLION, marker="D", markersize=3)
    else:
        every_step, worst = facts.worst_imbalance(run, "device_imbalance")
        axes.plot(every_step, series.smoothed(worst, 9), color=BLUE, linewidth=1)
    _mark(axes, run)
    axes.axhline(1, **_MEAN)
    axes.set_xlim(0, int(run.steps[-1]))
    _finish(axes, title="max / mean, worst layer", xlabel="step")
    return figure


def draw_experts(run: RunData) -> Figure:
    """Which experts went, layer by layer; the shade of the others is their load when the last plan was made."""
    last = run.prunes[-1].step if run.prunes else int(run.steps[-1])
    share_LE = series.shares(run, last)
    top = np.nanmax(share_LE) or 1.0
    shade_LE = 1 + np.log10(np.maximum(np.nan_to_num(share_LE) / top, 1e-3)) / 3  # a thousandth and less is 0
    image = np.zeros((*share_LE.shape, 4))
    image[..., :3], image[..., 3] = to_rgb(BLUE), 0.1 + 0.9 * shade_LE
    image[np.isnan(share_LE)] = 0
    image[run.pruned_at_LE >= 0] = (*to_rgb(VERMILLION), 1)
    figure, (axes,) = _panels(1, height=float(np.clip(0.9 + 0.16 * run.num_layers, 1.5, 5)))
    axes.imshow(image, aspect="auto", interpolation="none")
    axes.grid(visible=False)
    axes.yaxis.set_major_locator(MaxNLocator(8, integer=True))
    _finish(axes, title="layer", xlabel="expert (original id)")
    return figure


def draw_domain_changes(run: RunData) -> Figure:
    """Change of each domain's validation loss, by the last prune alone and until the newest evaluation."""
    losses = series.domain_losses(run)
    names = losses.names[:MAX_DOMAINS]
    figure, (axes,) = _panels(1, height=0.9 + 0.2 * max(len(names), 4))
    for loss_M, color, marker in zip(losses.rows.values(), (VERMILLION, BLUE), "Do", strict=False):
        axes.plot(loss_M[: len(names)], range(len(names)), marker, color=color, markersize=5)
    if losses.is_change:
        axes.axvline(0, color="black", linewidth=1, zorder=0)
    axes.set_yticks(range(len(names)), [plain(_shortened(name)) for name in names])
    axes.set_ylim(max(len(names), 1) - 0.4, -0.6)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.set_xlabel("loss minus that before the prune (nats)" if losses.is_change else "validation loss (nats)")
    return figure


def draw_by_step(run: RunData, field: str, title: str) -> Figure:
    """A number of the `train` records over the run, from zero; raw and smoothed, bytes in GiB and as they are."""
    steps, values = facts.train_field(run, field)
    is_bytes = field.endswith("_bytes")
    values = values / 2**30 if is_bytes else values
    figure, (axes,) = _panels(1, height=2.2)
    if not is_bytes:
        axes.plot(steps, values, color=BLUE, alpha=0.3, linewidth=0.7)
    width = 1 if is_bytes else max(len(steps) // 40, 5)
    axes.plot(steps, series.smoothed(values, width), color=BLUE, linewidth=1.5)
    _mark(axes, run)
    axes.set_ylim(0, 1.1 * np.nanmax(values, initial=0) or 1)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}") if is_bytes else TOKENS)
    _finish(axes, title=title, xlabel="step")
    return figure


def draw_comparison(runs: Sequence[RunData]) -> Figure:
    """Training loss of several runs in one panel, and the imbalance of their devices' worst layers in another."""
    figure, (top, below) = _panels(2, height=4.9)
    late = []
    for run, color in zip(runs, COLORS, strict=False):
        steps, loss, smooth = series.training_loss(run, max(len(run.train) // 40, 5))
        for part, values in smooth:
            top.plot(part, values, color=color, linewidth=1.4)
        late.append(loss[steps >= steps[-1] // 5] if len(steps) else loss)
        points = [(r["step"], r["validation_loss"]) for r in run.evals if r["when"] in ("periodic", "end")]
        top.plot(*np.array(points or np.zeros((0, 2)), float).T, "o", color=color, markersize=4)
        steps, worst = facts.worst_imbalance(run, "device_imbalance")
        below.plot(steps, series.smoothed(worst, max(len(steps) // 40, 5)), color=color, linewidth=1.2)
        for axes in (top, below):
            for transition in run.prunes:
                axes.axvline(transition.step, **PRUNE_LINE | {"color": color})
    known = np.concatenate(late)
    known = known[np.isfinite(known)]
    if len(known) and np.ptp(known) > 0:  # the first fall would leave no room for what comes after
        top.set_ylim(known.min() - 0.05 * np.ptp(known), known.max() + 0.05 * np.ptp(known))
    below.axhline(1, **_MEAN)
    _finish(top, title="loss (nats per token)", xlabel="step")
    _finish(below, title="imbalance of the devices, worst layer, each step", xlabel="step")
    return figure


_MEAN: dict[str, Any] = {"color": "black", "linestyle": "--", "linewidth": 1}


def _panels(count: int, height: float) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, list(figure.subplots(count, 1, squeeze=False)[:, 0])


def _draw_loads(axes: Axes, run: RunData, layer: int) -> None:
    limit = int(np.clip(MAX_POINTS // run.tokens_NLE.shape[2], 30, 120))
    lines = series.expert_lines(run, layer, limit)
    for pruned, color in ((True, VERMILLION), (False, BLUE)):  # one path of many lines
        chosen = [line for line in lines if line.pruned == pruned]
        steps = [part for line in chosen for part in (line.steps, [np.nan])]
        tokens = [part for line in chosen for part in (line.tokens, [np.nan])]
        if chosen:
            axes.plot(np.concatenate(steps), np.concatenate(tokens), color=color, linewidth=0.7, alpha=0.75)
    axes.plot(*series.mean_line(run, layer), **_MEAN)
    _mark(axes, run)
    axes.set_yscale("symlog", linthresh=10, linscale=0.5)  # some experts get no token at all
    axes.yaxis.set_major_formatter(TOKENS)
    axes.set_ylim(0, None)
    axes.set_xlim(0, int(run.steps[-1]))
    _finish(axes, title=f"layer {layer}: tokens per step of each expert", xlabel="step")


def _mark(axes: Axes, run: RunData) -> None:
    for transition in run.prunes:
        axes.axvline(transition.plan_step, **PLAN_LINE)
        axes.axvline(transition.step, **PRUNE_LINE)


def _name_marks(axes: Axes, run: RunData) -> None:
    """Words at the lines of the last plan and its prune, each on the side where there is room."""
    prune = run.prunes[-1]
    stable = facts.stable_step(run)
    plan = "stable: plan made" if stable == prune.plan_step else "plan made"
    for step, word, height in ((prune.plan_step, plan, 0.99), (prune.step, "pruned", 0.9)):
        right = step > 0.5 * run.steps[-1]
        axes.annotate(
            f"{word}, step {step}",
            (step, height),
            (-3 if right else 3, 0),
            xycoords=axes.get_xaxis_transform(),
            textcoords="offset points",
            ha="right" if right else "left",
            va="top",
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1},
        )
    low, high = axes.get_ylim()
    axes.set_ylim(low, high * 4)  # room for them, on the logarithmic scale


def _finish(axes: Axes, *, title: str, xlabel: str) -> None:
    """What the values are stands on top, where it needs no turned text; the x axis counts."""
    axes.set_title(title, loc="left")
    axes.set(xlabel=xlabel, ylabel="")
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))


def _shortened(name: str) -> str:
    return name if len(name) <= MAX_LABEL else name[: MAX_LABEL - 1] + "…"
