"""Draws a run's losses: training and validation over time, around the prune, and by domain."""

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, PercentFormatter

from laep_jax.report import series
from laep_jax.report.drawing import (
    BLUE,
    GREY,
    MAX_DOMAINS,
    ORANGE,
    PLAN_LINE,
    PRUNE_LINE,
    VERMILLION,
    add_title,
    plain,
    transition_text,
)
from laep_jax.report.run_data import RunData

MASKED: dict[str, Any] = {"color": VERMILLION, "markerfacecolor": "none", "markersize": 9, "markeredgewidth": 1.8}


def draw_loss(run: RunData) -> Figure:
    """Training loss, raw and smoothed, with validation losses and prunes; below it the steps around the last prune."""
    zoom = series.steps_around_prune(run)
    figure = Figure(figsize=(10, 9 if zoom else 5.5), layout="constrained")
    panels = figure.subplots(1 + bool(zoom), 1, squeeze=False)[:, 0]
    for axes in panels:
        draw_loss_lines(axes, run, width=max(len(run.train) // 40, 5))
    for i, transition in enumerate(run.prunes):
        text: dict[str, Any] = {
            "xycoords": panels[0].get_xaxis_transform(),
            "textcoords": "offset points",
            "ha": "center",
        }
        panels[0].annotate(transition_text(transition), (transition.step, 1), (0, 4 + 13 * (i % 3)), **text)
    if zoom:
        panels[0].axvspan(*zoom, color=GREY, alpha=0.15, linewidth=0)
        zoom_in(panels[1], run, zoom)
        panels[1].set_title(f"the shaded steps, {zoom[0]} to {zoom[1]}", fontsize=11)
    add_title(figure, "Loss", run, list(range(run.num_layers)), panels[0].get_legend_handles_labels()[0])
    return figure


def draw_loss_lines(axes: Axes, run: RunData, width: int) -> None:
    """The losses of all steps in one panel. The smoothed line is a mean of `width` records, none across a prune."""
    steps, loss, smooth = series.training_loss(run, width)
    axes.plot(steps, loss, color=BLUE, alpha=0.3, linewidth=0.8, label="training")
    for i, (part, values) in enumerate(smooth):
        label = "" if i else f"training, mean of {width} records"
        axes.plot(part, values, color=BLUE, linewidth=1.8, label=label)
    points = [(r["step"], r["validation_loss"]) for r in run.evals if r["when"] != "after_prune"]
    after = [(r["step"], r["validation_loss"]) for r in run.evals if r["when"] == "after_prune"]
    if points:
        axes.plot(*zip(*points, strict=True), "o", color=ORANGE, markeredgecolor="black", label="validation")
    if after:
        axes.plot(*zip(*after, strict=True), "D", **MASKED, label="validation, the plan's experts masked")
    for i, transition in enumerate(run.prunes):
        axes.axvline(transition.plan_step, **PLAN_LINE, label="" if i else "plan made")
        axes.axvline(transition.step, **PRUNE_LINE, label="" if i else "plan applied")
    axes.set(xlabel="step", ylabel="loss (nats per token)")
    axes.grid(alpha=0.3)


def zoom_in(axes: Axes, run: RunData, zoom: tuple[int, int]) -> None:
    """These steps, and the losses that the smoothed line and the evaluations have in them."""
    _, _, smooth = series.training_loss(run, 5)
    shown = [values[(steps >= zoom[0]) & (steps <= zoom[1])] for steps, values in smooth]
    evals = [record["validation_loss"] for record in run.evals if zoom[0] <= record["step"] <= zoom[1]]
    values = np.concatenate([*shown, np.array(evals, float)])
    values = values[np.isfinite(values)]
    axes.set_xlim(*zoom)
    if len(values):
        margin = 0.08 * np.ptp(values) or 0.1
        axes.set_ylim(values.min() - margin, values.max() + margin)


def draw_domains(run: RunData) -> Figure:
    """Validation loss by domain: its change at the last prune and at the end; the worst on top."""
    losses = series.domain_losses(run)
    names, targets_M = losses.names[:MAX_DOMAINS], losses.targets_M[:MAX_DOMAINS]
    figure = Figure(figsize=(14, 1.8 + 0.24 * max(len(names), 5)), layout="constrained")
    lost_M = [run.pruned_share[name] for name in names] if run.pruned_share.keys() >= {*names} else []
    panels = figure.subplots(1, max(len(losses.rows), 1) + bool(lost_M), sharey=True, squeeze=False)[0]
    for axes, (label, loss_M) in zip(panels, losses.rows.items(), strict=False):
        sizes = np.maximum(150 * targets_M / losses.targets_M.max(), 8)
        axes.scatter(loss_M[:MAX_DOMAINS], range(len(names)), s=sizes, color=BLUE, alpha=0.75)
        axes.axvline(np.average(loss_M, weights=losses.targets_M), color="black", linestyle="--", linewidth=1.3)
        if losses.is_change:
            axes.axvline(0, color=GREY, linewidth=1.3, zorder=0)
        axes.set_title(label, fontsize=11)
        axes.xaxis.set_major_locator(MaxNLocator(6))
    minus = " minus that before the prune" if losses.is_change else ""
    for axes in panels:
        axes.set(xlabel=f"validation loss{minus} (nats)", ylabel="domain (targets)")
        axes.grid(alpha=0.3)
    if lost_M:
        panels[-1].barh(range(len(names)), lost_M, color=VERMILLION, height=0.5)
        panels[-1].xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        panels[-1].set_xlabel("share of the tokens, mean over layers")
        panels[-1].set_title("tokens on the experts to prune", fontsize=11)
    labels = [f"{plain(name)} ({targets:,})" for name, targets in zip(names, targets_M, strict=True)]
    panels[0].set_yticks(range(len(names)), labels)
    panels[0].set_ylim(max(len(names), 1) - 0.4, -0.6)
    some = f", {len(names)} of {len(losses.names)} domains" if len(names) < len(losses.names) else ""
    zero = [Line2D([], [], color=GREY, label="no change")] if losses.is_change else []
    handles = [
        Line2D([], [], color=BLUE, linestyle="", marker="o", label="a domain; the smaller, the noisier"),
        Line2D([], [], color="black", linestyle="--", label="all targets"),
        *zero,
    ]
    add_title(figure, f"Validation loss by domain{some}", run, list(range(run.num_layers)), handles)
    return figure
