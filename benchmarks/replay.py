"""A step's routing, drawn from expert loads, before and after a plan, with and without replicas; NumPy only.

A token's simulated router logits are the logarithms of the loads plus Gumbel noise, so that its first choice
is expert e with probability load e / total. It takes the K highest. Pruning masks logits, as in the model
(paper 3.2): a token whose choice was pruned takes its next choice among the kept experts, and every
token keeps K experts.

Plans and maps are made from the loads of an earlier step; until the step that is replayed, loads have drifted.

Axes: L layers, T tokens, K top-k, E experts, P devices, S slots of a device, the last of which may be empty.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from laep_jax.config import LaepConfig
from laep_jax.laep.layout import by_loads
from laep_jax.laep.plan import Plan, make_plan
from laep_jax.laep.rule import PruneRule, alpha_per_layer
from laep_jax.laep.slots import EMPTY, SlotMap, in_order, levelled

TOP_K = 2
NUM_LAYERS = 103  # of the 1515B model (paper Table 5)
MIDDLE_SIGMA, END_SIGMA = 0.95, 2.3
DRIFT = 0.2  # of log loads between plan and step; 0.16 to 0.20 in 190 steps of `experiments`' alpha_hybrid, seed 0


def synthetic_loads(num_experts: int, rng: np.random.Generator) -> np.ndarray:
    """Relative loads [103, E], lognormal, of a model like the paper's 1515B.

    The two sigmas are such that the paper's rule (alpha hybrid, beta 0.1) keeps about as many of 64 experts as it
    did there: 48 in most of the middle layers, 30 in the mean of the first and last sixth.
    """
    ends = NUM_LAYERS // 6
    sigma_L = np.full(NUM_LAYERS, MIDDLE_SIGMA)
    sigma_L[:ends] = sigma_L[-ends:] = END_SIGMA
    return np.exp(sigma_L[:, None] * rng.standard_normal((NUM_LAYERS, num_experts)))


def drifted(loads_LE: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Loads when a plan is made, and those some hundred steps later."""
    return loads_LE, loads_LE * np.exp(DRIFT * rng.standard_normal(loads_LE.shape))


def sample_layers(num_layers: int, num_sampled: int) -> np.ndarray:
    """Indices of the middle layers of equal stretches; all layers if they are not more.

    >>> sample_layers(103, 6).tolist()
    [8, 25, 42, 60, 77, 94]
    """
    number = min(num_sampled, num_layers)
    return (2 * np.arange(number) + 1) * num_layers // (2 * number)


def draw_logits(loads_LE: np.ndarray, num_tokens: int, rng: np.random.Generator) -> np.ndarray:
    """[L, T, E], float32. An expert without any load is chosen where nothing else is left."""
    loads_LE = np.maximum(loads_LE, 1e-9 * loads_LE.mean(axis=1, keepdims=True))
    logits_LTE = rng.gumbel(size=(len(loads_LE), num_tokens, loads_LE.shape[1])).astype(np.float32)
    return logits_LTE + np.log(loads_LE).astype(np.float32)[:, None]


def choose(logits_TE: np.ndarray, pruned: Sequence[int] = ()) -> np.ndarray:
    """[T, K], the experts of each token: the highest logits with those of `pruned` masked."""
    logits_TE = logits_TE.copy()
    logits_TE[:, list(pruned)] = -np.inf
    return np.argpartition(-logits_TE, TOP_K - 1, axis=1)[:, :TOP_K]


def count(ids_TK: np.ndarray, num_experts: int) -> np.ndarray:
    """Rows of each expert, [E]."""
    return np.bincount(ids_TK.ravel(), minlength=num_experts)


