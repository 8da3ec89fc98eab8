"""The plan of one layer: which experts stay, on which device, and how even the devices then are.

Axes: E experts, G devices.
"""

import dataclasses
import itertools
import math

import numpy as np

from laep_jax.errors import require
from laep_jax.laep.balance import device_loads, imbalance, lower_bound
from laep_jax.laep.placement import place
from laep_jax.laep.pruning import Pruning
from laep_jax.laep.rule import PruneRule
from laep_jax.laep.slots import EMPTY, place_in_slots


@dataclasses.dataclass(frozen=True)
class LayerPlan:
    """One layer. Device g holds the g-th of the parts of `kept`; see `balance` for their sizes.

    kept: old slots in new device order. pruned, eligible: ascending; eligible are those the rule
    chose before rounding. device_load: mean tokens an iteration, [G]. imbalance_*: max / mean of the
    devices, `before` with the survivors in their old order. lower_bound: of the largest
    device load, in tokens an iteration; see `balance.lower_bound`. With replica slots: slots, for each device the old
    slots of the experts in its own, -1 for an empty one; shares, of their tokens, of the same shape; slot_load, as
    device_load with these. domain_shares: share of each domain's tokens that the pruned experts have, where known.
    """

    kept: tuple[int, ...]
    pruned: tuple[int, ...]
    eligible: tuple[int, ...]
    device_load: tuple[float, ...]
    imbalance_before: float
    imbalance_after: float
    lower_bound: float
    slots: tuple[tuple[int, ...], ...] = ()
    shares: tuple[tuple[float, ...], ...] = ()
    slot_load: tuple[float, ...] = ()
    domain_shares: dict[str, float] = dataclasses.field(default_factory=dict)

    @property
    def mean_load(self) -> float:
        """Mean device load."""
        return sum(self.device_load) / len(self.device_load)

    @property
    def largest_before(self) -> float:
        """The largest device load with the survivors in their old order."""
        return self.imbalance_before * self.mean_load

    @property
    def replica_slots(self) -> int:
        """Of each device."""
        return len(self.slots[0]) - -(-len(self.kept) // len(self.slots)) if self.slots else 0

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
        require(kept >= top_k, f"{field} kept count", kept, f"must be at least {top_k=}")
        require(kept >= expert_parallel, f"{field} kept count", kept, f"must be at least {expert_parallel=}")
        devices = len(self.device_load)
        require(devices == expert_parallel, f"{field} devices", devices, f"must be {expert_parallel=}")
        numbers = (
            *self.device_load,
            self.imbalance_before,
            self.imbalance_after,
            self.lower_bound,
            *self.slot_load,
            *itertools.chain(*self.shares),
        )
        finite = all(math.isfinite(number) and number >= 0 for number in numbers)
        require(finite, f"{field} loads", numbers, "must be finite and not negative")
        shares = self.domain_shares.values()
        require(
            all(0 <= share <= 1 for share in shares), f"{field}.domain_shares", [*shares], "must lie between 0 and 1"
        )
        if self.slots or self.shares or self.slot_load:
            self._check_slots(field)

    def _check_slots(self, field: str) -> None:
        """That every kept expert has slots, on different devices, and that its shares add up to one."""
        shapes = [[len(row) for row in rows] for rows in (self.slots, self.shares)]
        fits = shapes[0] == shapes[1] and len({*shapes[0]}) == 1 and len(shapes[0]) == len(self.slot_load)
        require(
            fits and len(self.slot_load) == len(self.device_load),
            f"{field} slots and shares",
            shapes,
            f"must be of one shape, for {len(self.device_load)} devices",
        )
        total = dict.fromkeys(self.kept, 0.0)
        for slots, shares in zip(self.slots, self.shares, strict=True):
            used = [slot for slot in slots if slot != EMPTY]
            require(len({*used}) == len(used), f"{field}.slots", slots, "has an expert twice on one device")
            for slot, share in zip(slots, shares, strict=True):
                known = slot in total or (slot == EMPTY and share == 0)
                require(known, f"{field}.slots", slot, f"is no kept expert, nor {EMPTY} with a share of 0")
                if slot != EMPTY:
                    total[slot] += share
        wrong = [slot for slot, share in total.items() if not math.isclose(share, 1, abs_tol=1e-6)]
        require(not wrong, f"{field}.shares of experts", wrong, "do not add up to 1")
        same = math.isclose(sum(self.slot_load), sum(self.device_load), rel_tol=1e-6)
        require(same, f"{field}.slot_load", self.slot_load, f"must add up to that of {self.device_load}")


def make_layer_plan(
    loads_E: np.ndarray, iterations: int, choice: Pruning, rule: PruneRule, replica_slots: int = 0
) -> LayerPlan:
    """Places what `choice` keeps by its loads.

    loads_E: tokens of each expert, pruned ones included, in all `iterations` together. replica_slots: of each device.
    """
    survivors = np.setdiff1d(np.arange(len(loads_E)), choice.pruned)
    loads_E = loads_E[survivors]
    order = place(loads_E, rule.expert_parallel, rule.placement)
    after_G = device_loads(loads_E[order], rule.expert_parallel)
    layer = LayerPlan(
        kept=tuple(survivors[order].tolist()),
        pruned=choice.pruned,
        eligible=choice.eligible,
        device_load=tuple((after_G / iterations).tolist()),
        imbalance_before=imbalance(device_loads(loads_E, rule.expert_parallel)),
        imbalance_after=imbalance(after_G),
        lower_bound=lower_bound(loads_E, rule.expert_parallel) / iterations,
    )
    if not replica_slots:
        return layer
    slot_map = place_in_slots(loads_E, rule.expert_parallel, replica_slots)
    return dataclasses.replace(
        layer,
        slots=tuple(map(tuple, slot_map.renamed(survivors).slots_PS.tolist())),
        shares=tuple(map(tuple, slot_map.shares_PS.tolist())),
        slot_load=tuple((slot_map.device_loads(loads_E) / iterations).tolist()),
    )
