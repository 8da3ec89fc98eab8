"""Which experts go from all layers together: with the tokens of each domain, and for a number of experts to keep.

Axes: N iterations, L layers, E experts of a layer, M domains.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from laep_jax.errors import NoPlanError
from laep_jax.laep.pruning import Pruning, prune_layer
from laep_jax.laep.rule import PruneRule

Domains = Mapping[str, Sequence[np.ndarray]]  # tokens of each domain by its name, [E] of each layer
STEPS = 10**6  # beta is found to one part in so many


def choose(counts: Sequence[np.ndarray], rule: PruneRule, domains: Domains) -> list[Pruning]:
    """Algorithm 1 on every layer. counts: [N, E] of each layer."""
    by_layer = [np.stack(tokens) for tokens in zip(*domains.values(), strict=True)] or [None] * len(counts)
    parts = zip(counts, by_layer, strict=True)
    return [prune_layer(tokens_NE, rule, layer, domains_ME) for layer, (tokens_NE, domains_ME) in enumerate(parts)]


def reach_target(counts: Sequence[np.ndarray], rule: PruneRule, target: float, domains: Domains) -> PruneRule:
    """The rule with the smallest beta that keeps at most `target` experts of all layers together.

    target: below 1 a fraction of them. `NoPlanError` where no beta is enough, since alpha or other bounds keep more.
    """
    total = sum(tokens_NE.shape[1] for tokens_NE in counts)
    most = target * total if target < 1 else target

    def kept(step: int) -> int:
        trial = dataclasses.replace(rule, beta=step / STEPS)
        return total - sum(len(choice.pruned) for choice in choose(counts, trial, domains))

    least = kept(STEPS)
    if least > most:
        why = f"{least:,} of {total:,} experts, which alpha and the other bounds keep at least"
        raise NoPlanError(f"target_experts={target:g} is below {why}")
    low, high = -1, STEPS
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if kept(middle) <= most else (middle, high)
    return dataclasses.replace(rule, beta=high / STEPS)