@dataclasses.dataclass(frozen=True)
class Replay:
    """One step's routes of all layers, and where experts are, by variant.

    ids_LTK: experts chosen before the prune. masked_ids_LTK: with the pruned experts masked. maps: by variant and
    layer, with the ids of before. `uniform` routes tokens in turn to three quarters of the experts, as in Table 5.
    """

    plan: Plan
    ids_LTK: np.ndarray
    masked_ids_LTK: np.ndarray
    uniform_ids_LTK: np.ndarray
    maps: dict[str, list[SlotMap]]
    num_experts: int

    @property
    def num_devices(self) -> int:
        return self.plan.rule.expert_parallel

    @property
    def num_slots(self) -> int:
        """The most that any variant has on a device."""
        return max(slot_map.slots_PS.shape[1] for maps in self.maps.values() for slot_map in maps)

    def ids(self, variant: str) -> np.ndarray:
        """[L, T, K] experts chosen under this variant."""
        if variant == "uniform":
            return self.uniform_ids_LTK
        return self.ids_LTK if variant.startswith("base") else self.masked_ids_LTK


def make_replay(before_LTE: np.ndarray, now_LTE: np.ndarray, alpha: Sequence[float], expert_parallel: int) -> Replay:
    """The step with logits `now`, under plans by `LaepConfig`'s defaults and `alpha` by layer from those before."""
    num_experts = now_LTE.shape[2]
    laep = LaepConfig(alpha=tuple(alpha))
    rule = PruneRule.from_settings(laep, len(alpha), top_k=TOP_K, expert_parallel=expert_parallel)
    before_LE = np.stack([count(choose(logits_TE), num_experts) for logits_TE in before_LTE])
    pruned = [layer.pruned for layer in make_plan(before_LE[None], rule).layers]
    masked_LE = np.stack([count(choose(*layer), num_experts) for layer in zip(before_LTE, pruned, strict=True)])
    plan = make_plan(before_LE[None], rule, placement_loads=[*masked_LE])
    ids_LTK = np.stack([choose(logits_TE) for logits_TE in now_LTE])
    masked_ids_LTK = np.stack([choose(*layer) for layer in zip(now_LTE, pruned, strict=True)])
    uniform = num_experts * 3 // 4 // expert_parallel * expert_parallel or num_experts
    in_turn_LTK = np.broadcast_to(np.arange(ids_LTK[0].size).reshape(ids_LTK[0].shape) % uniform, ids_LTK.shape)
    layers = zip(plan.kept, before_LE, masked_LE, ids_LTK, masked_ids_LTK, strict=True)
    maps_L = [_maps(np.array(kept), uniform, expert_parallel, *of_layer) for kept, *of_layer in layers]
    maps = {variant: [maps[variant] for maps in maps_L] for variant in maps_L[0]}
    return Replay(plan, ids_LTK, masked_ids_LTK, in_turn_LTK, maps, num_experts)


def _maps(
    kept: np.ndarray,
    num_uniform: int,
    num_devices: int,
    before_E: np.ndarray,
    masked_E: np.ndarray,
    ids_TK: np.ndarray,
    masked_ids_TK: np.ndarray,
) -> dict[str, SlotMap]:
    """Of one layer, by variant. before_E: rows in the plan's step; masked_E: with only `kept`. ids_TK: of this step."""
    num_experts, in_old_order = len(before_E), np.sort(kept)
    now_E, masked_now_E = (count(ids, num_experts) for ids in (ids_TK, masked_ids_TK))
    return {
        "base": in_order(num_experts, num_devices),
        **with_slots("base", np.arange(num_experts), before_E, now_E, num_devices, (1,)),
        "pruned": in_order(len(kept), num_devices).renamed(in_old_order),
        "rearranged": in_order(len(kept), num_devices).renamed(kept),
        **with_slots("rearranged", in_old_order, masked_E, masked_now_E, num_devices, (1, 2)),
        "uniform": in_order(num_uniform, num_devices),
    }


