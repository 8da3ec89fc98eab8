"""The guard: a prune after which the validation loss does not come back is undone and tried again, more softly.

Two comparisons of like with like must agree before a prune is undone. The rise at the cut is exact: the same parameters
and batches with and without the pruned experts. Training then takes most of it back, so that `LaepConfig.guard_steps`
later the loss is compared with what it would be without the prune: the loss before the cut, carried on along the trend
of the training losses. The loss before the cut alone would hide any harm early in a run, where the loss falls anyway;
the trend alone errs there, but the rise bounds what a prune can have done. The harm is the smaller of the two.

Where it is above `guard_tolerance`, the run resumes from the state before the cut, with alpha and beta halved each
time, and after `max_retries` of them without any more prunes. Extends the paper, which cuts once.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from laep_jax.config import LaepConfig
from laep_jax.laep.pruning import alpha_per_layer

SOFTER = 0.5  # what alpha and beta are multiplied with


class Guard(NamedTuple):
    """A prune after `cut_step` that is checked after step `due`.

    Losses in nats: validation loss right before and after the cut, and the one expected at `due` without it.
    num_experts: per layer, of the model before the cut.
    """

    cut_step: int
    due: int
    loss_before: float
    loss_after: float
    expected: float
    num_experts: tuple[int, ...]

    def harm(self, loss: float) -> float:
        """What the prune cost, in nats, by the validation loss at `due`; nan where that cannot be told."""
        return min(rise(self.loss_before, self.loss_after), rise(self.expected, loss))


def rise(before: float, after: float) -> float:
    """By how much a loss went up: inf where only `after` is not finite, nan (above no tolerance) where `before` is not.

    >>> rise(2.0, 2.5), rise(2.0, math.nan), rise(math.nan, 2.5)
    (0.5, inf, nan)
    """
    if not math.isfinite(before):
        return math.nan
    return after - before if math.isfinite(after) else math.inf


def expected_change(losses: Sequence[float], step: int, steps: int) -> float:
    """Change of the loss over the next `steps` steps, in nats, by the trend of the training losses up to `step`.

    Learning curves are nearly straight over the logarithm of the step. The slope is the median over all pairs of losses
    (Theil and Sen), which spikes do not move; 0 without two losses.

    >>> round(expected_change([5 - math.log(step) for step in range(50, 101)], 100, 50) + math.log(1.5), 12)
    0.0
    """
    if len(losses) < 2:
        return 0.0
    log_N = np.log(np.arange(step - len(losses) + 1, step + 1))
    first, second = np.triu_indices(len(losses), 1)
    slopes = np.diff(np.asarray(losses)[[first, second]], axis=0) / np.diff(log_N[[first, second]], axis=0)
    return float(np.median(slopes)) * math.log((step + steps) / step)


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
