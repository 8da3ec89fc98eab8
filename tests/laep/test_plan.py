"""Plans: a worked example, direct computation of what they report, and how they apply and compose."""

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from laep_jax.config import LaepConfig
from laep_jax.errors import UserError
from laep_jax.laep.plan import (
    Plan,
    apply_plan_to_lineage,
    chosen_plan,
    compose,
    identity_plan,
    initial_lineage,
    make_plan,
)
from laep_jax.laep.pruning import prune_layer
from laep_jax.laep.rule import PruneRule

WORKED_NE = [[10, 90, 5, 1, 200, 30, 60, 4], [35, 90, 5, 2, 180, 24, 60, 4]]  # 400 tokens each
ARBITRARY = st.integers(0, 2**32)


def rule(num_layers, *, expert_parallel=2, top_k=2, alpha=0.4, **settings) -> PruneRule:
    laep = LaepConfig(alpha=alpha, **settings)
    return PruneRule.from_settings(laep, num_layers, top_k=top_k, expert_parallel=expert_parallel)


def planned(tokens, **changes) -> Plan:
    loads = changes.pop("placement_loads", None)
    num_layers = tokens.shape[1] if isinstance(tokens, np.ndarray) else len(tokens)
    return make_plan(tokens, rule(num_layers, **changes), placement_loads=loads)


def worked(**changes) -> Plan:
    return planned([np.array(WORKED_NE)], **changes)


def skewed(rng, iterations, count) -> np.ndarray:
    """Counts [N, E] under which some experts are light in every iteration."""
    return rng.integers(0, 9, count) ** 3 + rng.integers(1, 9, (iterations, count))


@st.composite
def cases(draw, most_layers=3):
    """Counts [N, E] of each layer and settings for `planned`."""
    devices = draw(st.sampled_from([1, 2, 3]))
    num_experts = draw(st.lists(st.integers(devices, 4 * devices), min_size=1, max_size=most_layers))
    iterations, rng = draw(st.integers(1, 3)), np.random.default_rng(draw(ARBITRARY))
    tokens = [skewed(rng, iterations, count) for count in num_experts]
    choices = {
        "expert_parallel": st.just(devices),
        "top_k": st.integers(1, min(2, *num_experts)),
        "alpha": st.sampled_from([0.2, 0.7, 2.5, "inf", "hybrid"]),
        "beta": st.sampled_from([0.05, 0.1, 0.5]),
        "estimator": st.sampled_from(["vote", "mean"]),
        "inequality": st.sampled_from(["le", "lt"]),
        "rounding": st.sampled_from(["keep_more", "prune", "none"]),
        "placement": st.sampled_from(["greedy", "refined"]),
    }
    return tokens, {name: draw(values) for name, values in choices.items()}


def gathered(arrays, plan):
    """What the plan does to everything that belongs to an expert: new[e] = old[kept[e]]."""
    return [array[list(kept)] for array, kept in zip(arrays, plan.kept, strict=True)]


def test_worked_example():
    # alpha: at most 0.4 * 50 = 20 each. beta: running sums to 0.1 * 400 = 40.
    # First iteration: 1, 4, 5, 10 make 20, and 30 is above both: experts 3, 7, 2, 0.
    # Second: 2, 4, 5 make 11; 24 more would be 35, but 24 > 20: experts 3, 7, 2.
    # 7 marks in 2 iterations: 3 go, those with two votes. 5 would stay on 2 devices, so the heaviest
    # candidate, expert 2 with 5 tokens, is put back. Sums over both iterations of who stays:
    # 4: 380 | 1: 180 | 6: 120 | 5: 54 | 0: 45 | 2: 10, in all 789. Greedy: 4 | 1 6 5 (full), then 0 and 2.
    plan = worked(placement="greedy")
    (layer,) = plan.layers
    assert (layer.eligible, layer.pruned) == ((2, 3, 7), (3, 7))
    assert layer.kept == (4, 0, 2, 1, 6, 5)
    assert layer.device_load == (435 / 2, 354 / 2)
    assert layer.lower_bound == 435 / 2  # expert 4 with the two lightest beside it
    assert layer.imbalance_before == pytest.approx(554 / 394.5)  # 45 + 180 + 10 and 380 + 54 + 120
    assert layer.imbalance_after == pytest.approx(435 / 394.5)
    assert plan.num_experts_after == (6,)
    # Pruning one more instead: expert 0 was marked once, and 4 go.
    assert worked(rounding="prune").layers[0].pruned == (0, 2, 3, 7)


@settings(max_examples=60, deadline=None)
@given(cases())
def test_kept_and_pruned_are_all_experts(case):
    tokens, choices = case
    plan = planned(tokens, **choices)
    for layer, tokens_NE in zip(plan.layers, tokens, strict=True):
        assert sorted(layer.kept + layer.pruned) == list(range(tokens_NE.shape[1]))
        rounded = plan.rule.rounding != "none" and bool(layer.pruned)
        assert not rounded or len(layer.kept) % plan.rule.expert_parallel == 0
    assert plan.num_experts_after == tuple(len(kept) for kept in plan.kept)


