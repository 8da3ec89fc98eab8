"""Decides, on the host, when to prune and how, and where experts are: history, stability, plan (paper section 3).

Every process gets the same counts and so decides alike. NumPy only.
Axes: E experts of a layer.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from laep_jax.config import Config
from laep_jax.errors import require
from laep_jax.files import MAX_JSON, read_bytes
from laep_jax.laep.balance import device_loads, imbalance
from laep_jax.laep.budget import Domains
from laep_jax.laep.collapse import collapsed
from laep_jax.laep.layout import by_loads
from laep_jax.laep.load import LoadHistory
from laep_jax.laep.plan import Plan, make_plan
from laep_jax.laep.rule import PruneRule
from laep_jax.laep.slots import SlotMap, levelled
from laep_jax.laep.stability import StabilityReport, assess, history_capacity


class Controller:
    """Watches one model; after a prune, a new one watches the new model.

    config: resolved. prunes: prunes made so far. history: of an interrupted run, else empty. `UserError` where
    `LaepConfig.plan` does not read or is no plan for this model.
    """

    def __init__(self, config: Config, *, prunes: int = 0, history: LoadHistory | None = None):
        assert config.mesh.expert is not None
        self.laep = config.laep
        self.prunes = prunes
        experts = config.model.experts_per_layer
        self.rule = PruneRule.from_settings(
            config.laep, len(experts), top_k=config.model.top_k, expert_parallel=config.mesh.expert
        )
        self.history = history or LoadHistory(experts, history_capacity(config.laep))
        require(self.history.num_experts == experts, "history", self.history.num_experts, f"is not of {experts}")
        wanted = self.laep.plan and prunes < self.laep.max_prunes
        self._given = self._read_plan(Path(self.laep.plan)) if wanted else None

    def _read_plan(self, path: Path) -> Plan | None:
        """The plan in a file; None where an earlier prune has applied it."""
        plan = Plan.from_json(read_bytes(path, str(path), MAX_JSON).decode(errors="replace"))
        if self.prunes and plan.num_experts_after == self.history.num_experts != plan.num_experts:
            return None
        fits = {
            "num_experts": (plan.num_experts, self.history.num_experts),
            "expert_parallel": (plan.rule.expert_parallel, self.rule.expert_parallel),
            "top_k": (plan.rule.top_k, self.rule.top_k),
        }
        for name, (theirs, ours) in fits.items():
            require(theirs == ours, f"LaepConfig.plan {path}: {name}", theirs, f"is not the run's {ours}")
        require(plan.prunes, "LaepConfig.plan", str(path), "prunes no experts")
        return plan

    def record(self, step: int, tokens_per_expert: Sequence[np.ndarray]) -> None:
        """Adds one step's counts, [E] of each layer."""
        self.history.record(step, tokens_per_expert)

    def is_due(self, step: int) -> bool:
        """Whether something is decided after this step: then its counts must have been recorded."""
        return step % self.laep.window == 0 or step == self.laep.prune_at_step

    def assess(self) -> StabilityReport:
        return assess(self.history, self.laep)

    def wants_prune(self, step: int, report: StabilityReport) -> bool:
        """`prune_at_step` overrides the test for the first prune and for a given plan; others wait for stable loads."""
        if self.prunes >= self.laep.max_prunes:
            return False
        if self.laep.prune_at_step is not None and (self._given or not self.prunes):
            return step >= self.laep.prune_at_step
        return report.stable

    def prune_plan(self, domains: Domains, placement_loads: Sequence[np.ndarray] | None = None) -> Plan:
        """Algorithms 1 and 2 on the last window, or the plan given. Arguments are those of `laep.plan.make_plan`."""
        settings = {"domains": domains, "target": self.laep.target_experts, "placement_loads": placement_loads}
        return self._given or make_plan(self._last_window(), self.rule, **settings)

    def rebalances(self, step: int) -> bool:
        """Whether experts are placed anew after this step, whose counts must then have been recorded."""
        every = self.laep.rebalance_every
        return every is not None and step % every == 0 and self.rule.expert_parallel > 1

    def new_maps(self) -> tuple[SlotMap, ...]:
        """Where the experts of each layer should be by the last window of loads."""
        return by_loads(self.mean_loads(), self.rule.expert_parallel, self.laep.replica_slots)

    def mean_loads(self) -> list[np.ndarray]:
        """Mean tokens a step over the last window, [E] of each layer."""
        return [tokens_NE.mean(axis=0) for tokens_NE in self._last_window()]

    def imbalances(self, maps: Sequence[SlotMap]) -> dict[str, list[float]]:
        """Max / mean load of the devices over the last window, by layer.

        `device`: with every expert in its order and once. `planned`: by these maps. `levelled`: with the shares that
        the steps make.
        """
        loads, devices = self.mean_loads(), self.rule.expert_parallel
        layers = [*zip(maps, loads, strict=True)]
        return {
            "device": [imbalance(device_loads(loads_E, devices)) for loads_E in loads],
            "planned": [slot_map.imbalance(loads_E) for slot_map, loads_E in layers],
            "levelled": [levelled(slot_map, loads_E).imbalance(loads_E) for slot_map, loads_E in layers],
        }

    def collapse(self) -> str:
        """Which routers no longer tell tokens apart by the last window, and what may help; empty where all do."""
        of_layer = [collapsed(tokens_NE.sum(axis=0), self.rule.top_k) for tokens_NE in self._last_window()]
        layers = [str(layer) for layer, number in enumerate(of_layer) if number]
        if not layers:
            return ""
        return (
            f"the routers of layers {', '.join(layers)} have collapsed, {max(of_layer)} experts take nearly all: "
            "raise ModelConfig.router_init or OptimizerConfig.warmup_steps, or add a balancing loss (AuxLossConfig)"
        )

    def _last_window(self) -> list[np.ndarray]:
        return self.history.window(min(self.laep.window, len(self.history)))
