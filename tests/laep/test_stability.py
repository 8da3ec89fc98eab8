"""Rank correlation and overlap against values by hand, and when the test of stable loads fires."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from laep_jax.config import LaepConfig
from laep_jax.laep.load import LoadHistory
from laep_jax.laep.stability import assess, history_capacity, overlap, rank_correlation

LOADS_E = np.array([50, 2, 60, 1, 70, 80, 90, 47])  # 400 tokens; with beta 0.1, experts 1 and 3 go
CONFIG = LaepConfig(alpha="inf", window=4, stable_windows=2, min_step=0)


def report(steps, laep=CONFIG):
    """The verdict on one entry a step: [E] of each layer."""
    history = LoadHistory([len(loads_E) for loads_E in steps[0]], history_capacity(laep))
    for step, layers in enumerate(steps):
        history.record(step, layers)
    return assess(history, laep)


def swapped(a, b) -> np.ndarray:
    loads_E = LOADS_E.copy()
    loads_E[[a, b]] = loads_E[[b, a]]
    return loads_E


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ([1, 2, 3, 4], [10, 20, 30, 40], 1.0),
        ([1, 2, 3, 4], [9, 7, 5, 3], -1.0),
        ([1, 2, 3, 4, 5], [2, 1, 4, 3, 5], 0.8),  # 1 - 6 * 4 / (5 * 24)
        # Ranks 1, 2.5, 2.5, 4 against 1, 2, 3, 4: covariance 4.5, variances 4.5 and 5.
        ([1, 2, 2, 3], [1, 2, 3, 4], 4.5 / math.sqrt(4.5 * 5)),
        # Many zeros, ranks 2.5 (four times), 5, 6 and 3 (five times), 6: deviations from 3.5 are
        # -1 -1 -1 -1 1.5 2.5 and -0.5 (five times) 2.5; covariance 7.5, variances 12.5 and 7.5.
        ([0, 0, 0, 0, 4, 9], [0, 0, 0, 0, 0, 7], 7.5 / math.sqrt(12.5 * 7.5)),
        ([0, 0, 5], [5, 0, 0], -0.5),  # ranks 1.5, 1.5, 3 and 3, 1.5, 1.5: -0.75 / 1.5
        ([3, 3, 3], [1, 1, 1], 1.0),
        ([0, 0, 0], [0, 1, 2], 0.0),
        ([0, 1, 2], [7, 7, 7], 0.0),
        ([7], [0], 1.0),
    ],
)
def test_rank_correlation_by_hand(a, b, expected):
    assert rank_correlation(np.array(a), np.array(b)) == pytest.approx(expected, abs=1e-15)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=2, max_size=12))
def test_rank_correlation_is_the_correlation_of_average_ranks(pairs):
    a_E, b_E = np.array(pairs).T

    def ranks(values):
        return [sum(v < value for v in values) + (sum(v == value for v in values) + 1) / 2 for value in values]

    found = rank_correlation(a_E, b_E)
    assert found == rank_correlation(b_E, a_E)
    if np.ptp(a_E) and np.ptp(b_E):
        assert found == pytest.approx(np.corrcoef(ranks(a_E.tolist()), ranks(b_E.tolist()))[0, 1], abs=1e-12)
    assert rank_correlation(a_E, a_E) == rank_correlation(a_E, 3 * a_E**2 + 1) == 1.0  # not 0.9999999


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [((), (), 1.0), ((1,), (), 0.0), ((1, 2), (3,), 0.0), ((1, 2, 3, 4), (4, 3, 5), 0.4), ((2, 1), (1, 2), 1.0)],
)
def test_overlap_is_intersection_over_union(a, b, expected):
    assert overlap(a, b) == overlap(b, a) == expected


def test_too_few_steps_says_so():
    verdict = report([[LOADS_E, LOADS_E]] * 7)
    assert not verdict.stable
    assert verdict.consecutive == 0
    assert verdict.rank_correlation == verdict.overlap == (None, None)
    assert verdict.reason == "7 steps recorded, 8 needed to compare two windows"


def test_fires_after_enough_stable_windows_in_a_row():
    early, late = report([[LOADS_E]] * 8), report([[LOADS_E]] * 12)
    assert (early.stable, early.consecutive) == (False, 1)
    assert early.reason == "1 of 2 stable windows in a row"
    assert (late.stable, late.consecutive) == (True, 2)
    assert late.reason == "every layer stable for 2 windows of 4 steps in a row"
    assert (late.rank_correlation, late.overlap) == ((1.0,), (1.0,))


def test_an_unstable_window_starts_the_count_anew():
    turned = [[LOADS_E[::-1]]] * 4
    stable = [[LOADS_E]] * 4
    now = report(stable * 2 + turned)
    assert (now.stable, now.consecutive) == (False, 0)
    assert now.reason.startswith("layer 0: ")
    back = report(turned + stable * 2)
    assert (back.stable, back.consecutive) == (False, 1)
    assert report(turned + stable * 3).stable  # what was before the last three windows is forgotten


@pytest.mark.parametrize("stable_windows", [1, 3])
def test_the_number_of_windows_is_a_setting(stable_windows):
    laep = LaepConfig(alpha="inf", window=2, stable_windows=stable_windows, min_step=0)
    verdicts = [report([[LOADS_E]] * 2 * windows, laep).stable for windows in range(1, 6)]
    assert verdicts == [windows > stable_windows for windows in range(1, 6)]


def test_not_before_the_minimum_step():
    for min_step in (11, 12):  # the last step recorded is 11
        laep = LaepConfig(alpha="inf", window=4, stable_windows=2, min_step=min_step)
        verdict = report([[LOADS_E]] * 12, laep)
        assert verdict.stable == (min_step == 11)
        assert verdict.consecutive == 2
    assert verdict.reason == "step 11 is before min_step=12"


def test_one_unstable_layer_holds_it_back_and_is_named():
    steps = [[LOADS_E, LOADS_E, LOADS_E]] * 8 + [[LOADS_E, LOADS_E[::-1], LOADS_E]] * 4
    verdict = report(steps)
    assert not verdict.stable
    assert verdict.rank_correlation[0] == verdict.rank_correlation[2] == 1.0
    assert verdict.reason == f"layer 1: rank correlation {verdict.rank_correlation[1]:.4f} < 0.9"


def test_the_layer_furthest_below_is_named():
    steps = [[LOADS_E, LOADS_E, LOADS_E]] * 4 + [[swapped(4, 7), swapped(0, 6), LOADS_E]] * 4
    verdict = report(steps)
    assert verdict.rank_correlation[1] < verdict.rank_correlation[0] < 0.9
    assert verdict.overlap == (1.0, 1.0, 1.0)
    assert verdict.reason.startswith("layer 1: rank correlation")


def test_other_pruned_experts_hold_it_back_where_ranks_do_not():
    laep = LaepConfig(alpha="inf", beta=0.004, window=4, stable_windows=1, min_step=0)  # only the lightest goes
    verdict = report([[LOADS_E]] * 4 + [[swapped(1, 3)]] * 4, laep)
    assert verdict.rank_correlation[0] > 0.9
    assert verdict.overlap == (0.0,)
    assert verdict.reason == "layer 0: overlap of the chosen sets 0.0000 < 0.8"


def test_each_layer_is_judged_by_its_own_alpha():
    laep = LaepConfig(alpha=(math.inf, 0.0), beta=0.004, window=4, stable_windows=1, min_step=0)
    changed = swapped(1, 3)
    assert report([[LOADS_E, LOADS_E]] * 4 + [[changed, changed]] * 4, laep).overlap == (0.0, 1.0)


def test_one_more_candidate_is_one_more_in_the_sets_compared():
    # Three candidates now, two before, however many would go once the rest is made to divide by the devices.
    other = LOADS_E.copy()
    other[7] = 3
    laep = LaepConfig(alpha="inf", window=4, stable_windows=1, min_step=0, overlap=0.7, rank_correlation=0.8)
    assert report([[LOADS_E]] * 4 + [[other]] * 4, laep).overlap == (2 / 3,)


def test_thresholds_are_reached_by_equality():
    steps = [[np.array([1, 2, 3, 4, 5])]] * 4 + [[np.array([2, 1, 4, 3, 5])]] * 4  # 0.8, no one goes
    for threshold in (0.8, 0.81):
        laep = LaepConfig(
            alpha="inf", beta=0.0, window=4, stable_windows=1, min_step=0, rank_correlation=threshold, overlap=1.0
        )
        assert report(steps, laep).stable == (threshold == 0.8)


def test_loads_that_only_scale_do_not_matter():
    steps = [[LOADS_E * (step + 1), LOADS_E[::-1] * (13 - step)] for step in range(12)]
    verdict = report(steps, LaepConfig(window=4, stable_windows=2, min_step=0))
    assert verdict.stable
    assert verdict.rank_correlation == verdict.overlap == (1.0, 1.0)


def test_loads_are_compared_by_their_window_not_step_by_step():
    turned = LOADS_E[::-1]
    swinging = [LOADS_E, turned, turned, LOADS_E], [turned, LOADS_E, LOADS_E, turned]
    assert report([[loads_E] for window in (*swinging, swinging[0]) for loads_E in window]).stable


def test_layers_may_differ_in_their_experts():
    verdict = report([[LOADS_E, LOADS_E[:4]]] * 12)
    assert verdict.stable
    assert len(verdict.overlap) == 2


def test_the_history_holds_the_windows_that_are_compared():
    assert history_capacity(CONFIG) == 12
    assert history_capacity(LaepConfig(window=25, stable_windows=3)) == 100


def test_steps_without_tokens_have_no_say():
    idle = [np.zeros_like(LOADS_E)]
    verdict = report([[LOADS_E]] * 3 + [idle] + [[LOADS_E]] * 6 + [idle] * 2)
    assert verdict.stable
    assert verdict.overlap == verdict.rank_correlation == (1.0,)
    assert not report([idle] * 12).stable
