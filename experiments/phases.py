"""The two phases of paper section 3.1 in numbers: when do the loads become stable, and is it the right moment?

Axes: L layers, E experts.
"""

import itertools
import statistics
from collections.abc import Sequence

import numpy as np

from experiments.results import Result
from laep_jax.config import LaepConfig
from laep_jax.laep.balance import imbalance
from laep_jax.laep.pruning import prune_layer
from laep_jax.laep.rule import PruneRule
from laep_jax.laep.stability import Change, Window, change, failure, rank_correlation

LAEP = LaepConfig(estimator="mean")  # the paper's alpha hybrid, beta 0.1, on the windows' means


def windows(result: Result) -> dict[int, np.ndarray]:
    """Mean loads [L, E] by the last step of each window, ascending."""
    return {int(step): np.array(loads) for step, loads in result["loads"].items()}


def correlations(result: Result) -> dict[int, float]:
    """Spearman's coefficient of each window's loads with those of the window before, the mean over the layers."""
    pairs = itertools.pairwise(windows(result).items())
    return {step: statistics.fmean(map(rank_correlation, new_LE, old_LE)) for (_, old_LE), (step, new_LE) in pairs}


def _changes(result: Result) -> dict[int, Change]:
    """What changed in each window since the one before. Its loads are means, of which noise is not known."""
    rule = PruneRule.from_settings(LAEP, len(next(iter(windows(result).values()))), top_k=1, expert_parallel=1)
    counts = {step: Window.of(list(loads_LE[:, None]), rule) for step, loads_LE in windows(result).items()}
    return {step: change(new, old, rule.alpha) for (_, old), (step, new) in itertools.pairwise(counts.items())}


def stable_step(result: Result) -> int | None:
    """The step after which the test finds the loads stable, by its defaults; None: never."""
    in_a_row = 0
    for step, since in _changes(result).items():
        in_a_row = 0 if failure(since, LAEP) else in_a_row + 1
        if in_a_row == LAEP.stable_windows and step >= LAEP.min_step:
            return step
    return None


def largest_change(result: Result, quantity: str) -> dict[int, float]:
    """A field of `Change` by window, the largest over the layers."""
    return {step: max(getattr(since, quantity)) for step, since in _changes(result).items()}


def chosen(loads_LE: np.ndarray) -> list[tuple[int, ...]]:
    """The experts of each layer that the rule would prune, not rounded to devices."""
    rule = PruneRule.from_settings(LAEP, len(loads_LE), top_k=1, expert_parallel=1)
    return [prune_layer(loads_E[None], rule, layer).eligible for layer, loads_E in enumerate(loads_LE)]


def overlaps_with_last(result: Result) -> dict[int, float]:
    """Overlap (Jaccard) of the sets chosen in each window with those of the last, the mean over the layers."""
    by_step = {step: chosen(loads_LE) for step, loads_LE in windows(result).items()}
    last = by_step[max(by_step)]
    return {step: statistics.fmean(map(overlap, sets, last)) for step, sets in by_step.items()}


def overlap(a: Sequence[int], b: Sequence[int]) -> float:
    """Jaccard index of two sets of ids; 1.0 if both are empty.

    >>> overlap([1, 2, 3], [2, 3, 4])
    0.5
    """
    union = {*a} | {*b}
    return len({*a} & {*b}) / len(union) if union else 1.0


def largest_load(result: Result) -> dict[int, float]:
    """Imbalance (max / mean) of the experts, the mean over the layers, by window."""
    return {step: statistics.fmean(map(imbalance, loads_LE)) for step, loads_LE in windows(result).items()}


def hottest_expert(result: Result, num_devices: int) -> float:
    """Load of the most loaded expert of any layer over the mean load of a device, in the last window."""
    loads_LE = windows(result)[max(windows(result))]
    return float((loads_LE.max(axis=1) * num_devices / loads_LE.sum(axis=1)).max())
