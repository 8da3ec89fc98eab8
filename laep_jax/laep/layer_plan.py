"""The plan of one layer: which experts stay, on which device, and how even the devices then are.

Axes: E experts, G devices.
"""

import dataclasses
import math

import numpy as np

from laep_jax.errors import require, require_divisible
from laep_jax.laep.balance import device_loads, imbalance, lower_bound
from laep_jax.laep.placement import place
from laep_jax.laep.pruning import Pruning
from laep_jax.laep.rule import PruneRule


@dataclasses.dataclass(frozen=True)
class LayerPlan:
    """One layer. Device g holds the g-th of the equal parts of `kept`.

    kept: old slots in new device order. pruned, eligible: ascending; eligible are those the rule
    chose before rounding. device_load: mean tokens an iteration, [G]. imbalance_*: max / mean of the
    devices, `before` with the survivors in their old order. lower_bound: of the largest
    device load, in tokens an iteration; see `balance.lower_bound`.
    """

    kept: tuple[int, ...]
    pruned: tuple[int, ...]
    eligible: tuple[int, ...]
    device_load: tuple[float, ...]
    imbalance_before: float
    imbalance_after: float
    lower_bound: float

    @property
    def mean_load(self) -> float:
        """Mean device load."""
        return sum(self.device_load) / len(self.device_load)

    @property
    def largest_before(self) -> float:
        """The largest device load with the survivors in their old order."""
        return self.imbalance_before * self.mean_load

    def check(self, field: str, num_experts: int, rule: PruneRule) -> None:
        """Raises `UserError` where this is no plan for a layer of `num_experts`."""
        expert_parallel, top_k = rule.expert_parallel, rule.top_k
        every = self.kept + self.pruned
        once = len(every) == num_experts and sorted(every) == list(range(num_experts))
        require(once, f"{field} kept and pruned", every, f"must be 0 to {num_experts - 1}, each once")
        for name in ("pruned", "eligible"):
            slots = getattr(self, name)
            ascending = all(a < b for a, b in zip((-1, *slots), (*slots, num_experts), strict=True))
            require(ascending, f"{field}.{name}", slots, f"must be ascending ids below {num_experts}")
        kept = len(self.kept)
        require_divisible(f"{field} kept count", kept, "expert_parallel", expert_parallel)
        require(kept >= top_k, f"{field} kept count", kept, f"must be at least {top_k=}")
        devices = len(self.device_load)
        require(devices == expert_parallel, f"{field} devices", devices, f"must be {expert_parallel=}")
        numbers = (*self.device_load, self.imbalance_before, self.imbalance_after, self.lower_bound)
        finite = all(math.isfinite(number) and number >= 0 for number in numbers)
        require(finite, f"{field} loads", numbers, "must be finite and not negative")


def make_layer_plan(loads_E: np.ndarray, iterations: int, choice: Pruning, rule: PruneRule) -> LayerPlan:
    """Places what `choice` keeps by its loads.

    loads_E: tokens of each expert, pruned ones included, in all `iterations` together.
    """
    survivors = np.setdiff1d(np.arange(len(loads_E)), choice.pruned)
    loads_E = loads_E[survivors]
    order = place(loads_E, rule.expert_parallel, rule.placement)
    after_G = device_loads(loads_E[order], rule.expert_parallel)
    return LayerPlan(
        kept=tuple(survivors[order].tolist()),
        pruned=choice.pruned,
        eligible=choice.eligible,
        device_load=tuple((after_G / iterations).tolist()),
        imbalance_before=imbalance(device_loads(loads_E, rule.expert_parallel)),
        imbalance_after=imbalance(after_G),
        lower_bound=lower_bound(loads_E, rule.expert_parallel) / iterations,
    )
