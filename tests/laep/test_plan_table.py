"""The printed plan: aligned columns, a line a layer, a total, and numbers computed by hand."""

import dataclasses
import math
import re

import numpy as np
import pytest

from laep_jax.config import LaepConfig
from laep_jax.laep.plan import chosen_plan, identity_plan, make_plan
from laep_jax.laep.rule import PruneRule

WORKED_NE = [[10, 90, 5, 1, 200, 30, 60, 4], [35, 90, 5, 2, 180, 24, 60, 4]]  # test_plan.py's worked example


def test_table_is_a_line_a_layer_in_columns():
    tokens = [np.array(WORKED_NE), np.array([[1000] + [0] * 15] * 2)]
    laep = LaepConfig(alpha=(0.4, 0.123456), placement="greedy")
    plan = make_plan(tokens, PruneRule.from_settings(laep, 2, top_k=2, expert_parallel=2))
    about, counts, imbalance, bound, header, first, second, total = plan.table().splitlines()
    assert about.startswith("beta 0.1, ")
    assert "kept: if any are pruned a multiple of 2, at least 2; " in counts
    assert imbalance.startswith("imbalance: max / mean load of the devices, ")
    assert bound.startswith("bound: no placement ")
    ends = [[match.end() for match in re.finditer(r"\S+", line)] for line in (first, second)]
    names = ["layer", "alpha", "experts", "kept", "eligible", "pruned", "imbalance before", "after", "bound", "gap"]
    assert ends[0] == ends[1] == [header.index(name) + len(name) for name in names]
    assert len(total) == len(header) <= 120
    assert first.split() == ["0", "0.4", "8", "6", "3", "2", "1.4043", "1.1027", "1.1027", "0.00%"]
    assert second.split()[2:6] == ["16", "2", "15", "14"]
    assert total.split()[:5] == ["total", "24", "8", "18", "16"]
    largest, mean = 217.5 + 1000, 394.5 / 2 + 500
    assert float(total.split()[6]) == pytest.approx(largest / mean, abs=1e-4)


def test_table_of_a_plan_without_loads_is_finite():
    plan = identity_plan((4,), expert_parallel=2, top_k=1)
    plan = dataclasses.replace(plan, rule=dataclasses.replace(plan.rule, alpha=(math.inf,)))
    assert plan.table().splitlines()[5].split()[-4:] == ["1.0000", "1.0000", "1.0000", "0.00%"]
    assert " inf " in plan.table()


def test_gap_of_sums_that_differ_by_rounding_is_not_negative():
    rng = np.random.default_rng(0)
    rule = PruneRule.from_settings(LaepConfig(), 1, top_k=1, expert_parallel=4)
    for _ in range(200):
        loads_E = rng.choice([0.1, 0.2, 0.3, 0.7], 16)
        assert "-" not in chosen_plan([loads_E], [()], rule).table()


def test_slots_have_a_column_where_there_are_replicas():
    tokens_NLE = np.array([[[90, 10, 10, 10], [40, 40, 20, 20]]])
    rule = PruneRule.from_settings(LaepConfig(alpha=0.0), 2, top_k=1, expert_parallel=2)
    lines = make_plan(tokens_NLE, rule, replica_slots=1).table().splitlines()
    assert lines[3].endswith("slots: after, with 1 replica slots a device")
    assert [line.split()[-1] for line in lines[4:]] == ["slots", "1.0000", "1.0000", "1.0000"]
    assert "slots" not in make_plan(tokens_NLE, rule).table()
    idle = make_plan(tokens_NLE, rule, placement_loads=[np.zeros(4)] * 2, replica_slots=1).table().splitlines()
    assert [line.split()[-1] for line in idle[4:]] == ["slots", "1.0000", "1.0000", "1.0000"]
