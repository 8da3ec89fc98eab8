"""Levelling in the step: on recorded counts, where most slots are replicas, and the rows that it sends."""

import itertools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from laep_jax.config import MeshConfig
from laep_jax.laep.balance import imbalance
from laep_jax.laep.layout import make_layout
from laep_jax.laep.slots import level_in_rounds, place_in_slots
from laep_jax.laep.slots import levelled as planned_levelled
from laep_jax.model.slots import to_slots
from laep_jax.sharding import make_mesh

RESULTS = Path(__file__).parents[2] / "experiments" / "results" / "results.jsonl"


def recorded(row: str) -> list[tuple[np.ndarray, np.ndarray]]:
    """Mean loads [E] of a layer in two windows of a kept run, one after the other, when early training is over."""
    results = [json.loads(line) for line in RESULTS.read_text().splitlines()]
    pairs = []
    for result in results:
        if result["row"] == row:
            steps = sorted(map(int, result["loads"]))
            windows = [result["loads"][str(step)] for step in steps if step >= steps[-1] // 2]
            for earlier, later in itertools.pairwise(windows):
                pairs += list(zip(map(np.array, earlier), map(np.array, later), strict=True))
    return pairs


def levelled(slot_map, loads_E) -> float:
    layout = make_layout([slot_map], [len(loads_E)], slot_map.slots_PS.shape[1])
    share_WP, position_WP = layout.share_WP[0], layout.position_WP[0]
    load_WP = level_in_rounds(jnp.float32(share_WP * loads_E[:, None]), position_WP >= 0, jnp, jax.lax.fori_loop)
    np.testing.assert_allclose(load_WP.sum(1), loads_E, rtol=1e-5)
    in_numpy = planned_levelled(slot_map, loads_E).imbalance(loads_E)  # what records and experiments have
    assert imbalance(np.asarray(load_WP.sum(0))) == pytest.approx(in_numpy, abs=1e-4)
    assert (np.asarray(load_WP)[position_WP < 0] == 0).all()
    return imbalance(np.asarray(load_WP.sum(0)))


@pytest.mark.parametrize("devices", [4, 8])
def test_recorded_loads_are_level_by_the_map_of_the_window_before(devices):
    pairs = recorded("base")
    found = [levelled(place_in_slots(earlier_E, devices, 1), later_E) for earlier_E, later_E in pairs]
    assert len(found) > 20
    without = np.mean([place_in_slots(earlier_E, devices, 0).imbalance(later_E) for earlier_E, later_E in pairs])
    assert np.mean(found) < 1.05
    assert np.mean(found) - 1 < 0.3 * (without - 1)


@pytest.mark.parametrize("experts", [24, 32, 40])
def test_it_converges_where_most_slots_are_replicas(experts):
    """All of them moving half of their way at once would overshoot, ever more."""
    rng = np.random.default_rng(0)
    found = []
    for _ in range(20):
        loads_E = np.rint(1000 * np.exp(rng.standard_normal(experts)))
        slot_map = place_in_slots(loads_E, 8, 8 - experts // 8)
        found.append(levelled(slot_map, np.rint(loads_E * np.exp(0.13 * rng.standard_normal(experts)))))
    assert np.mean(found) < 1.05


@pytest.mark.parametrize("case", ["skewed", "all to one", "none"])
def test_every_choice_goes_to_a_slot_of_its_expert_and_devices_receive_what_they_count(case):
    experts, tokens, devices = 12, 40, 8
    rng = np.random.default_rng(0)
    weights_E = np.exp(1.5 * rng.standard_normal(experts))
    ids_TK = np.argsort(-rng.gumbel(size=(devices * tokens, experts)) - np.log(weights_E), axis=1)[:, :2]
    ids_TK = np.full_like(ids_TK, 3 if case == "all to one" else experts) if case != "skewed" else ids_TK
    ids_TK[:7] = experts  # padding
    slot_map = place_in_slots(np.rint(100 * weights_E), devices, 2)
    layout = jax.tree.map(lambda leaf: leaf[0], make_layout([slot_map], [experts], 2))

    def on_device(ids_TK):
        counts_W = jnp.sum(jax.nn.one_hot(ids_TK.reshape(-1), experts, dtype=jnp.int32), axis=0)
        slots_TK, received = to_slots(ids_TK, counts_W, layout)
        return slots_TK, received[None]

    rows, mesh = PartitionSpec("expert"), make_mesh(MeshConfig(fsdp=1, expert=devices))
    program = jax.jit(jax.shard_map(on_device, mesh=mesh, in_specs=rows, out_specs=rows, check_vma=False))
    slots_TK, received_P = map(np.asarray, program(jnp.int32(ids_TK)))
    chosen = ids_TK < experts
    assert (slots_TK[~chosen] == layout.expert_PS.size).all()
    np.testing.assert_array_equal(layout.expert_PS.reshape(-1)[slots_TK[chosen]], ids_TK[chosen])
    per_device = np.bincount(slots_TK[chosen] // layout.expert_PS.shape[1], minlength=devices)
    np.testing.assert_array_equal(received_P, per_device)
    np.testing.assert_array_equal(slots_TK, program(jnp.int32(ids_TK))[0])
    if case == "skewed":
        assert per_device.max() <= 1.1 * per_device.mean()
