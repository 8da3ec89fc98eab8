"""The rule of a plan: alpha by layer, the settings it is made from, and what it refuses."""

import dataclasses
import math

import numpy as np
import pytest

from laep_jax.config import LaepConfig
from laep_jax.errors import UserError
from laep_jax.laep.pruning import prune_layer
from laep_jax.laep.rule import SETTINGS, PruneRule, alpha_per_layer
from laep_jax.laep.slots import place_in_slots

RULE = PruneRule.from_settings(LaepConfig(), 2, top_k=2, expert_parallel=4)


@pytest.mark.parametrize(("num_layers", "ends"), [(12, 2), (48, 8), (103, 17), (5, 0), (6, 1), (1, 0)])
def test_hybrid_alpha(num_layers, ends):
    alphas = alpha_per_layer("hybrid", num_layers)
    assert alphas == (0.2,) * ends + (0.4,) * (num_layers - 2 * ends) + (0.2,) * ends


def test_other_alphas():
    assert alpha_per_layer("inf", 2) == alpha_per_layer(math.inf, 2) == (math.inf, math.inf)
    assert alpha_per_layer(1, 2) == (1.0, 1.0)
    assert alpha_per_layer([0.1, math.inf], 2) == (0.1, math.inf)


@pytest.mark.parametrize("alpha", [-0.1, math.nan, "abc", (0.1,), (0.1, 0.2, 0.3), (0.1, math.nan)])
def test_bad_alpha_is_refused(alpha):
    with pytest.raises(UserError, match="alpha="):
        alpha_per_layer(alpha, 2)


def test_a_rule_has_the_settings_of_its_config():
    values = {"alpha": (0.3, "inf"), "beta": 0, "estimator": "mean", "inequality": "lt"}
    values |= {"rounding": "prune", "placement": "greedy", "domain_beta": 0.2, "min_experts": 4, "max_experts": 9}
    assert values.keys() == {*SETTINGS}
    rule = PruneRule.from_settings(LaepConfig(**values), 2, top_k=3, expert_parallel=4)
    expected = values | {"alpha": (0.3, math.inf), "top_k": 3, "expert_parallel": 4}
    assert dataclasses.asdict(rule) == expected
    assert type(rule.beta) is float  # so that its JSON is the same


def test_under_the_rule_that_chooses_none_not_even_idle_experts_are_eligible():
    rule = dataclasses.replace(RULE.choosing_none(), expert_parallel=1)
    assert prune_layer(np.eye(1, 6, dtype=int), rule, 0).eligible == ()
    assert (rule.placement, rule.top_k) == (RULE.placement, RULE.top_k)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"alpha": (0.4, -1.0)}, r"alpha=\(0.4, -1.0\) must not be negative or NaN"),
        ({"beta": 1.5}, "beta=1.5 must lie between 0 and 1"),
        ({"beta": math.nan}, "beta=nan must be a finite number"),
        ({"estimator": "median"}, "estimator='median' must be one of vote, mean"),
        ({"inequality": "<"}, "inequality='<' must be one of le, lt"),
        ({"rounding": "up"}, "rounding='up' must be one of keep_more, prune, none"),
        ({"rounding": 1}, "rounding=1 must be of type str; write '1', in quotes"),
        ({"placement": "random"}, "placement='random' must be one of greedy, refined"),
        ({"top_k": 0}, "top_k=0 must be at least 1"),
        ({"expert_parallel": 0}, "expert_parallel=0 must be at least 1"),
    ],
)
def test_bad_settings_are_refused(changes, message):
    with pytest.raises(UserError, match=f"^{message}$"):
        dataclasses.replace(RULE, **changes)


@pytest.mark.parametrize(
    ("num_experts", "message"),
    [
        ((8,), "entries of alpha=2 must be num_layers=1"),
        ((8, 3), r"num_experts\[1\]=3 is below expert_parallel=4"),
        ((0, 8), r"num_experts\[0\]=0 is below top_k=2"),
    ],
)
def test_other_models_are_refused(num_experts, message):
    with pytest.raises(UserError, match=f"^{message}$"):
        RULE.check_model(num_experts)


@pytest.mark.parametrize(("expert_parallel", "top_k", "most"), [(1, 2, 0), (2, 2, 1), (4, 2, 3), (4, 6, 6)])
def test_replica_slots_that_the_smallest_plan_can_fill(expert_parallel, top_k, most):
    rule = PruneRule.from_settings(LaepConfig(), 1, top_k=top_k, expert_parallel=expert_parallel)
    assert rule.max_replica_slots([32, rule.min_kept]) == most
    place_in_slots(np.ones(rule.min_kept), expert_parallel, most)
    with pytest.raises(UserError):
        place_in_slots(np.ones(rule.min_kept), expert_parallel, most + 1)


def test_replica_slots_of_a_model_with_fewer_experts_than_rounding_would_keep():
    rule = PruneRule.from_settings(LaepConfig(), 1, top_k=6, expert_parallel=4)
    assert rule.max_replica_slots([7]) == 5
    place_in_slots(np.ones(7), 4, 5)
