"""Domains that are spared, a number of experts to keep, bounds of a layer's width."""

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from laep_jax.errors import NoPlanError, UserError
from laep_jax.laep.budget import choose, reach_target
from laep_jax.laep.plan import Plan, make_plan
from laep_jax.laep.rule import PruneRule

RULE = PruneRule(1, 1, (math.inf,) * 2, 0.3, "mean", "le", "none", "refined")


def rule(**changes) -> PruneRule:
    return dataclasses.replace(RULE, **changes)


@st.composite
def domains(draw) -> dict[str, np.ndarray]:
    """Tokens [N, L, E] of up to four domains in two layers."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    shape = draw(st.integers(1, 3)), 2, draw(st.integers(4, 24))
    skew = draw(st.sampled_from([0.3, 1.5]))
    names = "abcd"[: draw(st.integers(1, 4))]
    return {name: rng.poisson(rng.lognormal(3, skew, shape)) + 1 for name in names}


def planned(by_domain, chosen: PruneRule, **settings) -> Plan:
    totals = {name: list(tokens_NLE.sum(0)) for name, tokens_NLE in by_domain.items()}
    return make_plan(np.concatenate([*by_domain.values()]), chosen, domains=totals, **settings)


@settings(max_examples=80, deadline=None)
@given(
    domains(),
    st.sampled_from([0.0, 0.02, 0.1, 0.3, 1.0]),
    st.sampled_from(["vote", "mean"]),
    st.sampled_from(["keep_more", "prune", "none"]),
    st.sampled_from([1, 2, 4]),
)
def test_the_pruned_have_at_most_the_bound_of_every_domain(by_domain, bound, estimator, rounding, devices):
    settings = {"domain_beta": bound, "estimator": estimator, "rounding": rounding, "expert_parallel": devices}
    plan = planned(by_domain, rule(beta=0.5, **settings))
    for name, tokens_NLE in by_domain.items():
        for layer, of in enumerate(plan.layers):
            tokens_E = tokens_NLE[:, layer].sum(0)
            assert tokens_E[list(of.pruned)].sum() <= bound * tokens_E.sum() * (1 + 1e-12)
            assert of.domain_shares[name] == pytest.approx(tokens_E[list(of.pruned)].sum() / tokens_E.sum())


@settings(max_examples=40, deadline=None)
@given(domains(), st.sampled_from([0.05, 0.2]))
def test_one_domain_with_the_bound_of_all_changes_nothing(by_domain, beta):
    [name, *_] = by_domain
    alone = {name: by_domain[name]}
    plain, spared = (planned(alone, rule(beta=beta, domain_beta=bound)) for bound in (None, beta))
    assert plain.kept == spared.kept


def test_an_expert_that_one_domain_needs_stays_and_others_go_in_its_place():
    code, prose = np.array([[40, 2, 3, 55], [25] * 4]), np.array([[4, 5, 0, 1], [25] * 4])
    tokens = {"code": code[None], "prose": prose[None]}
    assert planned(tokens, rule(beta=0.1)).layers[0].pruned == (1, 2)  # 3 and 7 of 110
    spared = planned(tokens, rule(beta=0.1, domain_beta=0.2)).layers[0]
    assert spared.pruned == (2,)  # expert 1 has half of the prose
    assert spared.domain_shares == {"code": 0.03, "prose": 0.0}


@settings(max_examples=60, deadline=None)
@given(domains(), st.sampled_from([0.3, 0.6, 0.75, 0.9, 17, 9]), st.sampled_from(["vote", "mean"]))
def test_a_target_is_met_with_the_smallest_beta(by_domain, target, estimator):
    counts = list(np.moveaxis(np.concatenate([*by_domain.values()]), 1, 0))
    total = sum(tokens_NE.shape[1] for tokens_NE in counts)
    most = target * total if target < 1 else target
    assume(most >= 2)  # one of each layer
    found = reach_target(counts, rule(estimator=estimator), target, {})

    def kept(beta):
        trial = dataclasses.replace(found, beta=beta)
        return total - sum(len(choice.pruned) for choice in choose(counts, trial, {}))

    assert kept(found.beta) <= most
    if found.beta > 0:
        assert kept(found.beta - 1e-6) > most
    if estimator == "mean" and found.beta > 0:  # experts go one by one, but for those of equal shares
        assert kept(found.beta) > most - 3


def test_a_target_that_alpha_or_a_domain_forbids_is_refused():
    tokens = {"a": np.array([[[10, 10, 10, 1]] * 2]), "b": np.array([[[1, 1, 1, 30]] * 2])}
    with pytest.raises(NoPlanError, match=r"target_experts=0.5 is below 8 of 8 experts, which alpha"):
        planned(tokens, rule(alpha=(0.1, 0.1)), target=0.5)
    with pytest.raises(NoPlanError, match="target_experts=2 is below 6 of 8 experts"):
        planned(tokens, rule(domain_beta=0.35), target=2)
    assert planned(tokens, rule(), target=2).num_experts_after == (1, 1)


@settings(max_examples=60, deadline=None)
@given(domains(), st.integers(1, 24), st.integers(1, 24), st.sampled_from(["keep_more", "none"]))
def test_layers_are_as_wide_as_their_bounds_say(by_domain, least, most, rounding):
    assume(least <= most - most % 2)
    chosen = rule(min_experts=least, max_experts=most, rounding=rounding, expert_parallel=2, beta=0.2)
    try:
        plan = planned(by_domain, chosen)
    except UserError:
        assert chosen.min_kept > chosen.most_kept(2**31)
        return
    [experts] = {*plan.num_experts}
    for layer, of in enumerate(plan.layers):
        assert min(least, experts) <= len(of.kept) <= max(most, 0)
        tokens_E = sum(tokens_NLE[:, layer].sum(0) for tokens_NLE in by_domain.values())
        if of.pruned:  # the lightest go
            assert tokens_E[list(of.pruned)].max() <= tokens_E[list(of.kept)].min()


def test_bounds_that_contradict_each_other_are_refused():
    with pytest.raises(UserError, match="max_experts=4 contradicts min_experts=6, top_k=1, expert_parallel=1"):
        rule(min_experts=6, max_experts=4)
    with pytest.raises(UserError, match="max_experts=7 contradicts min_experts=None, top_k=1, expert_parallel=8"):
        rule(max_experts=7, expert_parallel=8, rounding="keep_more")
    tokens = {"a": np.array([[[10, 10, 10, 1]] * 2]), "b": np.array([[[1, 1, 1, 30]] * 2])}
    with pytest.raises(
        NoPlanError, match=r"max_experts=2 contradicts domain_beta=0\.1: of layer 0, 0 of 4 experts may go"
    ):
        planned(tokens, rule(max_experts=2, domain_beta=0.1))