@settings(max_examples=60, deadline=None)
@given(cases())
def test_each_layer_is_pruned_by_the_rule(case):
    tokens, choices = case
    plan = planned(tokens, **choices)
    for index, (layer, tokens_NE) in enumerate(zip(plan.layers, tokens, strict=True)):
        choice = prune_layer(tokens_NE, plan.rule, index)
        assert (layer.pruned, layer.eligible) == (choice.pruned, choice.eligible)


@pytest.mark.parametrize("estimator", ["vote", "mean"])
def test_iterations_without_tokens_leave_the_plan_as_it_is(estimator):
    tokens_NE = np.insert(WORKED_NE, [0, 1, 2], 0, axis=0)
    assert planned([tokens_NE], estimator=estimator) == worked(estimator=estimator)  # device loads too


def test_layers_without_tokens_are_refused_by_name():
    tokens_NLE = np.tile(WORKED_NE, (1, 4, 1)).reshape(1, 8, 8)
    tokens_NLE[:, [2, 5]] = 0
    with pytest.raises(UserError, match=r"^layers without tokens=\[2, 5\] cannot be pruned: leave dense layers out"):
        planned(tokens_NLE)


def test_alpha_belongs_to_the_layer():
    tokens_NLE = np.tile([[15, 15, 100, 100, 100, 100]], (2, 6, 1))  # mean load 71.7: 15 is 0.209 of it
    plan = planned(tokens_NLE, alpha="hybrid")
    assert plan.rule.alpha == (0.2, 0.4, 0.4, 0.4, 0.4, 0.2)
    assert plan.num_experts_after == (6, 4, 4, 4, 4, 6)


@settings(max_examples=60, deadline=None)
@given(cases())
def test_reported_loads_against_direct_computation(case):
    tokens, choices = case
    plan = planned(tokens, **choices)
    devices = plan.rule.expert_parallel
    for layer, tokens_NE in zip(plan.layers, tokens, strict=True):
        size, longer = divmod(len(layer.kept), devices)
        ends = np.cumsum([size + 1] * longer + [size] * (devices - longer)).tolist()
        mean = {expert: sum(tokens_NE[:, expert].tolist()) / len(tokens_NE) for expert in layer.kept}

        def loads(order, ends=ends, mean=mean):
            return [sum(mean[e] for e in order[first:end]) for first, end in zip([0, *ends], ends, strict=False)]

        fair = sum(mean.values()) / devices
        before, after = loads(sorted(layer.kept)), loads(layer.kept)
        least = max(fair, max(mean.values()) + sum(sorted(mean.values())[: size - 1]))
        assert layer.device_load == pytest.approx(after)
        assert least <= layer.lower_bound * (1 + 1e-12) <= max(after) * (1 + 2e-12)
        assert layer.imbalance_before == pytest.approx(max(before) / fair if fair else 1.0)
        assert layer.imbalance_after == pytest.approx(max(after) / fair if fair else 1.0)
        assert layer.mean_load == pytest.approx(fair)
        assert layer.largest_before == pytest.approx(max(before))


@settings(max_examples=40, deadline=None)
@given(cases(), st.integers(2, 10**9))
def test_scaling_all_counts_changes_no_decision(case, factor):
    tokens, choices = case
    plan, scaled = planned(tokens, **choices), planned([tokens_NE * factor for tokens_NE in tokens], **choices)
    for layer, other in zip(plan.layers, scaled.layers, strict=True):
        assert (layer.kept, layer.pruned, layer.eligible) == (other.kept, other.pruned, other.eligible)
        assert other.device_load == pytest.approx([load * factor for load in layer.device_load])
    assert scaled.imbalances == pytest.approx(plan.imbalances)


@settings(max_examples=40, deadline=None)
@given(cases(most_layers=1), ARBITRARY, st.integers(1, 3))
def test_relabelling_experts_relabels_the_plan(case, seed, iterations):
    _, choices = case
    rng = np.random.default_rng(seed)
    tokens_NE = np.stack([rng.permutation(200)[:12] ** 2 for _ in range(iterations)])
    assume(len(set(tokens_NE.sum(axis=0).tolist())) == 12)  # ties go by label
    new_ids = rng.permutation(12)
    relabelled_NE = np.empty_like(tokens_NE)
    relabelled_NE[:, new_ids] = tokens_NE
    (layer,), (relabelled,) = planned([tokens_NE], **choices).layers, planned([relabelled_NE], **choices).layers
    assert tuple(new_ids[list(layer.kept)].tolist()) == relabelled.kept
    assert sorted(new_ids[list(layer.pruned)].tolist()) == list(relabelled.pruned)
    assert sorted(new_ids[list(layer.eligible)].tolist()) == list(relabelled.eligible)
    assert layer.device_load == relabelled.device_load


