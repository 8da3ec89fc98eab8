"""The guard: a plan to prune is applied only where the model does without the pruned experts.

The validation loss is measured with these experts masked, which is exactly the pruned model (`evaluate.masked_loss`),
and with all of them: the same parameters, the same batches. A plan that costs more than `LaepConfig.guard_tolerance`
nats is made again with alpha and beta halved, `max_retries` times at most; after that the run prunes no more. Extends
the paper, which prunes once. docs/reliability.md says why the loss some steps after a prune would tell less.
"""

import dataclasses
import math

from laep_jax.config import LaepConfig
from laep_jax.laep.rule import alpha_per_layer

SOFTER = 0.5  # what alpha and beta are multiplied with


def rise(before: float, after: float) -> float:
    """By how much a loss went up: inf where only `after` is not finite, nan (above no tolerance) where `before` is not.

    >>> rise(2.0, 2.5), rise(2.0, math.nan), rise(math.nan, 2.5)
    (0.5, inf, nan)
    """
    if not math.isfinite(before):
        return math.nan
    return after - before if math.isfinite(after) else math.inf


def softened(laep: LaepConfig, retries: int, num_layers: int) -> LaepConfig:
    """The rule after that many plans were refused; it has max_prunes=0 where there is nothing left to try.

    `alpha = inf` has nothing to halve, there beta alone is. A plan from a file, or for a number of experts, is
    not tried again: it would be the same.
    """
    if not retries:
        return laep
    if laep.plan or laep.target_experts or laep.max_experts or retries > laep.max_retries:
        return dataclasses.replace(laep, max_prunes=0)
    factor, alpha = SOFTER**retries, laep.alpha
    if alpha != "inf":
        alpha = tuple(factor * bound for bound in alpha_per_layer(alpha, num_layers))
    return dataclasses.replace(laep, alpha=alpha, beta=factor * laep.beta)
