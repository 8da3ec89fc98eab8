"""Results as figures: losses against size, loads over time and by expert. None touches pyplot's global state.

Axes: W windows, L layers, E experts.
"""

import statistics
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from experiments.catalogue import Experiment
from experiments.phases import LAEP, correlations, largest_change, stable_step, windows
from experiments.tables import BySeed, Table, changes
from laep_jax.report.drawing import BLUE, GREY, ORANGE, VERMILLION


def draw_losses(experiment: Experiment, table: Table) -> Figure:
    """What each row changes of its base's validation loss, ours with its spread over the seeds and the paper's."""
    entries = [entry for entry in experiment.entries if entry.row != entry.base]
    figure = Figure(figsize=(8.5, 1.6 + 0.34 * len(entries)), layout="constrained")
    axes = figure.subplots()
    for place, entry in enumerate(entries):
        ours = changes(table.get(entry.row, {}), table.get(entry.base, {}))
        if ours:
            mean, deviation = _mean_and_deviation(ours)
            axes.errorbar(mean, place, xerr=deviation, fmt="o", color=BLUE, capsize=4)
            axes.plot(ours, [place] * len(ours), "|", color=BLUE, alpha=0.6)
        base = experiment.base(entry)
        if entry.loss and base.loss:
            axes.plot(entry.loss - base.loss, place, "D", color=ORANGE, fillstyle="none")
    axes.plot([], [], "o", color=BLUE, label="here: mean, standard deviation, each seed")
    if any(entry.loss for entry in entries):
        axes.plot([], [], "D", color=ORANGE, fillstyle="none", label="the paper")
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(entries)), [entry.label for entry in entries])
    axes.set_ylim(len(entries) - 0.5, -0.5)
    axes.margins(x=0.08)
    axes.locator_params(axis="x", nbins=7)
    axes.set_xlabel("validation loss, change against the base (nats)")
    figure.suptitle(experiment.title)
    figure.legend(loc="outside lower center", ncols=2)
    return figure


def _mean_and_deviation(values: Sequence[float]) -> tuple[float, float]:
    """Over the seeds; of one seed no deviation."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def draw_throughput(measured: BySeed, labels: Mapping[str, str], paper: Mapping[str, float]) -> Figure:
    """Table 5: throughput over the base's, ours by replaying the loads of the runs, and the paper's of whole steps."""
    names = [*paper, *(name for result in measured.values() for name in result["throughput"])]
    names = [*dict.fromkeys(names)]
    figure = Figure(figsize=(8.5, 1.2 + 0.4 * len(names)), layout="constrained")
    axes = figure.subplots()
    for place, name in enumerate(names):
        ours = [result["throughput"][name] for result in measured.values()]
        if ours:
            mean, deviation = _mean_and_deviation(ours)
            axes.barh(place - 0.2, mean, 0.36, xerr=deviation, color=BLUE, capsize=4)
        axes.barh(place + 0.2, paper.get(name, 0), 0.36, color=ORANGE)
    axes.barh(0, 0, color=BLUE, label="here: experts alone, mean and standard deviation")
    axes.barh(0, 0, color=ORANGE, label="the paper: whole steps")
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks(range(len(names)), [labels[name] for name in names])
    axes.set(ylim=(len(names) - 0.5, -0.5), xlabel="throughput over that of the base")
    figure.suptitle("Throughput at expert parallelism 8 (Table 5)")
    figure.legend(loc="outside lower center", ncols=2)
    return figure


def draw_phases(experiment: Experiment, table: Table) -> Figure:
    """Figure 1: loads over time of three layers, and how much windows agree with the one before."""
    rows = [entry for entry in experiment.entries if table.get(entry.row)]
    figure = Figure(figsize=(13, 1.5 + 3 * len(rows)), layout="constrained")
    grid = figure.subplots(max(len(rows), 1), 4, squeeze=False)
    for line, entry in zip(grid, rows, strict=False):
        by_seed = table[entry.row]
        result = by_seed[min(by_seed)]
        steps, loads_WLE = list(windows(result)), np.stack(list(windows(result).values()))
        for axes, layer in zip(line, (0, loads_WLE.shape[1] // 2, loads_WLE.shape[1] - 1), strict=False):
            axes.plot(steps, np.maximum(loads_WLE[:, layer], 0.5), linewidth=0.8)
            axes.axhline(loads_WLE[0, layer].mean(), color="black", linestyle="--", linewidth=1)
            axes.set(yscale="log", title=f"{entry.label}, layer {layer}", xlabel="step", ylabel="tokens a step")
        _draw_agreement(line[-1], by_seed)
    figure.suptitle(f"{experiment.title}: one line an expert, dashed their mean")
    handles = [
        Line2D([], [], color=BLUE, label="rank correlation, mean over the layers"),
        Line2D([], [], color=VERMILLION, label="tokens that moved, most in a layer (dashed: threshold)"),
        Line2D([], [], color=GREY, linestyle=":", label="the stability test fires"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3)
    return figure


def _draw_agreement(axes, by_seed: BySeed) -> None:
    for result in by_seed.values():
        axes.plot(*zip(*correlations(result).items(), strict=True), color=BLUE)
        axes.plot(*zip(*largest_change(result, "moved").items(), strict=True), color=VERMILLION)
        if step := stable_step(result):
            axes.axvline(step, color=GREY, linestyle=":")
    axes.axhline(LAEP.max_moved, color=VERMILLION, linestyle="--", linewidth=1)
    axes.set(ylim=(0, 1.02), xlabel="step", title="all seeds, window to window")


def draw_distributions(rows: Sequence[tuple[str, str]], table: Table) -> Figure:
    """Figure 4: sorted loads of the last window over their mean, of three layers, under each balancing loss."""
    figure = Figure(figsize=(13, 4), layout="constrained")
    panels = figure.subplots(1, 3, sharey=True)
    for index, (row, label) in enumerate(rows):
        by_seed = table.get(row, {})
        if not by_seed:
            continue
        loads_LE = list(windows(by_seed[min(by_seed)]).values())[-1]
        for axes, layer in zip(panels, (0, len(loads_LE) // 2, len(loads_LE) - 1), strict=True):
            share_E = np.sort(loads_LE[layer])[::-1] / loads_LE[layer].mean()
            axes.plot(np.maximum(share_E, 1e-3), color=f"C{index}", label=label)
            axes.set(yscale="log", title=f"layer {layer}", xlabel="experts by load")
    panels[0].set_ylabel("tokens over the mean")
    if panels[-1].lines:
        panels[-1].legend(fontsize=7)
    figure.suptitle("Tokens of each expert at the end, by balancing loss (the paper's Figure 4)")
    return figure
