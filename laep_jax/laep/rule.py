"""Every setting of making a plan, once: what Algorithms 1 and 2 need beside the counts (paper sections 3.2, 3.3).

The settings that a user chooses, SETTINGS, have the names, defaults, meanings and choices that `LaepConfig` states.
"""

import argparse
import dataclasses
from collections.abc import Sequence

from laep_jax.config import LaepConfig
from laep_jax.errors import require, require_type
from laep_jax.fields import settings_of
from laep_jax.laep.slots import max_replica_slots

END_ALPHA, MIDDLE_ALPHA = 0.2, 0.4  # of alpha="hybrid", paper section 4.2


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
class PruneRule:
    """The settings of a plan. `UserError` on a value out of range.

    alpha: per layer. estimator: `vote` decides in every iteration and counts marks, `mean` decides
    once on the average loads. rounding: where the survivors do not divide by `expert_parallel`,
    `keep_more` keeps more; `prune` keeps fewer if enough others were eligible in some iteration; `none` leaves them.
    min_experts, max_experts: bounds of how many a layer keeps. domain_beta: bound like beta, for each domain by itself,
    where counts by domain are given. Never fewer than max(top_k, expert_parallel) stay.
    """

    expert_parallel: int
    top_k: int
    alpha: tuple[float, ...]
    beta: float
    estimator: str
    inequality: str
    rounding: str
    placement: str
    domain_beta: float | None = None
    min_experts: int | None = None
    max_experts: int | None = None

    def __post_init__(self):
        alpha_per_layer(self.alpha, len(self.alpha))
        for name in ("top_k", "expert_parallel"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "must be at least 1")
        for field in dataclasses.fields(self):
            if field.name in SETTINGS and field.name != "alpha":
                value = getattr(self, field.name)
                require_type(field.name, value, field.type)
                settings_of(LaepConfig)[field.name].check(field.name, value)
        if self.max_experts is not None:
            least = f"min_experts={self.min_experts}, top_k={self.top_k}, expert_parallel={self.expert_parallel}"
            require(self.most_kept(2**31) >= self.min_kept, "max_experts", self.max_experts, f"contradicts {least}")

    @classmethod
    def from_settings(
        cls, settings: LaepConfig | argparse.Namespace, num_layers: int, *, top_k: int, expert_parallel: int
    ) -> "PruneRule":
        """The rule of a config, or of the arguments of `laep-jax plan`, for a model."""
        values = {name: getattr(settings, name) for name in SETTINGS}
        values |= {"alpha": alpha_per_layer(settings.alpha, num_layers), "beta": float(settings.beta)}
        return cls(expert_parallel, top_k, **values)

    def choosing_none(self) -> "PruneRule":
        """The same, but no expert is ever eligible: not even a load of 0 is below a bound of 0."""
        return dataclasses.replace(self, alpha=(0.0,) * len(self.alpha), beta=0.0, inequality="lt")

    @property
    def min_kept(self) -> int:
        """Experts that stay at least: max(top_k, expert_parallel, min_experts), rounded."""
        return self.round_up(max(self.top_k, self.expert_parallel, self.min_experts or 0))

    def most_kept(self, num_experts: int) -> int:
        """Experts of a layer of so many that may stay."""
        if self.max_experts is None or num_experts <= self.max_experts:
            return num_experts
        return self.max_experts - (self.max_experts % self.expert_parallel if self.rounding != "none" else 0)

    def max_replica_slots(self, num_experts: Sequence[int]) -> int:
        """Of a device, such that any plan for these layers has enough experts for them; 0 of one device."""
        return max_replica_slots(min(self.min_kept, *num_experts), self.expert_parallel)

    def round_up(self, num_experts: int) -> int:
        """The next multiple of `expert_parallel`; the number itself where nothing is rounded."""
        if self.rounding == "none":
            return num_experts
        return -(-num_experts // self.expert_parallel) * self.expert_parallel

    def check_model(self, num_experts: Sequence[int]) -> None:
        """Raises `UserError` where the rule is for another number of layers, or one has too few experts."""
        layers = len(num_experts)
        require(len(self.alpha) == layers, "entries of alpha", len(self.alpha), f"must be num_layers={layers}")
        for layer, count in enumerate(num_experts):
            for name in ("top_k", "expert_parallel"):
                least = getattr(self, name)
                require(count >= least, f"num_experts[{layer}]", count, f"is below {name}={least}")


SETTINGS = tuple(field.name for field in dataclasses.fields(PruneRule) if field.name in settings_of(LaepConfig))
