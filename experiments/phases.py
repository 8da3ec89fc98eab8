"""The two phases of paper section 3.1 in numbers: when do the loads become stable, and is it the right moment?

Axes: L layers, E experts.
"""

import dataclasses
import itertools
import statistics

import numpy as np

from experiments.results import Result
from laep_jax.config import LaepConfig
from laep_jax.laep.balance import imbalance
from laep_jax.laep.pruning import prune_layer
from laep_jax.laep.rule import PruneRule
from laep_jax.laep.stability import overlap, rank_correlation

LAEP = LaepConfig()  # the paper's: alpha hybrid, beta 0.1


def windows(result: Result) -> dict[int, np.ndarray]:
    """Mean loads [L, E] by the last step of each window, ascending."""
    return {int(step): np.array(loads) for step, loads in result["loads"].items()}


def correlations(result: Result) -> dict[int, float]:
    """Spearman's coefficient of each window's loads with those of the window before, the mean over the layers."""
    pairs = itertools.pairwise(windows(result).items())
    return {step: statistics.fmean(map(rank_correlation, new_LE, old_LE)) for (_, old_LE), (step, new_LE) in pairs}


def stable_ranks(result: Result) -> int | None:
    """The step after which every layer's correlation has reached the test's threshold in two windows; None: never."""
    in_a_row = 0
    for (_, old_LE), (step, new_LE) in itertools.pairwise(windows(result).items()):
        reached = min(map(rank_correlation, new_LE, old_LE)) >= LAEP.rank_correlation
        in_a_row = in_a_row + 1 if reached else 0
        if in_a_row == LAEP.stable_windows:
            return step
    return None


def chosen(loads_LE: np.ndarray) -> list[tuple[int, ...]]:
    """The experts of each layer that the rule would prune, not rounded to devices."""
    laep = dataclasses.replace(LAEP, estimator="mean")
    rule = PruneRule.from_settings(laep, len(loads_LE), top_k=1, expert_parallel=1)
    return [prune_layer(loads_E[None], rule, layer).eligible for layer, loads_E in enumerate(loads_LE)]


def overlaps_with_last(result: Result) -> dict[int, float]:
    """Overlap (Jaccard) of the sets chosen in each window with those of the last, the mean over the layers."""
    by_step = {step: chosen(loads_LE) for step, loads_LE in windows(result).items()}
    last = by_step[max(by_step)]
    return {step: statistics.fmean(map(overlap, sets, last)) for step, sets in by_step.items()}


def largest_load(result: Result) -> dict[int, float]:
    """Imbalance (max / mean) of the experts, the mean over the layers, by window."""
    return {step: statistics.fmean(map(imbalance, loads_LE)) for step, loads_LE in windows(result).items()}