def with_slots(
    name: str, ids: np.ndarray, before_E: np.ndarray, now_E: np.ndarray, num_devices: int, slots: Sequence[int]
) -> dict[str, SlotMap]:
    """Maps of the experts `ids` with so many replica slots: planned by the loads before, and levelled by those now."""
    maps = {}
    for replica_slots in slots:
        [planned] = by_loads([before_E[ids]], num_devices, replica_slots)
        maps[f"{name} + {replica_slots} planned"] = planned.renamed(ids)
        maps[f"{name} + {replica_slots} levelled"] = levelled(planned, now_E[ids]).renamed(ids)
    return maps


def alpha_of_layers(num_layers: int, layers: np.ndarray) -> tuple[float, ...]:
    """The paper's hybrid alpha of some layers of a model."""
    alpha = alpha_per_layer("hybrid", num_layers)
    return tuple(alpha[layer] for layer in layers)


def rows_of_slots(slot_map: SlotMap, rows_E: np.ndarray) -> np.ndarray:
    """[P, S]: the rows of each expert, split by its shares into whole rows.

    >>> rows_of_slots(SlotMap(np.array([[0, 1], [0, -1]]), np.array([[0.3, 1], [0.7, 0]])), np.array([9, 4]))
    array([[3, 4],
           [6, 0]])
    """
    rows_PS = np.zeros(slot_map.slots_PS.shape, int)
    for expert in np.unique(slot_map.slots_PS[slot_map.slots_PS != EMPTY]):
        here_PS = slot_map.slots_PS == expert
        ends = np.rint(slot_map.shares_PS[here_PS].cumsum() * rows_E[expert]).astype(int)
        rows_PS[here_PS] = np.diff(ends, prepend=0)
    return rows_PS


def slots_of_choices(ids_TK: np.ndarray, slot_map: SlotMap, num_slots: int) -> np.ndarray:
    """[T, K] int32, the slot p num_slots + s of each choice: an expert's choices in turn fill its slots."""
    rows_PS = rows_of_slots(slot_map, count(ids_TK, slot_map.slots_PS.max() + 1))
    device, slot = np.nonzero(slot_map.slots_PS != EMPTY)
    by_expert = np.argsort(slot_map.slots_PS[device, slot], kind="stable")
    device, slot = device[by_expert], slot[by_expert]
    slots_N = np.empty(ids_TK.size, np.int32)
    slots_N[np.argsort(ids_TK.ravel(), kind="stable")] = np.repeat(device * num_slots + slot, rows_PS[device, slot])
    return slots_N.reshape(ids_TK.shape)


def routes(replay: Replay) -> dict[str, np.ndarray]:
    """[L, T, K] int32 by variant: the slot of each choice."""
    return {
        variant: np.stack(
            [slots_of_choices(*layer, replay.num_slots) for layer in zip(replay.ids(variant), maps, strict=True)]
        )
        for variant, maps in replay.maps.items()
    }


def group_sizes(replay: Replay) -> dict[str, np.ndarray]:
    """[L, P, S] by variant: the rows of every slot of every device, 0 where it is empty."""
    return {
        variant: np.stack([_padded(rows_of_slots(*layer), replay.num_slots) for layer in _layers(replay, variant)])
        for variant in replay.maps
    }


def largest_loads(replay: Replay) -> dict[str, float]:
    """The model of a step's time, in rows, by variant: the largest device load, layers added up."""
    return {
        variant: float(sum(slot_map.device_loads(rows_E).max() for slot_map, rows_E in _layers(replay, variant)))
        for variant in replay.maps
    }


def _layers(replay: Replay, variant: str) -> list[tuple[SlotMap, np.ndarray]]:
    """Map and rows of each expert, by layer."""
    rows = [count(ids_TK, replay.num_experts) for ids_TK in replay.ids(variant)]
    return [*zip(replay.maps[variant], rows, strict=True)]


def _padded(rows_PS: np.ndarray, num_slots: int) -> np.ndarray:
    return np.pad(rows_PS, ((0, 0), (0, num_slots - rows_PS.shape[1])))


def to_base(values: dict[str, float]) -> dict[str, float]:
    """Each value over that of `base`."""
    return {name: value / values["base"] for name, value in values.items()}
