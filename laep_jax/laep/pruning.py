"""Algorithm 1, expert pruning (paper section 3.2): which experts of a layer carry too few tokens.

The printed algorithm is read as follows. Its names: ETN -> `tokens_NE`, Marker -> `votes_E`,
Expdis -> `num_chosen`, iter -> the axis N.

* Experts are sorted by (load, index). One is eligible while the running sum is at most
  beta * C (equation 3) and its own load at most alpha * C / E (equation 2), C being the layer's
  tokens. The print has `<` in the algorithm and `<=` in the equations: `inequality` is either.
* The running sum starts anew for every iteration and layer; the print never resets it.
* Marks belong to experts, not to ranks: the print's `Marker[layer, expert]` would prune a heavily
  used expert with a low index.
* The number to prune is the mean number marked over the iterations, rounded down; the print never
  divides its sum.
* An iteration in which the layer got no tokens says nothing about its experts: it marks none (0 <= 0 would
  mark all) and does not count in that mean.
* The paper's survivors split evenly over the expert-parallel devices, without a word how; `rounding` says how here.

All comparisons are between integers, so multiplying every count by an integer changes nothing.

Axes: N iterations, L layers, E experts.
"""

import dataclasses
import math
from fractions import Fraction

import numpy as np

from laep_jax.errors import NoPlanError
from laep_jax.laep.load import num_with_tokens
from laep_jax.laep.rule import PruneRule


@dataclasses.dataclass(frozen=True)
class Pruning:
    """What goes from one layer, as ascending expert ids: chosen by the rule, and after rounding."""

    eligible: tuple[int, ...]
    pruned: tuple[int, ...]


def eligible_experts(tokens: np.ndarray, alpha: float, beta: float, inequality: str) -> np.ndarray:
    """Which experts equations 2 and 3 allow to prune.

    tokens: integers [..., E]; every row is judged by itself, and one without tokens allows none. Returns booleans of
    the same shape.

    >>> eligible_experts(np.array([40, 1, 30, 2, 27]), alpha=0.4, beta=0.1, inequality="le").tolist()
    [False, True, False, True, False]
    """
    bits = (tokens.shape[-1] - 1).bit_length()
    assert tokens.max() < 2 ** (62 - bits), tokens.max()
    # load and expert in one number: NumPy sorts those several times faster than it sorts indices by load
    ascending = np.sort(tokens.astype(np.int64) << bits | np.arange(tokens.shape[-1]), axis=-1)
    loads, order = ascending >> bits, ascending & (2**bits - 1)
    total = tokens.sum(axis=-1, keepdims=True)
    fits = (total > 0) & (loads.cumsum(axis=-1) <= _most_allowed(total, _exact(beta), inequality))
    if not math.isinf(alpha):
        fits &= loads <= _most_allowed(total, _exact(alpha) / tokens.shape[-1], inequality)
    eligible = np.empty_like(fits)
    np.put_along_axis(eligible, order, fits, axis=-1)
    return eligible


def _exact(value: float) -> Fraction:
    """The decimal that was written: 0.1 is one tenth."""
    return Fraction(str(float(value)))


def _most_allowed(total: np.ndarray, share: Fraction, inequality: str) -> np.ndarray:
    """The largest integers that are `<=` or `<` share * total; at most total, so that int64 holds them."""
    p, q = share.numerator, share.denominator
    if inequality == "le":
        bounds = [min(p * c // q, c) for c in total.ravel().tolist()]
    else:
        bounds = [min(-(-p * c // q) - 1, c) for c in total.ravel().tolist()]
    return np.array(bounds, np.int64).reshape(total.shape)


def prune_layer(tokens_NE: np.ndarray, rule: PruneRule, layer: int, domains_ME: np.ndarray | None = None) -> Pruning:
    """Algorithm 1 on one layer.

    tokens_NE: non-negative int64 counts of a model that `rule.check_model` accepts. domains_ME: the tokens of each
    domain, for `rule.domain_beta`. Returns the ids chosen by the rule and those that go once the kept count is rounded;
    none of either where there are no tokens. `UserError` where too few may go for `rule.max_experts`.
    """
    totals_E = tokens_NE.sum(axis=0)
    judged_NE = tokens_NE if rule.estimator == "vote" else totals_E[None]
    marks_NE = eligible_experts(judged_NE, rule.alpha[layer], rule.beta, rule.inequality)
    votes_E = marks_NE.sum(axis=0)
    num_chosen = int(marks_NE.sum()) // max(num_with_tokens(judged_NE), 1)
    num_marked = int(np.count_nonzero(votes_E))
    order = np.lexsort((totals_E, -votes_E))  # stable: ties go by index
    if rule.domain_beta is not None and domains_ME is not None:
        spared_E = _spared(np.argsort(totals_E, kind="stable"), domains_ME, rule)
        num_chosen, num_marked = (int(np.count_nonzero(~spared_E[order[:count]])) for count in (num_chosen, num_marked))
        order = order[np.argsort(spared_E[order], kind="stable")]
        _require_enough(int(np.count_nonzero(~spared_E)), rule, layer, len(order))
    pruned = _round(order, num_chosen, num_marked, totals_E, rule)
    return Pruning(_ascending(order[:num_chosen]), _ascending(pruned))


def _spared(order: np.ndarray, domains_ME: np.ndarray, rule: PruneRule) -> np.ndarray:
    """Booleans [E]: which experts must stay. All others together have no more of any domain than they may.

    order: who is asked first. It is that of the loads, so that the answer is the same for every beta.
    """
    assert rule.domain_beta is not None
    total_M1 = domains_ME.sum(axis=1, keepdims=True)
    most_M = _most_allowed(total_M1, _exact(rule.domain_beta), "le")[:, 0]
    spared_E, gone_M = np.zeros(domains_ME.shape[1], bool), np.zeros(len(domains_ME), np.int64)
    for expert in order:
        spared_E[expert] = (gone_M + domains_ME[:, expert] > most_M).any()
        gone_M += 0 if spared_E[expert] else domains_ME[:, expert]
    return spared_E


def _require_enough(num_candidates: int, rule: PruneRule, layer: int, num_experts: int) -> None:
    least = num_experts - rule.most_kept(num_experts)
    if num_candidates < least:
        why = f"domain_beta={rule.domain_beta}: of layer {layer}, {num_candidates} of {num_experts} experts may go"
        raise NoPlanError(f"max_experts={rule.max_experts} contradicts {why}")


def _round(order: np.ndarray, num_chosen: int, num_marked: int, totals_E: np.ndarray, rule: PruneRule) -> np.ndarray:
    """The ids to prune, so that the rest is rounded, never too small and never too large.

    order: ids, first to go first; the first `num_marked` were eligible in some iteration. `prune` goes
    on among these; where they are too few it does as `keep_more`, which puts back the heaviest.
    """
    num_experts = len(order)
    if num_experts - num_chosen > rule.most_kept(num_experts):
        return order[: num_experts - rule.most_kept(num_experts)]
    if rule.rounding == "prune":
        num_pruned = num_chosen + (num_experts - num_chosen) % rule.expert_parallel
        if num_pruned <= min(num_marked, num_experts - rule.min_kept):
            return order[:num_pruned]
    num_kept = min(max(rule.round_up(num_experts - num_chosen), rule.min_kept), num_experts)
    chosen = np.sort(order[:num_chosen])
    lightest_first = chosen[np.argsort(totals_E[chosen], kind="stable")]
    return lightest_first[: num_experts - num_kept]


def _ascending(ids: np.ndarray) -> tuple[int, ...]:
    return tuple(np.sort(ids).tolist())
