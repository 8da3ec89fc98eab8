"""The plan: which experts stay in each layer and where they go, as data (paper sections 3.2, 3.3).

One plan carries both algorithms. `kept` lists, per layer, the old slots in new device order:
new[e] = old[kept[e]] for everything that belongs to an expert. Ids are slots of the model the plan is made for; the
lineage translates these into the experts of the model a run began with.

Axes: N iterations, L layers, E experts of a layer.
"""

import dataclasses
import hashlib
from collections.abc import Sequence

import numpy as np

from laep_jax.config import LaepConfig
from laep_jax.errors import require
from laep_jax.laep import plan_json, plan_table
from laep_jax.laep.balance import imbalance
from laep_jax.laep.budget import Domains, choose, reach_target
from laep_jax.laep.layer_plan import LayerPlan, make_layer_plan
from laep_jax.laep.load import as_counts, num_with_tokens
from laep_jax.laep.pruning import Pruning
from laep_jax.laep.rule import PruneRule
from laep_jax.laep.slots import EMPTY

Lineage = tuple[tuple[int, ...], ...]  # per layer: the original id of each slot


@dataclasses.dataclass(frozen=True)
class Plan:
    """What to keep and where, with the rule that led there. Checked when it is made: `UserError`.

    num_experts: per layer, before. rule: under that of a plan which Algorithm 1 did not make, no expert is eligible.
    """

    num_experts: tuple[int, ...]
    rule: PruneRule
    layers: tuple[LayerPlan, ...]

    def __post_init__(self):
        num_layers = len(self.num_experts)
        require(num_layers > 0, "num_layers", num_layers, "must be at least 1")
        self.rule.check_model(self.num_experts)
        require(len(self.layers) == num_layers, "entries of layers", len(self.layers), f"must be {num_layers=}")
        for index, (num_experts, layer) in enumerate(zip(self.num_experts, self.layers, strict=True)):
            layer.check(f"layers[{index}]", num_experts, self.rule)
        slots = {layer.replica_slots for layer in self.layers}
        require(len(slots) == 1, "replica slots of layers", sorted(slots), "must be the same in all layers")
        domains = {tuple(layer.domain_shares) for layer in self.layers}
        require(
            len(domains) == 1, "domain_shares of layers", sorted(domains), "must be of the same domains in all layers"
        )

    @property
    def kept(self) -> tuple[tuple[int, ...], ...]:
        """Per layer, the old slots in new device order."""
        return tuple(layer.kept for layer in self.layers)

    @property
    def num_experts_after(self) -> tuple[int, ...]:
        """Per layer, experts that stay."""
        return tuple(len(layer.kept) for layer in self.layers)

    @property
    def prunes(self) -> bool:
        """Whether any expert goes."""
        return any(layer.pruned for layer in self.layers)

    @property
    def imbalances(self) -> tuple[float, ...]:
        """Max / mean load of the devices by layer, with the replicas that the plan has."""
        return tuple(imbalance(np.array(layer.slot_load or layer.device_load)) for layer in self.layers)

    def pruned_shares(self, domains: Domains) -> dict[str, list[float]]:
        """By domain and layer, the share of the domain's tokens that goes to the experts to prune."""
        return {
            name: [
                float(tokens_E[list(layer.pruned)].sum() / max(tokens_E.sum(), 1))
                for tokens_E, layer in zip(tokens, self.layers, strict=True)
            ]
            for name, tokens in domains.items()
        }

    def to_json(self) -> str:
        """The plan as JSON text, a line a layer; `from_json` gives an equal plan back."""
        return plan_json.dump(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Plan":
        """Reads `to_json`. `UserError` on anything that is not a sound plan."""
        fields = plan_json.parse(text)
        layers = tuple(LayerPlan(**layer) for layer in fields["layers"])
        return cls(fields["num_experts"], PruneRule(**fields["rule"]), layers)

    def sha256(self) -> str:
        """Of the JSON text: equal on two hosts if, and only if, they hold the same plan."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def table(self) -> str:
        """The plan for people: a line a layer and a total, which adds up the layers' loads."""
        return plan_table.table(self.rule, self.layers)


def make_plan(
    tokens: np.ndarray | Sequence[np.ndarray],
    rule: PruneRule,
    *,
    placement_loads: Sequence[np.ndarray] | None = None,
    replica_slots: int = 0,
    domains: Domains | None = None,
    target: float | None = None,
) -> Plan:
    """Both algorithms: prune by the recorded counts, then place the survivors.

    replica_slots: of each device, for replicas of hot experts; see `laep.slots`. domains: tokens by domain, for
    `rule.domain_beta`. target: experts to keep of all layers, see `budget.reach_target`; then beta is not used.
    tokens: counts [N, L, E], or [N, E] of each layer. placement_loads: mean tokens an iteration, [E]
    of each layer, measured with the pruned experts masked; by default the recorded means, which leave
    out that the tokens of pruned experts go elsewhere. Iterations in which a layer got no tokens are left out
    for that layer. `UserError` on bad counts, on a rule for another model, and on a layer without any tokens.
    """
    counts = as_counts(tokens)
    idle = [layer for layer, tokens_NE in enumerate(counts) if not tokens_NE.any()]
    hint = "cannot be pruned: leave dense layers out of the counts, and check what counts the others"
    require(not idle, "layers without tokens", idle, hint)
    num_experts = tuple(tokens_NE.shape[1] for tokens_NE in counts)
    rule.check_model(num_experts)
    domains = domains or {}
    for name, tokens in domains.items():
        found = tuple(map(len, tokens))
        require(found == num_experts, f"experts of domain {name}", found, f"are not those of the counts, {num_experts}")
    if target is not None:
        rule = reach_target(counts, rule, target, domains)
    choices = choose(counts, rule, domains)
    totals = [tokens_NE.sum(axis=0) for tokens_NE in counts]
    if placement_loads is None:  # whole sums instead of means: ties and order are then exact
        loads, iterations = totals, [*map(num_with_tokens, counts)]
    else:
        loads, iterations = [np.asarray(loads_E) for loads_E in placement_loads], [1] * len(counts)
    shapes = tuple(loads_E.shape for loads_E in loads)
    assert shapes == tuple((count,) for count in num_experts), (shapes, num_experts)
    parts = zip(loads, iterations, choices, strict=True)
    plan = Plan(num_experts, rule, tuple(make_layer_plan(*part, rule, replica_slots) for part in parts))
    shares = plan.pruned_shares(domains)
    by_layer = [{name: of_domain[i] for name, of_domain in shares.items()} for i in range(len(counts))]
    layers = [dataclasses.replace(layer, domain_shares=of) for layer, of in zip(plan.layers, by_layer, strict=True)]
    return dataclasses.replace(plan, layers=tuple(layers))


def chosen_plan(loads: Sequence[np.ndarray], pruned: Sequence[Sequence[int]], rule: PruneRule) -> Plan:
    """Prunes these slots of each layer and places the others by `loads`: mean tokens a step, [E] of each layer.

    rule: for the devices, `top_k` and how to place; its bounds are not used.
    """
    choices = [Pruning(eligible=(), pruned=tuple(sorted(slots))) for slots in pruned]
    layers = [
        make_layer_plan(np.asarray(loads_E), 1, choice, rule) for loads_E, choice in zip(loads, choices, strict=True)
    ]
    return Plan(tuple(map(len, loads)), rule.choosing_none(), tuple(layers))


def identity_plan(num_experts: Sequence[int], *, expert_parallel: int, top_k: int) -> Plan:
    """Keeps every expert of each layer where it is; knows no loads, so they are all 0."""
    zeros = (0.0,) * expert_parallel
    layers = [LayerPlan(tuple(range(count)), (), (), zeros, 1.0, 1.0, 0.0) for count in num_experts]
    rule = PruneRule.from_settings(LaepConfig(), len(layers), top_k=top_k, expert_parallel=expert_parallel)
    return Plan(tuple(num_experts), rule.choosing_none(), tuple(layers))


def compose(first: Plan, second: Plan) -> Plan:
    """One plan that does what `first` and then `second` do. `UserError` where they do not fit.

    Loads and slots are those of `second`, measured last; the pruning settings are those of the last plan that
    pruned.
    """
    require(
        second.num_experts == first.num_experts_after,
        "second.num_experts",
        second.num_experts,
        f"does not follow a plan that keeps {first.num_experts_after}",
    )
    rule, last = (second if second.prunes else first).rule, second.rule
    devices = {"expert_parallel": last.expert_parallel, "top_k": last.top_k, "placement": last.placement}
    layers = tuple(map(_compose_layer, first.layers, second.layers))
    return Plan(first.num_experts, dataclasses.replace(rule, **devices), layers)


def _compose_layer(first: LayerPlan, second: LayerPlan) -> LayerPlan:
    def original(slots: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(first.kept[slot] for slot in slots)

    return dataclasses.replace(
        second,
        kept=original(second.kept),
        pruned=tuple(sorted(first.pruned + original(second.pruned))),
        eligible=tuple(sorted({*first.eligible, *original(second.eligible)})),
        slots=tuple(tuple(EMPTY if slot == EMPTY else first.kept[slot] for slot in row) for row in second.slots),
    )


def initial_lineage(num_experts: Sequence[int]) -> Lineage:
    """Every slot holds the expert of its own number."""
    return tuple(tuple(range(count)) for count in num_experts)


def apply_plan_to_lineage(lineage: Sequence[Sequence[int]], plan: Plan) -> Lineage:
    """The lineage after `plan`: per layer the original id of each new slot. `UserError` on another model."""
    counts = tuple(len(ids) for ids in lineage)
    require(counts == plan.num_experts, "plan num_experts", plan.num_experts, f"does not fit layers of {counts}")
    return tuple(tuple(ids[slot] for slot in layer.kept) for ids, layer in zip(lineage, plan.layers, strict=True))
