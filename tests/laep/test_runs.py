"""Merging runs of equal layers: against brute force, and what it puts back."""

import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from laep_jax.config import LaepConfig
from laep_jax.laep.plan import make_plan
from laep_jax.laep.rule import PruneRule
from laep_jax.laep.runs import cost_of_merging, merge_runs

MEAN = LaepConfig(alpha="inf", estimator="mean", placement="greedy")


def num_runs(counts) -> int:
    return len(list(itertools.groupby(counts)))


def cheapest(kept, sizes, max_runs) -> tuple[int, int]:
    """The least sum over every way to cut the layers into so many runs, or more where so few are not possible."""
    layers, sums = len(kept), []
    for number in range(min(max_runs, layers)):
        for cuts in itertools.combinations(range(1, layers), number):
            pieces = list(itertools.pairwise((0, *cuts, layers)))
            if all(max(kept[a:b]) <= min(sizes[a:b]) for a, b in pieces):
                sums.append(sum(max(kept[a:b]) * (b - a) for a, b in pieces))
    return (min(sums), max_runs) if sums else cheapest(kept, sizes, max_runs + 1)


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 5)), min_size=1, max_size=7), st.integers(1, 5))
def test_merging_costs_least_and_stays_within_each_layer(layers, max_runs):
    kept, sizes = [count for count, _ in layers], [count + pruned for count, pruned in layers]
    merged = merge_runs(kept, sizes, max_runs)
    assert all(old <= new <= size for old, new, size in zip(kept, merged, sizes, strict=True))
    assert set(merged) <= set(kept)
    total, possible = cheapest(kept, sizes, max_runs)
    assert sum(merged) == total
    assert num_runs(merged) <= possible


def test_enough_runs_change_nothing():
    kept = (8, 8, 16, 8)
    assert merge_runs(kept, kept, 3) == merge_runs(kept, [16] * 4, 9) == kept


def test_the_released_model_in_half_of_its_runs():
    counts = [40, 48, 24, 16, 24, 16, 16, 24, 32, 32, 24, 24, 24, 40, 40, 40]
    counts += [48] * 69 + [40] * 8 + [32] * 6 + [24, 24, 16, 8]
    merged = merge_runs(counts, [64] * len(counts), 8)
    assert num_runs(merged) == 8
    assert sum(counts) == 4360 < sum(merged) < 103 * 48


def test_a_plan_puts_the_heaviest_back():
    counts_LE = np.array([[100, 100, 1, 2], [100, 100, 100, 100], [100, 100, 5, 100]])
    rule = PruneRule.from_settings(MEAN, 3, top_k=1, expert_parallel=1)
    free = make_plan(counts_LE[None], rule)
    assert free.num_experts_after == (2, 4, 3)
    merged = make_plan(counts_LE[None], rule, max_runs=2)
    assert merged.num_experts_after == (2, 4, 4)
    one = make_plan(counts_LE[None], rule, max_runs=1)
    assert one.num_experts_after == (4, 4, 4)
    assert [layer.eligible for layer in one.layers] == [(2, 3), (), (2,)]


def test_layers_of_unequal_size_take_back_their_own_experts_only():
    loads = [np.repeat([100, 1], [12, 12]), np.repeat([100, 1], [28, 4])]
    rule = PruneRule.from_settings(MEAN, 2, top_k=1, expert_parallel=4)
    plan = make_plan([loads_E[None] for loads_E in loads], rule, max_runs=1)
    assert plan.num_experts_after == (12, 28)  # layer 0 has 24 experts
    assert cost_of_merging((12, 28), plan.num_experts_after, 1).endswith("max_runs=1 is out of reach")
    loads[1][16:] = 1
    assert make_plan([loads_E[None] for loads_E in loads], rule, max_runs=1).num_experts_after == (16, 16)
