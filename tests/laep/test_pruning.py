"""Algorithm 1: worked examples, brute force over prefixes, and what must not depend on what."""

import dataclasses
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from laep_jax.laep.pruning import Pruning, eligible_experts, prune_layer
from laep_jax.laep.rule import PruneRule

SHARES = st.sampled_from([0.0, 0.05, 0.1, 0.29, 1 / 3, 0.5, 1.0])
BOUNDS = st.sampled_from([0.0, 0.1, 0.2, 0.4, 0.7, 1.0, 2.5, math.inf])
INEQUALITY = st.sampled_from(["le", "lt"])
COUNTS_E = np.array([10, 90, 5, 1, 200, 30, 60, 4])  # 400 tokens, 50 an expert
RULE = PruneRule(1, 1, (math.inf,), 0.1, "vote", "le", "keep_more", "refined")


def rule(alpha=math.inf, **changes) -> PruneRule:
    return dataclasses.replace(RULE, alpha=(alpha,), **changes)


def prune(tokens, **changes) -> Pruning:
    return prune_layer(np.atleast_2d(np.asarray(tokens)), rule(**changes), 0)


@st.composite
def layers(draw, most_iterations=4):
    """Counts [N, E] and the number of devices, each of which has an expert."""
    devices = draw(st.sampled_from([1, 2, 4]))
    num_experts = draw(st.integers(devices, 16))
    row = st.lists(st.integers(0, 60), min_size=num_experts, max_size=num_experts)
    return np.array(draw(st.lists(row, min_size=1, max_size=most_iterations))), devices


@st.composite
def rules(draw, devices, num_experts):
    return rule(
        alpha=draw(BOUNDS),
        beta=draw(SHARES),
        estimator=draw(st.sampled_from(["vote", "mean"])),
        inequality=draw(INEQUALITY),
        rounding=draw(st.sampled_from(["keep_more", "prune", "none"])),
        top_k=draw(st.integers(1, min(3, num_experts))),
        expert_parallel=devices,
    )


def test_worked_example():
    # ascending 1, 4, 5, 10, 30: running sums 1, 5, 10, 20, 50 against 0.1 * 400 = 40
    assert prune(COUNTS_E).eligible == (0, 2, 3, 7)
    assert prune(COUNTS_E, alpha=0.1).eligible == (2, 3, 7)  # at most 0.1 * 50 = 5 each
    assert prune(COUNTS_E, alpha=0.1, inequality="lt").eligible == (3, 7)


