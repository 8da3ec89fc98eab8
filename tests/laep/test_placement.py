"""Algorithm 2: worked examples, brute force on tiny cases, groups of as many experts, no dependence on labels."""

import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from laep_jax.laep.balance import device_loads, lower_bound
from laep_jax.laep.placement import METHODS, place


@st.composite
def cases(draw, most_slots=4):
    num_groups = draw(st.integers(1, 4))
    num_experts = draw(st.integers(num_groups, num_groups * most_slots))
    loads = draw(st.lists(st.integers(0, 50), min_size=num_experts, max_size=num_experts))
    return np.array(loads), num_groups


def largest(loads_E, num_groups, method):
    return device_loads(loads_E[place(loads_E, num_groups, method)], num_groups).max()


def optimum(loads, num_groups):
    """The smallest possible largest device load, over all ways to fill the devices one after another."""
    sizes = [len(part) for part in np.array_split(loads, num_groups)]

    def best(rest, sizes):
        if not sizes:
            return 0
        return min(
            max(sum(loads[e] for e in group), best(tuple(e for e in rest if e not in group), sizes[1:]))
            for group in itertools.combinations(rest, sizes[0])
        )

    return best(tuple(range(len(loads))), sizes)


def test_greedy_as_printed():
    # 9 8 7 open the devices; 6 joins 7, 5 joins 8, 4 joins 9: all 13
    loads_E = np.array([4, 9, 5, 8, 6, 7])
    assert place(loads_E, 3, "greedy").tolist() == [1, 0, 3, 2, 5, 4]
    assert device_loads(loads_E[place(loads_E, 3, "greedy")], 3).tolist() == [13, 13, 13]


def test_a_full_device_takes_no_more():
    # The lightest device is full after two zeros; the last expert must go to the other one.
    assert place(np.array([5, 5, 0, 0]), 2, "greedy").tolist() == [0, 2, 1, 3]
    assert place(np.array([9, 1, 1, 1]), 2, "greedy").tolist() == [0, 3, 1, 2]
    assert place(np.zeros(4, int), 2, "greedy").tolist() == [0, 1, 2, 3]


def test_swaps_mend_what_greedy_leaves():
    loads_E = np.array([8, 7, 6, 5, 4, 0])  # greedy: 8 + 5 + 4 and 7 + 6 + 0
    assert largest(loads_E, 2, "greedy") == 17
    assert largest(loads_E, 2, "refined") == optimum(loads_E, 2) == 15


@settings(max_examples=60, deadline=None)
@given(cases(), st.sampled_from(METHODS))
def test_every_expert_has_one_slot(case, method):
    loads_E, num_groups = case
    permutation = place(loads_E, num_groups, method)
    assert sorted(permutation.tolist()) == list(range(len(loads_E)))
    devices = device_loads(loads_E[permutation], num_groups)
    assert devices.shape == (num_groups,)
    assert devices.sum() == loads_E.sum()
    assert device_loads(np.ones_like(loads_E), num_groups).max() == -(-len(loads_E) // num_groups)


@settings(max_examples=60, deadline=None)
@given(cases(most_slots=2))
def test_bound_is_the_optimum_of_few_experts_then_refined_then_greedy(case):
    loads_E, num_groups = case
    greedy, refined = (largest(loads_E, num_groups, method) for method in METHODS)
    best = optimum(loads_E.tolist(), num_groups)
    assert lower_bound(loads_E, num_groups) <= best <= refined <= greedy
    assert lower_bound(loads_E, num_groups) == best or len(loads_E) % num_groups


@settings(max_examples=30, deadline=None)
@given(cases())
def test_no_swap_is_left(case):
    loads_E, num_groups = case
    permutation = place(loads_E, num_groups, "refined")
    devices = device_loads(loads_E[permutation], num_groups)
    device_of_place = np.repeat(np.arange(num_groups), [*map(len, np.array_split(loads_E, num_groups))])
    for a, b in itertools.combinations(range(len(loads_E)), 2):
        swapped = permutation.copy()
        swapped[[a, b]] = swapped[[b, a]]
        pair = device_of_place[[a, b]]
        assert device_loads(loads_E[swapped], num_groups)[pair].max() >= devices[pair].max()


@settings(max_examples=60, deadline=None)
@given(cases(), st.sampled_from(METHODS), st.integers(2, 10**9))
def test_scaling_changes_nothing(case, method, factor):
    loads_E, num_groups = case
    permutation = place(loads_E, num_groups, method).tolist()
    assert place(loads_E * factor, num_groups, method).tolist() == permutation
    assert place(loads_E / 4, num_groups, method).tolist() == permutation  # exact in floating point


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([(8, 2), (12, 4), (9, 3), (10, 4)]), st.sampled_from(METHODS))
def test_relabelling_experts_relabels_the_result(seed, sizes, method):
    num_experts, num_groups = sizes
    rng = np.random.default_rng(seed)
    loads_E = rng.permutation(60)[:num_experts]
    new_ids = rng.permutation(num_experts)
    relabelled_E = np.empty_like(loads_E)
    relabelled_E[new_ids] = loads_E
    expected = new_ids[place(loads_E, num_groups, method)]
    assert place(relabelled_E, num_groups, method).tolist() == expected.tolist()


def test_gap_at_the_size_of_the_paper():
    """64 experts on 8 devices: greedy stays within some per cent of the bound, swaps within 0.3 %."""
    rng = np.random.default_rng(0)
    gaps = {method: [] for method in METHODS}
    for _ in range(10):
        weights_E = rng.lognormal(sigma=0.5, size=64)
        loads_E = rng.multinomial(4_000_000, weights_E / weights_E.sum())
        for method in METHODS:
            gaps[method].append(largest(loads_E, 8, method) / lower_bound(loads_E, 8) - 1)
    assert max(gaps["refined"]) < 0.003 < np.mean(gaps["greedy"]) < 0.05


def test_float_loads_end_and_stay_finite():
    loads_E = np.random.default_rng(1).exponential(size=64) * 1e-7
    assert largest(loads_E, 8, "refined") < largest(loads_E, 8, "greedy")
    assert place(np.zeros(8), 4, "refined").tolist() == place(np.zeros(8, int), 4, "refined").tolist()


def test_experts_that_do_not_divide_leave_the_last_devices_one_less():
    # 9 and 8 open the devices; 7 joins 8, and that device is full
    loads_E = np.array([9, 8, 7, 1, 1])
    assert place(loads_E, 2, "greedy").tolist() == [0, 3, 4, 1, 2]
    assert device_loads(loads_E[[0, 3, 4, 1, 2]], 2).tolist() == [11, 15]
    assert lower_bound(loads_E, 2) == largest(loads_E, 2, "refined") == 15
    # 11, 5 and 1 beside 7 and 6: one more for the second device would even them out, but it has room for two
    assert largest(np.array([11, 1, 7, 6, 5]), 2, "refined") == 17
