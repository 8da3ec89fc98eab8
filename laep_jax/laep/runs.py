"""Fewer runs of equal layers: neighbours are made equal by restoring experts.

The model is compiled once for each run of neighbouring layers with equal expert count
(`ModelConfig.runs`), so that many different counts cost compile time. This is not in the paper.

Letters: L layers, R runs.
"""

import itertools
from collections.abc import Sequence

import numpy as np

from laep_jax.laep.pruning import Pruning


def merge_runs(kept: Sequence[int], max_runs: int) -> tuple[int, ...]:
    """Kept counts of at most `max_runs` runs, none below `kept`, with the smallest sum; by dynamic programming.

    Each run takes the largest of its layers' counts, so what divides by the devices still does.

    >>> merge_runs([24, 16, 24, 40, 48, 48], 2)
    (24, 24, 24, 48, 48, 48)
    """
    assert max_runs >= 1, max_runs
    num_layers = len(kept)
    best: list[list[float]] = [[0.0] + [np.inf] * num_layers]  # [runs][layers]: least sum of the first layers
    cuts: list[list[int]] = []
    for _ in range(min(max_runs, num_layers)):
        row, cut = [np.inf] * (num_layers + 1), [0] * (num_layers + 1)
        for stop in range(1, num_layers + 1):
            largest = 0
            for start in range(stop - 1, -1, -1):
                largest = max(largest, kept[start])
                total = best[-1][start] + largest * (stop - start)
                if total < row[stop]:
                    row[stop], cut[stop] = total, start
        best.append(row)
        cuts.append(cut)
    runs = min(range(1, len(best)), key=lambda r: best[r][num_layers])
    merged: list[int] = []
    stop = num_layers
    for cut in reversed(cuts[:runs]):
        merged = [max(kept[cut[stop] : stop])] * (stop - cut[stop]) + merged
        stop = cut[stop]
    return tuple(merged)


def count_runs(kept: Sequence[int]) -> int:
    """Runs of neighbouring layers with equal count."""
    return sum(1 for _ in itertools.groupby(kept))


def cost_of_merging(before: Sequence[int], after: Sequence[int]) -> str:
    """What it took to make fewer runs, for people.

    >>> cost_of_merging((24, 16, 24), (24, 24, 24))
    '3 runs of equal layers became 1; 8 experts more (+12.5%)'
    """
    more = sum(after) - sum(before)
    return (
        f"{count_runs(before)} runs of equal layers became {count_runs(after)}; "
        f"{more:,} experts more ({more / sum(before):+.1%})"
    )


def restore(choices: Sequence[Pruning], totals: Sequence[np.ndarray], max_runs: int) -> list[Pruning]:
    """The same choices with the heaviest pruned experts put back until at most `max_runs` runs are left.

    totals: tokens of each expert, [E] of each layer.
    """
    kept = [len(totals_E) - len(choice.pruned) for choice, totals_E in zip(choices, totals, strict=True)]
    restored = []
    for choice, totals_E, old, new in zip(choices, totals, kept, merge_runs(kept, max_runs), strict=True):
        pruned = np.array(choice.pruned, np.int64)
        lightest_first = pruned[np.argsort(totals_E[pruned], kind="stable")]
        stay = lightest_first[: len(pruned) - (new - old)]
        restored.append(Pruning(choice.eligible, tuple(np.sort(stay).tolist())))
    return restored
