"""Where the experts of a model are, as arrays that the step takes: windows, slots and shares of each layer.

The experts of all layers are in one array, those of a layer side by side. Each layer sees a window of it, as wide as
the widest layer, which begins at its own experts or, near the end, so much earlier that it does not pass the end:

    experts         0 0 0 0 | 1 1 | 2 2 2        three layers
    window of 0    [* * * *]                     *: its own
    window of 1            [* * . .]
    window of 2              [. * * *]

Experts of a layer go by their place in its window. Everything is int32, bool or float32, for the devices.

Axes: L layers, W experts of a window, P devices of the expert axis, S slots of a device.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from laep_jax.laep.layer_plan import LayerPlan
from laep_jax.laep.placement import EMPTY
from laep_jax.laep.slots import SlotMap, in_order, max_replica_slots, place_in_slots


class Layout(NamedTuple):
    """Of one layer, or of all, stacked: then each array has one more dimension in front.

    start: first row of the window. is_own_W: whether an expert of the window is the layer's.
    expert_PS: the expert in each slot; in an empty one an expert of the layer that is not looked for there.
    position_WP: in which slot of each device an expert is, EMPTY where it has none. share_WP: of its tokens.
    """

    start: np.ndarray
    is_own_W: np.ndarray
    expert_PS: np.ndarray
    position_WP: np.ndarray
    share_WP: np.ndarray


def windows(num_experts: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """start [L] and is_own [L, W] of layers with so many experts.

    >>> windows((4, 2, 3))[0].tolist(), windows((4, 2, 3))[1][1:].tolist()
    ([0, 4, 5], [[True, True, False, False], [False, True, True, True]])
    """
    count_L = np.array(num_experts)
    first_L, width = np.cumsum(count_L) - count_L, max(num_experts)
    start_L = np.minimum(first_L, count_L.sum() - width)
    place_LW = np.arange(width)[None] - (first_L - start_L)[:, None]
    return start_L.astype(np.int32), (place_LW >= 0) & (place_LW < count_L[:, None])


def num_slots(num_experts: Sequence[int], num_devices: int, replica_slots: int) -> int:
    """Slots of a device in every layer: for its part of the widest layer, and for replicas. One needs no replicas."""
    return -(-max(num_experts) // num_devices) + (replica_slots if num_devices > 1 else 0)


def make_layout(maps: Sequence[SlotMap], num_experts: Sequence[int], replica_slots: int = 0) -> Layout:
    """The layout of layers whose experts are placed by `maps`, one a layer, with ids from 0 in each."""
    slots = num_slots(num_experts, len(maps[0].slots_PS), replica_slots)
    layers = [
        _layer_layout(slot_map, start, is_own_W, slots)
        for slot_map, start, is_own_W in zip(maps, *windows(num_experts), strict=True)
    ]
    return Layout(*(np.stack(arrays) for arrays in zip(*layers, strict=True)))


def _layer_layout(slot_map: SlotMap, start: np.ndarray, is_own_W: np.ndarray, slots: int) -> Layout:
    own, devices = np.flatnonzero(is_own_W), len(slot_map.slots_PS)
    device, slot = np.nonzero(slot_map.slots_PS != EMPTY)
    expert = own[slot_map.slots_PS[device, slot]]
    expert_PS = np.full((devices, slots), own[0], np.int32)
    expert_PS[device, slot] = expert
    position_WP = np.full((len(is_own_W), devices), EMPTY, np.int32)
    position_WP[expert, device] = slot
    share_WP = np.zeros(position_WP.shape, np.float32)
    share_WP[expert, device] = slot_map.shares_PS[device, slot]
    return Layout(start, is_own_W, expert_PS, position_WP, share_WP)


def by_loads(loads: Sequence[np.ndarray], num_devices: int, replica_slots: int) -> tuple[SlotMap, ...]:
    """A map of each layer, from the tokens of its experts; a layer with few experts has fewer replicas."""
    return tuple(
        place_in_slots(loads_E, num_devices, min(replica_slots, max_replica_slots(len(loads_E), num_devices)))
        for loads_E in loads
    )


def by_plan(layers: Sequence[LayerPlan]) -> tuple[SlotMap, ...]:
    """A map of each layer of the model that a plan leads to: its slots, or else the order of its experts."""
    return tuple(map(_of_layer_plan, layers))


def _of_layer_plan(layer: LayerPlan) -> SlotMap:
    if not layer.slots:
        return in_order(len(layer.kept), len(layer.device_load))
    new_id = {EMPTY: EMPTY} | {expert: place for place, expert in enumerate(layer.kept)}
    return SlotMap(np.array([[new_id[expert] for expert in row] for row in layer.slots]), np.array(layer.shares))


def to_arrays(maps: Sequence[SlotMap]) -> dict[str, np.ndarray]:
    """As arrays of numbers for an .npz file, the layers side by side."""
    return {
        "slots": np.concatenate([slot_map.slots_PS for slot_map in maps], axis=1),
        "shares": np.concatenate([slot_map.shares_PS for slot_map in maps], axis=1),
        "slots_of_layer": np.array([slot_map.slots_PS.shape[1] for slot_map in maps]),
    }


def from_arrays(arrays: Mapping[str, np.ndarray]) -> tuple[SlotMap, ...]:
    """What `to_arrays` was given."""
    ends = np.cumsum(arrays["slots_of_layer"])[:-1]
    both = (np.split(arrays[name], ends, axis=1) for name in ("slots", "shares"))
    return tuple(map(SlotMap, *both))
