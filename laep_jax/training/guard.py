"""The guard: a prune after which the held-out loss does not come back is undone and tried again, more softly.

The loss is measured before the cut, right after it, and `LaepConfig.guard_steps` later; the last must be no more than
`guard_tolerance` above the first. Where it is, the run goes on from the state before the cut, with alpha and beta
halved each time, and after `max_retries` of them without any more prunes. Extends the paper, which cuts once.
"""

import dataclasses
from typing import NamedTuple

from laep_jax.config import LaepConfig
from laep_jax.laep.pruning import alpha_per_layer

SOFTER = 0.5  # what alpha and beta are multiplied with


class Guard(NamedTuple):
    """A prune after `cut_step` that is checked after step `due`.

    loss_before, num_experts: validation loss and experts per layer of the model before it.
    """

    cut_step: int
    due: int
    loss_before: float
    num_experts: tuple[int, ...]


def softened(laep: LaepConfig, retries: int, num_layers: int) -> LaepConfig:
    """The rule after that many prunes were undone.

    `alpha = inf` has nothing to halve, there beta alone is; a plan from a file is not tried again.
    """
    if not retries:
        return laep
    if laep.plan or retries > laep.max_retries:
        return dataclasses.replace(laep, max_prunes=0)
    factor, alpha = SOFTER**retries, laep.alpha
    if alpha != "inf":
        alpha = tuple(factor * bound for bound in alpha_per_layer(alpha, num_layers))
    return dataclasses.replace(laep, alpha=alpha, beta=factor * laep.beta)
