"""A step's routing, drawn from expert loads, before and after a plan; NumPy only.

A token's simulated router logits are the logarithms of the loads plus Gumbel noise, so that its first choice
is expert e with probability load e / total. It takes the K highest. Pruning masks logits, as in the model
(paper 3.2): a token whose choice was pruned takes its next choice among the kept experts, and every
token keeps K experts.

A slot is where an expert's matrices lie. There are as many slots before and after: device g has the g-th of
G equal parts, and after pruning the last slots of each part are empty. So one compiled program serves all.

Axes: L layers, T tokens, K top-k, E experts, G devices, S slots of a device (E = G S).
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from laep_jax.config import LaepConfig
from laep_jax.laep.balance import device_loads
from laep_jax.laep.plan import LayerPlan, Plan, make_plan
from laep_jax.laep.rule import PruneRule, alpha_per_layer

VARIANTS = ("base", "pruned", "rearranged", "uniform")
TOP_K = 2
NUM_LAYERS = 103  # of the 1515B model (paper Table 5)
MIDDLE_SIGMA, END_SIGMA = 0.95, 2.3


def synthetic_loads(num_experts: int, rng: np.random.Generator) -> np.ndarray:
    """Relative loads [103, E], lognormal, of a model like the paper's 1515B.

    The two sigmas are such that the paper's rule (alpha hybrid, beta 0.1) keeps about as many of 64 experts as it
    did there: 48 in most of the middle layers, 30 in the mean of the first and last sixth.
    """
    ends = NUM_LAYERS // 6
    sigma_L = np.full(NUM_LAYERS, MIDDLE_SIGMA)
    sigma_L[:ends] = sigma_L[-ends:] = END_SIGMA
    return np.exp(sigma_L[:, None] * rng.standard_normal((NUM_LAYERS, num_experts)))


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
    """One step's routes of all layers and the plan made for them.

    ids_LTK: experts chosen before. masked_ids_LTK: with the pruned experts masked. tokens_LE: counts of `ids_LTK`.
    """

    plan: Plan
    ids_LTK: np.ndarray
    masked_ids_LTK: np.ndarray
    tokens_LE: np.ndarray

    @property
    def num_experts(self) -> int:
        return self.tokens_LE.shape[1]

    @property
    def num_devices(self) -> int:
        return self.plan.rule.expert_parallel


def make_replay(logits_LTE: np.ndarray, alpha: Sequence[float], expert_parallel: int) -> Replay:
    """The plan of `LaepConfig`'s defaults with `alpha` by layer, placed by the loads of the masked routing."""
    num_experts = logits_LTE.shape[2]
    laep = LaepConfig(alpha=tuple(alpha))
    rule = PruneRule.from_settings(laep, len(alpha), top_k=TOP_K, expert_parallel=expert_parallel)
    ids_LTK = np.stack([choose(logits_TE) for logits_TE in logits_LTE])
    tokens_LE = np.stack([count(ids_TK, num_experts) for ids_TK in ids_LTK])
    first = make_plan(tokens_LE[None], rule)
    pruned = [layer.pruned for layer in first.layers]
    masked_ids_LTK = np.stack([choose(*layer) for layer in zip(logits_LTE, pruned, strict=True)])
    masked_LE = [count(ids_TK, num_experts) for ids_TK in masked_ids_LTK]
    plan = make_plan(tokens_LE[None], rule, placement_loads=masked_LE)
    return Replay(plan, ids_LTK, masked_ids_LTK, tokens_LE)


def alpha_of_layers(num_layers: int, layers: np.ndarray) -> tuple[float, ...]:
    """The paper's hybrid alpha of some layers of a model."""
    alpha = alpha_per_layer("hybrid", num_layers)
    return tuple(alpha[layer] for layer in layers)


def slot_of_expert(order: Sequence[int], num_experts: int, num_devices: int) -> np.ndarray:
    """[E], the slot of each expert, -1 where it is not in `order`: the experts in device order.

    >>> slot_of_expert([3, 0, 5, 1], num_experts=6, num_devices=2).tolist()
    [1, 4, -1, 0, -1, 3]
    """
    position = np.arange(len(order))
    per_device = len(order) // num_devices
    slot_E = np.full(num_experts, -1)
    slot_E[list(order)] = position // per_device * (num_experts // num_devices) + position % per_device
    return slot_E


def _orders(layer: LayerPlan, num_experts: int) -> dict[str, Sequence[int]]:
    """The experts in device order, by variant; pruned only, the survivors keep their old order."""
    return {"base": range(num_experts), "pruned": sorted(layer.kept), "rearranged": layer.kept}


def routes(replay: Replay) -> dict[str, np.ndarray]:
    """[L, T, K] int32 by variant: the slot of each expert chosen. `uniform` gives all slots the same load."""
    slots: dict[str, list[np.ndarray]] = {variant: [] for variant in VARIANTS}
    in_turn_TK = np.arange(replay.ids_LTK[0].size).reshape(replay.ids_LTK[0].shape) % replay.num_experts
    for layer, ids_TK, masked_TK in zip(replay.plan.layers, replay.ids_LTK, replay.masked_ids_LTK, strict=True):
        for variant, order in _orders(layer, replay.num_experts).items():
            slot_E = slot_of_expert(order, replay.num_experts, replay.num_devices)
            slots[variant].append(slot_E[ids_TK if variant == "base" else masked_TK])
        slots["uniform"].append(in_turn_TK)
    return {variant: np.stack(layers).astype(np.int32) for variant, layers in slots.items()}


def group_sizes(replay: Replay) -> dict[str, np.ndarray]:
    """[L, G, S] by variant: the rows of every slot of every device, 0 where it is empty.

    `uniform`: three quarters of the experts, 48 of 64 as in Table 5, with equal loads; missing where they do not
    divide by the devices.
    """
    shape = (-1, replay.num_devices, replay.num_experts // replay.num_devices)
    sizes = {
        variant: np.stack([count(ids_TK, replay.num_experts) for ids_TK in ids_LTK]).reshape(shape)
        for variant, ids_LTK in routes(replay).items()
    }
    del sizes["uniform"]
    fewer = replay.num_experts * 3 // 4
    if fewer % replay.num_devices == 0:
        slot_E = slot_of_expert(range(fewer), replay.num_experts, replay.num_devices)
        rows_E = np.zeros(replay.num_experts, int)
        rows_E[slot_E[slot_E >= 0]] = np.diff(np.arange(fewer + 1) * replay.ids_LTK[0].size // fewer)
        sizes["uniform"] = np.tile(rows_E.reshape(shape[1:]), (len(replay.ids_LTK), 1, 1))
    return sizes


def largest_loads(replay: Replay) -> dict[str, float]:
    """The plan's model of a step's time, in rows, by variant: the largest device load, layers added up."""
    layers, devices = replay.plan.layers, replay.num_devices
    return {
        "base": float(sum(device_loads(tokens_E, devices).max() for tokens_E in replay.tokens_LE)),
        "pruned": sum(layer.largest_before for layer in layers),
        "rearranged": sum(max(layer.device_load) for layer in layers),
        "uniform": sum(layer.mean_load for layer in layers),
    }


def to_base(values: dict[str, float]) -> dict[str, float]:
    """Each value over that of `base`."""
    return {name: value / values["base"] for name, value in values.items()}
