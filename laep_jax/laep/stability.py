"""Have the expert loads become stable? The paper prunes then (sections 3.1, 3.2) but never defines it.

Here: between neighbouring windows of steps, in every layer, (a) the rank correlation of the mean
loads and (b) the overlap of the sets that Algorithm 1 chooses both reach their thresholds, several
windows in a row and not before a minimum step. The sets are taken before rounding to the devices: where
a layer's number wavers around a multiple of these, rounding would make it jump by all of them.

Axes: N steps of a window, L layers, E experts.
"""

import dataclasses
import itertools
import math
from collections.abc import Sequence

import numpy as np

from laep_jax.config import LaepConfig
from laep_jax.laep.load import LoadHistory
from laep_jax.laep.pruning import prune_layer
from laep_jax.laep.rule import PruneRule


@dataclasses.dataclass(frozen=True)
class StabilityReport:
    """Where the test stands after a window.

    rank_correlation, overlap: per layer, against the window before; None where there is none.
    consecutive: windows that passed in a row, counted up to `LaepConfig.stable_windows`.
    reason: a sentence for people on what has or has not been reached.
    """

    rank_correlation: tuple[float | None, ...]
    overlap: tuple[float | None, ...]
    consecutive: int
    stable: bool
    reason: str


def history_capacity(laep: LaepConfig) -> int:
    """Steps that a `LoadHistory` has to hold for `assess`."""
    return laep.window * (laep.stable_windows + 1)


def assess(history: LoadHistory, laep: LaepConfig) -> StabilityReport:
    """Tests the last recorded windows. Meant to be asked whenever a window of steps is complete."""
    num_layers = len(history.num_experts)
    rule = PruneRule.from_settings(laep, num_layers, top_k=1, expert_parallel=1)
    num_windows = min(len(history) // laep.window, laep.stable_windows + 1)
    windows = [history.window(laep.window, back) for back in range(num_windows)]
    if num_windows < 2:
        reason = f"{len(history)} steps recorded, {2 * laep.window} needed to compare two windows"
        return StabilityReport((None,) * num_layers, (None,) * num_layers, 0, False, reason)
    chosen = [[prune_layer(tokens_NE, rule, layer).eligible for layer, tokens_NE in enumerate(w)] for w in windows]
    ranks = [tuple(map(_load_correlation, new, old)) for new, old in itertools.pairwise(windows)]
    overlaps = [tuple(map(overlap, new, old)) for new, old in itertools.pairwise(chosen)]
    shortfalls = [_shortfall(rank, share, laep) for rank, share in zip(ranks, overlaps, strict=True)]
    consecutive = next((i for i, shortfall in enumerate(shortfalls) if shortfall), len(shortfalls))
    reason = shortfalls[0] or _waiting(consecutive, history.last_step, laep)
    stable = not reason
    reason = reason or f"every layer stable for {consecutive} windows of {laep.window} steps in a row"
    return StabilityReport(ranks[0], overlaps[0], consecutive, stable, reason)


def _waiting(consecutive: int, step: int | None, laep: LaepConfig) -> str:
    """Why stable loads do not fire yet; empty where nothing is missing."""
    if consecutive < laep.stable_windows:
        return f"{consecutive} of {laep.stable_windows} stable windows in a row"
    if step is not None and step < laep.min_step:
        return f"step {step} is before min_step={laep.min_step}"
    return ""


def _shortfall(ranks: Sequence[float], overlaps: Sequence[float], laep: LaepConfig) -> str:
    """The layer and value furthest below its threshold, in words; empty where all reach theirs."""
    values = [
        (value - threshold, f"layer {layer}: {name} {value:.4f} < {threshold:g}")
        for name, values, threshold in (
            ("rank correlation", ranks, laep.rank_correlation),
            ("overlap of the chosen sets", overlaps, laep.overlap),
        )
        for layer, value in enumerate(values)
        if value < threshold
    ]
    return min(values)[1] if values else ""


def _load_correlation(new_NE: np.ndarray, old_NE: np.ndarray) -> float:
    """0.0 where a window has no tokens: that loads stay at zero does not make them stable."""
    new_E, old_E = new_NE.sum(axis=0), old_NE.sum(axis=0)
    return rank_correlation(new_E, old_E) if new_E.any() and old_E.any() else 0.0


def rank_correlation(a_E: np.ndarray, b_E: np.ndarray) -> float:
    """Spearman's coefficient with average ranks for ties; 1.0 if both are constant, 0.0 if one is.

    >>> rank_correlation(np.array([1, 5, 9]), np.array([10, 30, 20]))
    0.5
    """
    a, b = _twice_ranks(a_E), _twice_ranks(b_E)
    n, sum_a, sum_b = len(a), int(a.sum()), int(b.sum())
    variance_a = n * int(a @ a) - sum_a**2  # integers, times n**2: equal ranks give exactly 1.0
    variance_b = n * int(b @ b) - sum_b**2
    if not variance_a or not variance_b:
        return float(variance_a == variance_b)
    return (n * int(a @ b) - sum_a * sum_b) / math.sqrt(variance_a * variance_b)


def _twice_ranks(values_E: np.ndarray) -> np.ndarray:
    """Ranks from 1, the mean of their places for ties, times two to stay integers."""
    _, group, sizes = np.unique(values_E, return_inverse=True, return_counts=True)
    return (2 * sizes.cumsum() - sizes + 1)[group]


def overlap(a: Sequence[int], b: Sequence[int]) -> float:
    """Jaccard index of two sets of ids; 1.0 if both are empty.

    >>> overlap([1, 2, 3], [2, 3, 4])
    0.5
    """
    union = set(a) | set(b)
    return len(set(a) & set(b)) / len(union) if union else 1.0
