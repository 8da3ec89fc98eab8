"""Fewer runs of equal layers: neighbours are made equal by keeping more experts.

The model is compiled once for each run of neighbouring layers with equal expert count
(`ModelConfig.runs`), so that many different counts cost compile time. This is not in the paper.

Axes: E experts.
"""

import itertools
from collections.abc import Sequence

import numpy as np

from laep_jax.laep.pruning import Pruning


def merge_runs(kept: Sequence[int], sizes: Sequence[int], max_runs: int) -> tuple[int, ...]:
    """Counts of at most `max_runs` runs, each from `kept` to the layer's own size, with the smallest sum.

    Each run takes the largest of its layers' counts, so what divides by the devices still does. Where a layer has
    too few experts for its neighbour's count, as many runs as that needs, and no more.

    >>> merge_runs([24, 16, 24, 40, 48, 48], [64] * 6, 2)
    (24, 24, 24, 48, 48, 48)
    >>> merge_runs([24, 16, 24, 40, 48, 48], [64, 64, 24, 64, 64, 64], 1)
    (24, 24, 24, 48, 48, 48)
    """
    assert max_runs >= 1, max_runs
    num_layers = len(kept)
    best: list[list[float]] = [[0.0] + [np.inf] * num_layers]  # [runs][layers]: least sum of the first layers
    cuts: list[list[int]] = []
    while len(cuts) < min(max_runs, num_layers) or np.isinf(best[-1][-1]):
        row, cut = _one_run_more(kept, sizes, best[-1])
        best.append(row)
        cuts.append(cut)
    runs = min(range(1, len(best)), key=lambda r: best[r][num_layers])
    merged: list[int] = []
    stop = num_layers
    for cut in reversed(cuts[:runs]):
        merged = [max(kept[cut[stop] : stop])] * (stop - cut[stop]) + merged
        stop = cut[stop]
    return tuple(merged)


def _one_run_more(kept: Sequence[int], sizes: Sequence[int], before: Sequence[float]) -> tuple[list[float], list[int]]:
    """The least sums of the first layers with one run more than `before`, and where that run starts."""
    sums, starts = [np.inf] * len(before), [0] * len(before)
    for stop in range(1, len(before)):
        largest, smallest_size = 0, np.inf
        for start in range(stop - 1, -1, -1):
            largest, smallest_size = max(largest, kept[start]), min(smallest_size, sizes[start])
            total = before[start] + largest * (stop - start)
            if largest <= smallest_size and total < sums[stop]:
                sums[stop], starts[stop] = total, start
    return sums, starts


def count_runs(kept: Sequence[int]) -> int:
    """Runs of neighbouring layers with equal count."""
    return sum(1 for _ in itertools.groupby(kept))


def cost_of_merging(before: Sequence[int], after: Sequence[int], max_runs: int) -> str:
    """The cost of merging runs, as text.

    >>> cost_of_merging((24, 16, 24), (24, 24, 24), 1)
    '3 runs of equal layers became 1; 8 experts more (+12.5%)'
    """
    more, runs = sum(after) - sum(before), count_runs(after)
    return (
        f"{count_runs(before)} runs of equal layers became {runs}; {more:,} experts more ({more / sum(before):+.1%})"
        + (f"; a layer keeps at most its own experts: max_runs={max_runs} is out of reach" if runs > max_runs else "")
    )


def unprune(choices: Sequence[Pruning], totals: Sequence[np.ndarray], max_runs: int) -> list[Pruning]:
    """The same choices with the heaviest pruned experts kept after all, so that at most `max_runs` runs are left.

    totals: tokens of each expert, [E] of each layer.
    """
    sizes = [len(totals_E) for totals_E in totals]
    kept = [size - len(choice.pruned) for size, choice in zip(sizes, choices, strict=True)]
    fewer = []
    for choice, totals_E, new in zip(choices, totals, merge_runs(kept, sizes, max_runs), strict=True):
        pruned = np.array(choice.pruned, np.int64)
        lightest_first = pruned[np.argsort(totals_E[pruned], kind="stable")]
        gone = lightest_first[: len(totals_E) - new]
        fewer.append(Pruning(choice.eligible, tuple(np.sort(gone).tolist())))
    return fewer
