"""The placement figures of `benchmarks plan`, and EPLB's packing by hand."""

import numpy as np

from benchmarks import plan
from laep_jax.laep.placement import place


def test_eplb_gives_the_heaviest_left_to_the_lightest_device_with_room():
    loads_E = np.array([5.0, 9.0, 1.0, 4.0, 2.0, 2.0])  # 9 | 5 | 5 4 | 9 2 | 5 4 2, which is full | 9 2 1
    assert place(loads_E, 2, "greedy").tolist() == [1, 4, 2, 0, 3, 5]


def test_refined_placement_is_never_worse_than_eplb_and_near_the_bound(monkeypatch):
    monkeypatch.setattr(plan, "ITERATIONS", 3)
    result = plan.run([])
    assert result["worse_than_eplb"] == 0
    assert result["mean_gap"] < 0.002 < result["mean_gap_eplb"]
    assert 0 < result["plan_seconds"]["fastest"] <= result["plan_seconds"]["median"]
    assert "refined is worse than EPLB in 0" in plan.table(result)
