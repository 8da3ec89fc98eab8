"""What is compared between windows, against values by hand, and when the test of stable loads fires."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from laep_jax.config import LaepConfig
from laep_jax.laep.load import LoadHistory
from laep_jax.laep.rule import PruneRule
from laep_jax.laep.stability import Window, assess, change, history_capacity, moved, rank_correlation

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


def between(old, new, **rule):
    """The change of one layer between windows of two equal steps."""
    settings = LaepConfig(**rule)
    chosen_by = PruneRule.from_settings(settings, 1, top_k=1, expert_parallel=1)
    windows = [Window.of([np.array([loads_E, loads_E])], chosen_by) for loads_E in (new, old)]
    return change(*windows, chosen_by.alpha)


def test_what_moved_is_the_share_of_tokens_that_changed_expert():
    assert between([10, 20, 70], [20, 20, 60]).moved == pytest.approx([0.1])
    assert between([10, 20, 70], [100, 200, 700]).moved == (0.0,)
    assert between([100, 0], [0, 100]).moved == (1.0,)


def test_what_differs_by_chance_has_not_moved():
    """Steps are samples of the same loads, or of loads of which a fifth moves between the windows."""
    rng = np.random.default_rng(0)
    shares_E = rng.dirichlet(np.ones(64))
    others_E = np.where(np.arange(64) % 2, 1.2, 0.8) * shares_E
    others_E /= others_E.sum()
    truly = np.abs(others_E - shares_E).sum() / 2

    def window(chances_E):
        return rng.multinomial(400, chances_E, size=8)

    same = [(window(shares_E), window(shares_E)) for _ in range(50)]
    raw = [np.abs(a_NE.mean(0) - b_NE.mean(0)).sum() / 800 for a_NE, b_NE in same]
    assert np.mean([moved(*pair) for pair in same]) < np.mean(raw) / 2
    assert np.mean([moved(window(others_E), window(shares_E)) for _ in range(50)]) == pytest.approx(truly, rel=0.15)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 5), st.integers(1, 9))
def test_what_moved_is_a_symmetric_share(seed, steps, experts):
    a_NE, b_NE = np.random.default_rng(seed).integers(0, 9, (2, steps, experts))
    assert 0 <= moved(a_NE, b_NE) <= 1
    assert moved(a_NE, b_NE) == moved(b_NE, a_NE)


def test_regret_is_what_yesterdays_choice_has_more_of_todays_tokens_than_todays():
    found = between([50, 30, 10, 10], [60, 10, 5, 25], alpha="inf", beta=0.2)  # chosen: 2 and 3, then 1 and 2
    assert found.regret == pytest.approx([0.3 - 0.15])
    assert between([50, 30, 10, 10], [50, 30, 10, 10], alpha="inf", beta=0.2).regret == (0.0,)


def test_excess_is_the_busiest_of_yesterdays_choice_over_its_bound():
    assert between([50, 30, 10, 10], [60, 10, 5, 25], alpha=0.4, beta=0.2).excess == pytest.approx([25 / (0.4 * 25)])
    assert between([50, 50, 0, 0], [50, 49, 0, 1], alpha=(0.0,), beta=0.2).excess == (math.inf,)
    assert between([1, 1], [1, 1], alpha=0.4).excess == (0.0,)  # none was chosen


def test_too_few_steps_says_so():
    verdict = report([[LOADS_E, LOADS_E]] * 7)
    assert not verdict.stable
    assert verdict.consecutive == 0
    assert verdict.change is None
    assert verdict.to_record()["moved"] is None
    assert verdict.reason == "7 steps recorded, 8 needed to compare two windows"


def test_fires_after_enough_stable_windows_in_a_row():
    early, late = report([[LOADS_E]] * 8), report([[LOADS_E]] * 12)
    assert (early.stable, early.consecutive) == (False, 1)
    assert early.reason == "1 of 2 stable windows in a row"
    assert (late.stable, late.consecutive) == (True, 2)
    assert late.reason == "every layer stable for 2 windows of 4 steps in a row"
    assert late.change
    assert late.change.moved == late.change.regret == (0.0,)
    assert late.change.rank_correlation == (1.0,)


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
    verdict = report([[LOADS_E, LOADS_E, LOADS_E]] * 8 + [[LOADS_E, LOADS_E[::-1], LOADS_E]] * 4)
    assert not verdict.stable
    assert verdict.change
    assert verdict.change.rank_correlation[0] == verdict.change.rank_correlation[2] == 1.0
    assert verdict.reason == f"layer 1: regret {verdict.change.regret[1]:.3f} > 0.05"


def test_what_is_furthest_above_its_threshold_is_named():
    busy_E = LOADS_E + np.array([0, 40, 0, 0, 0, 0, 0, 0])  # a tenth moves to an expert that was to go
    laep = LaepConfig(alpha=0.4, window=4, stable_windows=1, min_step=0)
    verdict = report([[LOADS_E, LOADS_E]] * 4 + [[LOADS_E, busy_E]] * 4, laep)
    assert verdict.reason.startswith("layer 1: regret 0.09")


def test_an_expert_that_is_now_in_use_holds_it_back_where_shares_do_not():
    loads_E = np.array([2] + [500] * 40)
    woken_E = np.array([900] + [480] * 40)  # 4 % of the tokens
    laep = LaepConfig(alpha=0.4, window=4, stable_windows=1, min_step=0)
    assert report([[loads_E]] * 4 + [[woken_E]] * 4, laep).reason == "layer 0: excess 4.590 > 3"


def test_another_set_of_experts_near_the_bound_does_not_hold_it_back():
    """The sets have nothing in common, and yesterday's is as good."""
    laep = LaepConfig(alpha="inf", beta=0.004, window=4, stable_windows=1, min_step=0)  # only the lightest goes
    verdict = report([[LOADS_E]] * 4 + [[swapped(1, 3)]] * 4, laep)
    assert verdict.change
    assert verdict.change.regret == pytest.approx((1 / 400,))
    assert verdict.stable