def placed(loads_E, pruned):
    """Where the experts that are not pruned go when nothing else is known, by their old ids."""
    survivors = np.delete(np.arange(len(loads_E)), pruned)
    (slots,) = chosen_plan([loads_E[survivors]], [()], rule(1)).kept
    return (tuple(survivors[list(slots)].tolist()),)


def test_measured_loads_place_but_do_not_prune():
    # Without experts 3 and 7, say expert 0 inherits most of their tokens.
    measured_E = np.array([210.5, 90, 7, 0, 190, 30, 62, 0])
    recorded, masked = worked(), worked(placement_loads=[measured_E])
    assert masked.layers[0].pruned == recorded.layers[0].pruned == (3, 7)
    assert masked.layers[0].eligible == recorded.layers[0].eligible
    assert masked.kept == placed(measured_E, masked.layers[0].pruned)
    assert masked.kept != recorded.kept
    assert sum(masked.layers[0].device_load) == 589.5  # per iteration already
    assert worked(placement_loads=[measured_E[::-1]]).layers[0].pruned == (3, 7)


def test_mean_loads_as_placement_loads_change_nothing():
    plan, mean = worked(), worked(placement_loads=[np.mean(WORKED_NE, axis=0)])
    assert mean.kept == plan.kept
    assert mean.layers[0].device_load == plan.layers[0].device_load


@settings(max_examples=60, deadline=None)
@given(cases(), ARBITRARY)
def test_composition_is_one_after_the_other(case, seed):
    tokens, choices = case
    rng = np.random.default_rng(seed)
    first = planned(tokens, **choices)
    second = planned([skewed(rng, 2, count) for count in first.num_experts_after], **choices)
    both = compose(first, second)
    arrays = [rng.normal(size=(count, 2)) for count in first.num_experts]
    for one, two in zip(gathered(arrays, both), gathered(gathered(arrays, first), second), strict=True):
        np.testing.assert_array_equal(one, two)
    lineage = tuple(tuple(rng.permutation(count).tolist()) for count in first.num_experts)
    assert apply_plan_to_lineage(lineage, both) == apply_plan_to_lineage(apply_plan_to_lineage(lineage, first), second)
    assert apply_plan_to_lineage(initial_lineage(first.num_experts), both) == both.kept
    for old, new, total in zip(first.layers, second.layers, both.layers, strict=True):
        assert set(total.pruned) == set(old.pruned) | {old.kept[slot] for slot in new.pruned}
        assert set(total.eligible) == set(old.eligible) | {old.kept[slot] for slot in new.eligible}
        assert (total.device_load, total.lower_bound) == (new.device_load, new.lower_bound)


def test_slots_pruned_later_are_named_by_their_first_ids():
    first = worked(placement="greedy")  # keeps 4, 0, 2, 1, 6, 5
    second = planned([np.array([[50, 1, 2, 50, 50, 50]])])
    assert second.layers[0].pruned == (1, 2)
    assert compose(first, second).layers[0].pruned == (0, 2, 3, 7)


def test_identity_composes_to_the_other_plan():
    plan = worked()
    before, after = (identity_plan(counts, expert_parallel=2, top_k=2) for counts in ((8,), (6,)))
    assert compose(before, plan) == plan
    assert compose(plan, after).kept == plan.kept
    assert compose(plan, after).rule == plan.rule  # of the plan that pruned


def test_plans_of_other_models_do_not_fit():
    plan = worked()
    with pytest.raises(UserError, match=r"second.num_experts=\(8,\) does not follow a plan that keeps \(6,\)"):
        compose(plan, plan)
    with pytest.raises(UserError, match=r"plan num_experts=\(8,\) does not fit layers of \(6,\)"):
        apply_plan_to_lineage([range(6)], plan)


def test_identity_plan_moves_no_one():
    plan = identity_plan((4, 6), expert_parallel=2, top_k=2)
    lineage = ((7, 5, 3, 1), (0, 2, 4, 6, 8, 9))
    assert apply_plan_to_lineage(lineage, plan) == lineage
    assert plan.num_experts == plan.num_experts_after == (4, 6)


@pytest.mark.parametrize("placement", ["greedy", "refined"])
def test_a_plan_may_keep_every_expert_and_place_it(placement):
    loads = [np.array([8, 7, 6, 5, 4, 0]), np.array([0.5, 0.25, 4, 1])]
    plan = chosen_plan(loads, [(), ()], rule(2, placement=placement))
    assert plan.num_experts_after == (6, 4)
    assert all(layer.pruned == layer.eligible == () for layer in plan.layers)
    assert plan.layers[0].device_load == {"greedy": (17, 13), "refined": (15, 15)}[placement]
    assert plan.layers[1].device_load == (4.25, 1.5)
    assert plan.rule == rule(2, placement=placement).choosing_none()


def test_a_layer_without_tokens_is_balanced():
    plan = chosen_plan([np.zeros(4)], [()], rule(1))
    (layer,) = plan.layers
    assert (layer.imbalance_before, layer.imbalance_after, layer.lower_bound) == (1.0, 1.0, 0.0)
    assert plan.imbalances == (1.0,)
