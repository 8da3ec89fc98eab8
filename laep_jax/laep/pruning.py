"""Algorithm 1, expert pruning (paper section 3.2): which experts of a layer carry too few tokens.

The printed algorithm is read as follows. Its names: ETN -> `tokens_NE`, Marker -> `votes_E`,
Expdis -> `num_chosen`, iter -> the axis N.

* Experts are sorted by (load, index). One is eligible while the running sum is at most
  beta * C (equation 3) and its own load at most alpha * C / E (equation 2), C being the layer's
  tokens. The print has `<` in the algorithm and `<=` in the equations: `inequality` is either.
* The running sum starts at zero for every iteration and layer; the print never resets it.
* Marks belong to experts, not to ranks: the print's `Marker[layer, expert]` would prune a heavily
  used expert with a low index.
* The number to prune is the mean number marked over the iterations, rounded down; the print never
  divides its sum.
* An iteration in which the layer got no tokens says nothing about its experts: it marks none (0 <= 0 would
  mark all) and does not count in that mean.
* The kept experts must split evenly over the expert-parallel devices, which the paper does not say.

All comparisons are between integers, so multiplying every count by an integer changes nothing.

Axes: N iterations, L layers, E experts.
"""

import dataclasses
import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from laep_jax.config_parts import ESTIMATORS, INEQUALITIES, ROUNDINGS
from laep_jax.errors import require
from laep_jax.laep.load import num_with_tokens

END_ALPHA, MIDDLE_ALPHA = 0.2, 0.4  # of alpha="hybrid", paper Table 5


def alpha_per_layer(alpha: float | str | Sequence[float | str], num_layers: int) -> tuple[float, ...]:
    """One individual bound a layer, in units of the layer's mean load; `math.inf` is no bound.

    alpha: a number, "inf", "hybrid" (0.2 in the first and last `num_layers // 6` layers, 0.4 between)
    or one number a layer. `UserError` on anything else.

    >>> alpha_per_layer("hybrid", 6)
    (0.2, 0.4, 0.4, 0.4, 0.4, 0.2)
    """
    if isinstance(alpha, str) and alpha == "hybrid":
        ends = num_layers // 6
        return (END_ALPHA,) * ends + (MIDDLE_ALPHA,) * (num_layers - 2 * ends) + (END_ALPHA,) * ends
    if isinstance(alpha, str):
        require(alpha == "inf", "alpha", alpha, "must be a number, inf, hybrid or one number a layer")
    values = (alpha,) * num_layers if isinstance(alpha, (str, int, float)) else tuple(alpha)
    require(len(values) == num_layers, "alpha", values, f"needs one entry for each of {num_layers} layers")
    numbers = tuple(float(value) for value in values)
    require(all(number >= 0 for number in numbers), "alpha", alpha, "must not be negative or NaN")
    return numbers


@dataclasses.dataclass(frozen=True)
class PruningRule:
    """Everything Algorithm 1 needs beside the counts. `UserError` on a value out of range.

    alpha: per layer. estimator: `vote` decides in every iteration and counts marks, `mean` decides
    once on the average loads. rounding: where the kept experts do not divide by `expert_parallel`,
    `restore` keeps more; `prune` keeps fewer if enough others were eligible in some iteration. Never
    fewer than max(top_k, expert_parallel) are kept.
    """

    alpha: tuple[float, ...]
    beta: float
    estimator: str
    inequality: str
    rounding: str
    top_k: int
    expert_parallel: int

    def __post_init__(self):
        alpha_per_layer(self.alpha, len(self.alpha))
        require(0 <= self.beta <= 1, "beta", self.beta, "must lie between 0 and 1")
        require(self.top_k >= 1, "top_k", self.top_k, "must be at least 1")
        require(self.expert_parallel >= 1, "expert_parallel", self.expert_parallel, "must be at least 1")
        for field, allowed in (("estimator", ESTIMATORS), ("inequality", INEQUALITIES), ("rounding", ROUNDINGS)):
            value = getattr(self, field)
            require(value in allowed, field, value, f"must be one of {', '.join(allowed)}")

    @property
    def min_kept(self) -> int:
        """Experts that stay at least: max(top_k, expert_parallel), rounded up to a multiple of the latter."""
        return _round_up(max(self.top_k, self.expert_parallel), self.expert_parallel)

    def check_experts(self, num_experts: int, layer: int) -> None:
        """Raises `UserError` where a layer of `num_experts` cannot be split or routed."""
        field = f"num_experts[{layer}]"
        require(
            num_experts % self.expert_parallel == 0,
            field,
            num_experts,
            f"is not divisible by expert_parallel={self.expert_parallel}",
        )
        require(num_experts >= self.top_k, field, num_experts, f"is below top_k={self.top_k}")


@dataclasses.dataclass(frozen=True)
class Pruning:
    """The experts to prune from one layer, as ascending ids: chosen by the rule, and after rounding."""

    eligible: tuple[int, ...]
    pruned: tuple[int, ...]


def eligible_experts(tokens: np.ndarray, alpha: float, beta: float, inequality: str) -> np.ndarray:
    """Which experts equations 2 and 3 allow to prune.

    tokens: integers [..., E]; every row is checked separately, and one without tokens allows none. Returns booleans of
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


def prune_layer(tokens_NE: np.ndarray, rule: PruningRule, layer: int) -> Pruning:
    """Algorithm 1 on one layer.

    tokens_NE: non-negative int64 counts. Returns the ids chosen by the rule and those that go once
    the kept count is made a multiple of `rule.expert_parallel`; none of either where there are no tokens.
    `UserError` where the experts do not divide by it or are fewer than `rule.top_k`.
    """
    rule.check_experts(tokens_NE.shape[1], layer)
    totals_E = tokens_NE.sum(axis=0)
    judged_NE = tokens_NE if rule.estimator == "vote" else totals_E[None]
    marks_NE = eligible_experts(judged_NE, rule.alpha[layer], rule.beta, rule.inequality)
    votes_E = marks_NE.sum(axis=0)
    num_chosen = int(marks_NE.sum()) // max(num_with_tokens(judged_NE), 1)
    order = np.lexsort((totals_E, -votes_E))  # stable: ties go by index
    pruned = _round(order, num_chosen, int(np.count_nonzero(votes_E)), totals_E, rule)
    return Pruning(_ascending(order[:num_chosen]), _ascending(pruned))


def _round(order: np.ndarray, num_chosen: int, num_marked: int, totals_E: np.ndarray, rule: PruningRule) -> np.ndarray:
    """The ids to prune, so that the rest is a multiple of the devices and never too small.

    order: ids, first to go first; the first `num_marked` were eligible in some iteration. `prune` goes
    on among these; where they are too few it does as `restore`, which puts back the heaviest.
    """
    num_experts, devices = len(order), rule.expert_parallel
    if rule.rounding == "prune":
        num_pruned = _round_up(num_chosen, devices)
        if num_pruned <= min(num_marked, num_experts - rule.min_kept):
            return order[:num_pruned]
    num_kept = max(_round_up(num_experts - num_chosen, devices), rule.min_kept)
    chosen = np.sort(order[:num_chosen])
    lightest_first = chosen[np.argsort(totals_E[chosen], kind="stable")]
    return lightest_first[: num_experts - num_kept]


def _round_up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


def _ascending(ids: np.ndarray) -> tuple[int, ...]:
    return tuple(np.sort(ids).tolist())