def test_each_layer_is_judged_by_its_own_alpha():
    laep = LaepConfig(alpha=(math.inf, 0.0), beta=0.004, window=4, stable_windows=1, min_step=0)
    changed = swapped(1, 3)
    verdict = report([[LOADS_E, LOADS_E]] * 4 + [[changed, changed]] * 4, laep)
    assert verdict.change
    assert verdict.change.regret == pytest.approx((1 / 400, 0.0))


@pytest.mark.parametrize(("setting", "value"), [("max_moved", 0.25), ("max_regret", 0.25), ("max_excess", 1.5)])
def test_thresholds_are_reached_by_equality(setting, value):
    """A quarter of the tokens moves to the expert that was to go."""
    steps = [[np.array([0, 8, 8])]] * 4 + [[np.array([4, 6, 6])]] * 4
    loose = {"max_moved": 1.0, "max_regret": 1.0, "max_excess": 9.0}
    for threshold in (value, value - 0.01):
        laep = LaepConfig(alpha=0.5, beta=0.3, window=4, stable_windows=1, min_step=0, **loose | {setting: threshold})
        assert report(steps, laep).stable == (threshold == value)


def test_loads_that_only_scale_do_not_matter():
    steps = [[LOADS_E * (step + 1), LOADS_E[::-1] * (13 - step)] for step in range(12)]
    verdict = report(steps, LaepConfig(window=4, stable_windows=2, min_step=0))
    assert verdict.stable
    assert verdict.change
    assert verdict.change.rank_correlation == (1.0, 1.0)


def test_loads_are_compared_by_their_window_not_step_by_step():
    turned = LOADS_E[::-1]
    swinging = [LOADS_E, turned, turned, LOADS_E], [turned, LOADS_E, LOADS_E, turned]
    assert report([[loads_E] for window in (*swinging, swinging[0]) for loads_E in window]).stable


def test_layers_may_differ_in_their_experts():
    verdict = report([[LOADS_E, LOADS_E[:4]]] * 12)
    assert verdict.stable
    assert verdict.change
    assert len(verdict.change.moved) == 2


def test_the_history_holds_the_windows_that_are_compared():
    assert history_capacity(CONFIG) == 12
    assert history_capacity(LaepConfig(window=25, stable_windows=3)) == 100


def test_steps_without_tokens_have_no_say():
    idle = [np.zeros_like(LOADS_E)]
    verdict = report([[LOADS_E]] * 3 + [idle] + [[LOADS_E]] * 6 + [idle] * 2)
    assert verdict.stable
    assert verdict.change
    assert (verdict.change.moved, verdict.change.rank_correlation) == ((0.0,), (1.0,))
    assert not report([idle] * 12).stable
