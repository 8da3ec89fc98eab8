"""The layout of experts as arrays: every expert once in its layer's window, and in the slots that its map says."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from laep_jax.config import LaepConfig
from laep_jax.laep.layout import by_loads, by_plan, from_arrays, make_layout, num_slots, to_arrays, windows
from laep_jax.laep.plan import make_plan
from laep_jax.laep.rule import PruneRule
from laep_jax.laep.slots import EMPTY

COUNTS = st.lists(st.integers(1, 12), min_size=1, max_size=5)


@given(COUNTS)
def test_windows_hold_each_layers_experts_and_stay_inside(counts):
    start_L, is_own_LW = windows(counts)
    assert (start_L + is_own_LW.shape[1] <= sum(counts)).all()
    rows = [start + np.flatnonzero(own_W) for start, own_W in zip(start_L, is_own_LW, strict=True)]
    assert np.concatenate(rows).tolist() == list(range(sum(counts)))
    assert [len(ids) for ids in rows] == counts


@given(COUNTS, st.sampled_from([1, 2, 4]), st.integers(0, 2), st.integers(0, 2**32 - 1))
def test_slots_positions_and_shares_are_those_of_the_maps(counts, devices, replica_slots, seed):
    rng = np.random.default_rng(seed)
    loads = [rng.integers(0, 100, count) for count in counts]
    maps = by_loads(loads, devices, replica_slots if devices > 1 else 0)
    layout = make_layout(maps, counts, replica_slots)
    assert layout.expert_PS.shape == (len(counts), devices, num_slots(counts, devices, replica_slots))
    np.testing.assert_allclose(layout.share_WP.sum(2), layout.is_own_W, atol=1e-6)
    for layer, (own_W, experts_PS) in enumerate(zip(layout.is_own_W, layout.expert_PS, strict=True)):
        assert own_W[experts_PS].all()
        for expert, device in np.argwhere(layout.position_WP[layer] != EMPTY):
            assert experts_PS[device, layout.position_WP[layer, expert, device]] == expert
        assert (layout.position_WP[layer][~own_W] == EMPTY).all()
    for got, want in zip(from_arrays(to_arrays(maps)), maps, strict=True):
        np.testing.assert_array_equal(got.slots_PS, want.slots_PS)
        np.testing.assert_array_equal(got.shares_PS, want.shares_PS)


def test_a_plans_slots_are_of_the_experts_that_stay():
    tokens_NLE = np.array([[[90, 1, 10, 10, 2, 10], [40, 40, 20, 20, 30, 30]]])
    rule = PruneRule.from_settings(LaepConfig(alpha=0.4), 2, top_k=1, expert_parallel=2)
    plan = make_plan(tokens_NLE, rule, replica_slots=1)
    assert plan.num_experts_after == (4, 6)
    for layer, slot_map, tokens_E in zip(plan.layers, by_plan(plan.layers), tokens_NLE[0], strict=True):
        kept_E = tokens_E[list(layer.kept)]
        np.testing.assert_allclose(slot_map.device_loads(kept_E), layer.slot_load)
    plain = make_plan(tokens_NLE, rule)
    for layer, slot_map, tokens_E in zip(plain.layers, by_plan(plain.layers), tokens_NLE[0], strict=True):
        np.testing.assert_allclose(slot_map.device_loads(tokens_E[list(layer.kept)]), layer.device_load)
