"""Merging runs of equal layers: against brute force, and what it restores."""

import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from laep_jax.laep.plan import make_plan
from laep_jax.laep.runs import merge_runs


def num_runs(counts) -> int:
    return len(list(itertools.groupby(counts)))


def cheapest(kept, max_runs) -> int:
    """The least sum over every way to cut the layers into runs."""
    layers, sums = len(kept), []
    for number in range(min(max_runs, layers)):
        for cuts in itertools.combinations(range(1, layers), number):
            pieces = itertools.pairwise((0, *cuts, layers))
            sums.append(sum(max(kept[a:b]) * (b - a) for a, b in pieces))
    return min(sums)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=7), st.integers(1, 5))
def test_merging_costs_least_and_takes_no_one_away(kept, max_runs):
    merged = merge_runs(kept, max_runs)
    assert num_runs(merged) <= max_runs
    assert all(new >= old for new, old in zip(merged, kept, strict=True))
    assert set(merged) <= set(kept)
    assert sum(merged) == cheapest(kept, max_runs)


def test_enough_runs_change_nothing():
    kept = (8, 8, 16, 8)
    assert merge_runs(kept, 3) == merge_runs(kept, 9) == kept


def test_the_released_model_in_half_of_its_runs():
    counts = [40, 48, 24, 16, 24, 16, 16, 24, 32, 32, 24, 24, 24, 40, 40, 40]
    counts += [48] * 69 + [40] * 8 + [32] * 6 + [24, 24, 16, 8]
    merged = merge_runs(counts, 8)
    assert num_runs(merged) == 8
    assert sum(counts) == 4360 < sum(merged) < 103 * 48


def test_a_plan_restores_the_heaviest():
    counts_LE = np.array([[100, 100, 1, 2], [100, 100, 100, 100], [100, 100, 5, 100]])
    settings = {"expert_parallel": 1, "top_k": 1, "alpha": "inf", "beta": 0.1, "estimator": "mean"}
    settings |= {"inequality": "le", "rounding": "restore", "placement": "greedy"}
    free = make_plan(counts_LE[None], **settings)
    assert free.num_experts_after == (2, 4, 3)
    merged = make_plan(counts_LE[None], **settings, max_runs=2)
    assert merged.num_experts_after == (2, 4, 4)
    one = make_plan(counts_LE[None], **settings, max_runs=1)
    assert one.num_experts_after == (4, 4, 4)
    assert [layer.eligible for layer in one.layers] == [(2, 3), (), (2,)]