@pytest.mark.parametrize(
    ("counts", "share", "inequality", "allowed"),
    [
        ([40, 360], 0.1, "le", True),
        ([40, 360], 0.1, "lt", False),
        ([29, 71], 0.29, "le", True),  # 0.29 * 100 is 28.999999999999996 in floating point
        ([3, 27], 0.1, "lt", False),  # and 0.1 * 30 is 3.0000000000000004
        ([2**60 // 10, 2**60 - 2**60 // 10], 0.1, "lt", True),  # 2**60 / 10 is no integer
        ([2**60 // 10 + 1, 2**60 - 2**60 // 10 - 1], 0.1, "le", False),
    ],
)
def test_both_bounds_compare_exactly(counts, share, inequality, allowed):
    cumulative = eligible_experts(np.array(counts), math.inf, share, inequality)
    assert cumulative.tolist() == [allowed, False]
    individual = eligible_experts(np.array(counts), 2 * share, 1.0, inequality)  # of a mean that is half the sum
    assert individual.tolist() == [allowed, False]


@settings(max_examples=60, deadline=None)
@given(layers(), BOUNDS, SHARES, INEQUALITY)
def test_eligible_is_the_longest_prefix_that_fits(layer, alpha, beta, inequality):
    tokens_NE, _ = layer

    def fits(value, share, total):
        if math.isinf(share):
            return True
        bound = Fraction(str(share)) * total
        return value <= bound if inequality == "le" else value < bound

    for counts, eligible in zip(tokens_NE.tolist(), eligible_experts(tokens_NE, alpha, beta, inequality), strict=True):
        order = sorted(range(len(counts)), key=lambda expert: (counts[expert], expert))
        mean = Fraction(sum(counts), len(counts))
        good = [
            order[:n]
            for n in range(len(order) + 1)
            if all(fits(counts[expert], alpha, mean) for expert in order[:n])
            and all(fits(sum(counts[e] for e in order[:m]), beta, sum(counts)) for m in range(1, n + 1))
        ]
        assert set(np.flatnonzero(eligible)) == (set(max(good, key=len)) if sum(counts) else set())


def test_a_heavy_expert_with_a_low_id_stays():
    # The print marks ranks: with three light experts it would prune ids 0, 1 and 2.
    assert prune([500, 400, 300, 1, 2, 3]).pruned == (3, 4, 5)


def test_running_sums_start_anew_in_every_iteration():
    assert prune([COUNTS_E] * 50) == prune(COUNTS_E)


def test_votes_are_counted_by_expert_and_averaged():
    swings = [[0, 50, 5, 45], [0, 5, 50, 45], [50, 4, 5, 41]]  # marks {0, 2}, {0, 1}, {1, 2}
    assert prune(swings).eligible == (0, 1)  # two an iteration; two votes each, loads 50, 59, 60
    swings[2] = [90, 6, 2, 2]  # marks {1, 2, 3}
    assert prune(swings).eligible == (1, 2)  # 7 // 3; two votes each, loads 90, 61, 57


def test_equal_votes_go_by_load_then_index():
    marks_all = [[1, 1, 1, 97], [1, 1, 1, 97], [34, 33, 33, 0]]  # only expert 3 in the last
    assert prune(marks_all).eligible == (1, 2)  # 7 // 3; experts 1 and 2 are lighter by one
    assert prune([[1, 1, 1, 97], [33, 33, 33, 1]]).eligible == (0, 1)  # 4 // 2; equal loads


def test_number_to_prune_is_rounded_down():
    assert prune([[1, 99], [50, 50], [50, 50]], beta=0.1).eligible == ()  # one mark in three iterations
    assert prune([[1, 99], [1, 99], [50, 50]], beta=0.1).eligible == ()
    assert prune([[1, 99], [1, 99], [1, 99]], beta=0.1).eligible == (0,)


@settings(max_examples=30, deadline=None)
@given(layers(), st.data())
def test_an_iteration_without_tokens_changes_nothing(layer, data):
    tokens_NE, devices = layer
    chosen = data.draw(rules(devices, tokens_NE.shape[1]))
    places = data.draw(st.lists(st.integers(0, len(tokens_NE)), max_size=4))
    assert prune_layer(np.insert(tokens_NE, places, 0, axis=0), chosen, 0) == prune_layer(tokens_NE, chosen, 0)


@pytest.mark.parametrize("estimator", ["vote", "mean"])
@pytest.mark.parametrize("rounding", ["keep_more", "prune", "none"])
def test_a_layer_without_tokens_keeps_all(estimator, rounding):
    assert prune([[0] * 8] * 3, estimator=estimator, rounding=rounding, expert_parallel=2) == Pruning((), ())


def test_estimators_differ_where_loads_swing():
    tokens_NE = [[0, 40, 60], [40, 0, 60]]
    assert prune(tokens_NE).eligible == (0,)  # one mark an iteration
    assert prune(tokens_NE, estimator="mean").eligible == ()  # 20 of 100 tokens each


@settings(max_examples=60, deadline=None)
@given(layers(most_iterations=1), st.data())
def test_estimators_agree_on_one_iteration(layer, data):
    tokens_NE, devices = layer
    chosen = data.draw(rules(devices, tokens_NE.shape[1]))
    votes, mean = (dataclasses.replace(chosen, estimator=estimator) for estimator in ("vote", "mean"))
    assert prune_layer(tokens_NE, votes, 0) == prune_layer(tokens_NE, mean, 0)


def test_keep_more_puts_the_heaviest_back():
    pruning = prune(COUNTS_E, expert_parallel=4)  # 4 eligible: loads 10, 5, 1, 4
    assert pruning == Pruning(eligible=(0, 2, 3, 7), pruned=(0, 2, 3, 7))
    pruning = prune(COUNTS_E, beta=0.03, expert_parallel=2)  # running sums to 12: 1, 4, 5
    assert pruning == Pruning(eligible=(2, 3, 7), pruned=(3, 7))


def test_prune_takes_more_but_only_who_was_eligible():
    swings = [[1, 2, 40, 57], [1, 2, 57, 40], [30, 60, 2, 8]]  # marks {0, 1}, {0, 1}, {2, 3}
    assert prune(swings, expert_parallel=2, rounding="prune").pruned == (0, 1)
    uneven = [[1, 30, 40, 29], [1, 2, 57, 40], [40, 30, 5, 25]]  # marks {0}, {0, 1}, {2}: 4 // 3
    assert prune(uneven, expert_parallel=2) == Pruning(eligible=(0,), pruned=())
    assert prune(uneven, expert_parallel=2, rounding="prune") == Pruning(eligible=(0,), pruned=(0, 1))
    only_one = [[1, 30, 40, 29]] * 3  # nobody else is ever eligible: as keep_more
    assert prune(only_one, expert_parallel=2, rounding="prune") == Pruning(eligible=(0,), pruned=())


def test_without_rounding_all_go_that_the_rule_chose():
    assert prune(COUNTS_E, beta=0.03, expert_parallel=2, rounding="none").pruned == (2, 3, 7)
    assert prune(COUNTS_E[:7], beta=0.03, expert_parallel=2, rounding="none").pruned == (2, 3)
    assert prune(COUNTS_E[:7], beta=0.03, expert_parallel=2).pruned == (3,)  # six of seven stay, not five
    assert prune(COUNTS_E[:7], beta=0.03, expert_parallel=4).pruned == ()  # eight would stay


def test_enough_experts_stay_for_top_k_and_devices():
    one_hot = [0] * 7 + [100]
    assert prune(one_hot).pruned == tuple(range(7))
    assert prune(one_hot, top_k=3).pruned == (0, 1, 2, 3, 4)
    assert prune(one_hot, top_k=3, expert_parallel=2).pruned == (0, 1, 2, 3)
    assert prune(one_hot, top_k=3, expert_parallel=2, rounding="prune").pruned == (0, 1, 2, 3)
    assert prune(one_hot, expert_parallel=8).pruned == ()


@settings(max_examples=60, deadline=None)
@given(layers(), st.data())
def test_what_stays_is_rounded_and_suffices(layer, data):
    tokens_NE, devices = layer
    chosen = data.draw(rules(devices, tokens_NE.shape[1]))
    pruning = prune_layer(tokens_NE, chosen, 0)
    kept = tokens_NE.shape[1] - len(pruning.pruned)
    assert kept % devices == 0 or chosen.rounding == "none" or not pruning.pruned
    assert kept >= max(chosen.top_k, devices)
    assert list(pruning.pruned) == sorted(set(pruning.pruned))
    assert list(pruning.eligible) == sorted(set(pruning.eligible))
    if chosen.rounding == "none":
        assert len(pruning.pruned) == min(len(pruning.eligible), len(tokens_NE[0]) - max(chosen.top_k, devices))
    if chosen.rounding != "prune":
        assert set(pruning.pruned) <= set(pruning.eligible)
    marks_NE = eligible_experts(tokens_NE, chosen.alpha[0], chosen.beta, chosen.inequality)
    if chosen.estimator == "vote":
        assert marks_NE.any(axis=0)[list(pruning.pruned)].all()
        assert len(pruning.eligible) == marks_NE.sum() // max(np.count_nonzero(tokens_NE.any(axis=1)), 1)


@settings(max_examples=60, deadline=None)
@given(layers(), st.data(), st.integers(2, 10**9))
def test_scaling_all_counts_changes_nothing(layer, data, factor):
    tokens_NE, devices = layer
    chosen = data.draw(rules(devices, tokens_NE.shape[1]))
    assert prune_layer(tokens_NE * factor, chosen, 0) == prune_layer(tokens_NE, chosen, 0)


@settings(max_examples=60, deadline=None)
@given(layers(), st.data(), BOUNDS, SHARES)
def test_larger_bounds_never_prune_fewer(layer, data, alpha, beta):
    tokens_NE, devices = layer
    low = data.draw(rules(devices, tokens_NE.shape[1]))
    high = dataclasses.replace(low, alpha=(max(low.alpha[0], alpha),), beta=max(low.beta, beta))
    few, many = prune_layer(tokens_NE, low, 0), prune_layer(tokens_NE, high, 0)
    assert len(few.eligible) <= len(many.eligible)
    assert len(few.pruned) <= len(many.pruned)
    if low.estimator == "mean":
        assert set(few.eligible) <= set(many.eligible)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 4), st.integers(0, 2**32), st.data())
def test_relabelling_experts_relabels_the_result(iterations, seed, data):
    rng = np.random.default_rng(seed)
    tokens_NE = np.stack([rng.permutation(100)[:8] ** 2 for _ in range(iterations)])
    assume(len(set(tokens_NE.sum(axis=0).tolist())) == 8)
    new_ids = rng.permutation(8)
    relabelled_NE = np.empty_like(tokens_NE)
    relabelled_NE[:, new_ids] = tokens_NE
    chosen = data.draw(rules(devices=2, num_experts=8))
    pruning, relabelled = prune_layer(tokens_NE, chosen, 0), prune_layer(relabelled_NE, chosen, 0)
    assert sorted(new_ids[list(pruning.pruned)]) == list(relabelled.pruned)
    assert sorted(new_ids[list(pruning.eligible)]) == list(relabelled.eligible)
