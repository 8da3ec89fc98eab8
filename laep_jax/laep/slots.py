"""Expert slots: replicas of hot experts, so that devices carry the same load. Goes beyond the paper (its section 3.3).

Algorithm 2 gives each expert one place. Where one expert has more tokens than a device's mean load, no placement is
even. A slot map has S slots on each of P devices, K = ceil(E / P) for the experts and R for replicas, and says
which share of an expert's tokens goes to each of its slots.

One replica slot a device is enough for exact balance, whatever the loads (`exact_slots`). A map that is to last while
the loads drift is better built around Algorithm 2's places, with replicas of the hottest experts in the slots that the
balance of today does not need (`home_and_fill`), and its shares made anew from the loads of the step (`levelled`; the
step itself runs the same `level_in_rounds` in JAX).

Axes: E experts, P devices, S slots of a device.
"""

import dataclasses
from collections.abc import Callable

import numpy as np

from laep_jax.errors import require
from laep_jax.laep.balance import imbalance
from laep_jax.laep.placement import EMPTY, integers, place

WORTH_A_SLOT = 0.1  # of the mean device load: smaller differences are levelled by the replicas that there are
UNEVEN = 1.05  # max / mean above which a map gives way to the exact one
SWEEPS = 8  # over all replicated experts, when shares are planned
ROUNDS = 8  # of levelling in a step
MOMENTUM = 0.5  # of these rounds; it halves the imbalance that they leave


@dataclasses.dataclass(frozen=True)
class SlotMap:
    """slots_PS: the expert in each slot, EMPTY for none. shares_PS: of that expert's tokens; they add up to one."""

    slots_PS: np.ndarray
    shares_PS: np.ndarray

    def device_loads(self, loads_E: np.ndarray) -> np.ndarray:
        """Tokens on each device, [P], where every expert's tokens are split by the shares.

        >>> SlotMap(np.array([[0, 1], [2, 0]]), np.array([[0.25, 1], [1, 0.75]])).device_loads(np.array([8, 6, 2]))
        array([8., 8.])
        """
        return np.where(self.slots_PS >= 0, loads_E[self.slots_PS] * self.shares_PS, 0.0).sum(axis=1)

    def imbalance(self, loads_E: np.ndarray) -> float:
        """Max / mean of the device loads."""
        return imbalance(self.device_loads(loads_E))

    def renamed(self, ids: np.ndarray) -> "SlotMap":
        """The same slots of the experts `ids` instead of 0, 1 and so on.

        >>> in_order(3, 2).renamed(np.array([5, 7, 9])).slots_PS.tolist()
        [[5, 7], [9, -1]]
        """
        return SlotMap(np.append(ids, EMPTY)[self.slots_PS], self.shares_PS)


def in_order(num_experts: int, num_devices: int) -> SlotMap:
    """The map in which device p has the p-th group of the experts, as in `balance`; no loads are known.

    >>> in_order(4, 3).slots_PS.tolist()
    [[0, 1], [2, -1], [3, -1]]
    """
    parts = np.array_split(np.arange(num_experts), num_devices)
    slots_PS = np.stack([np.pad(part, (0, len(parts[0]) - len(part)), constant_values=EMPTY) for part in parts])
    return SlotMap(slots_PS, (slots_PS != EMPTY).astype(float))


def max_replica_slots(num_experts: int, num_devices: int) -> int:
    """Of a device, so that none needs two slots for one expert; 0 of one device."""
    return num_experts - -(-num_experts // num_devices)


def place_in_slots(loads_E: np.ndarray, num_devices: int, replica_slots: int) -> SlotMap:
    """Algorithm 2, refined, without replica slots; else `home_and_fill`, or the exact map where that is uneven.

    loads_E: tokens of each expert; E need not divide by the devices. `UserError` where a device would have more slots
    than there are experts.
    """
    loads_E = np.asarray(loads_E)
    most = max_replica_slots(len(loads_E), num_devices)
    require(
        0 <= replica_slots <= most,
        "replica_slots",
        replica_slots,
        f"must be from 0 to {most} for {len(loads_E)} experts",
    )
    if not replica_slots:
        return _homes(loads_E, num_devices)
    slot_map = home_and_fill(loads_E, num_devices, replica_slots)
    return slot_map if slot_map.imbalance(loads_E) <= UNEVEN else exact_slots(loads_E, num_devices, replica_slots)


def exact_slots(loads_E: np.ndarray, num_devices: int, replica_slots: int = 1) -> SlotMap:
    """The mean load on every device, for any loads, with at most K + 1 experts on each and P - 1 replicas in all.

    Sorted by load, K neighbours are a window. The lightest window has at most the mean device load, the heaviest at
    least that. Where sliding by one passes it, a device takes the window before and the missing piece of the
    expert that enters; K experts are gone and the others have the same mean, so the next device can do likewise:

        experts by load   . . [ . . . ] x .        window <= mean;  with x for the lightest of it > mean
        this device takes     the window and a piece of x; the rest of x stays for the others
    """
    assert replica_slots >= 1, replica_slots
    loads_E = np.asarray(loads_E)
    size = -(-len(loads_E) // num_devices)
    left = {expert: int(load) * num_devices for expert, load in enumerate(integers(loads_E))}  # so the mean is integer
    left |= {expert: 0 for expert in range(len(loads_E), size * num_devices)}
    whole, mean = dict(left), sum(left.values()) // num_devices
    slots_PS = np.full((num_devices, size + replica_slots), EMPTY)
    shares_PS = np.zeros(slots_PS.shape)
    for device in range(num_devices):
        experts = sorted(left, key=lambda expert: (left[expert], expert))
        first = _last_window_within(mean, [left[expert] for expert in experts], size)
        taken = {expert: left.pop(expert) for expert in experts[first : first + size]}
        missing = mean - sum(taken.values())
        if missing:
            taken[experts[first + size]] = missing
            left[experts[first + size]] -= missing
        for slot, (expert, load) in enumerate(taken.items()):
            if expert < len(loads_E):
                slots_PS[device, slot] = expert
                shares_PS[device, slot] = load / whole[expert] if whole[expert] else 1.0
    return SlotMap(slots_PS, shares_PS)


def _last_window_within(mean: int, ascending: list[int], size: int) -> int:
    """Where the last window of `size` neighbours with a sum of at most `mean` begins."""
    first = 0
    while first + size < len(ascending) and sum(ascending[first + 1 : first + 1 + size]) <= mean:
        first += 1
    return first


def home_and_fill(loads_E: np.ndarray, num_devices: int, replica_slots: int) -> SlotMap:
    """Algorithm 2's places, and in the free slots replicas: first where they even out these loads, then for drift.

    The most loaded device gives its largest expert to the least loaded device with a free slot, as much as both
    need, while they differ from the mean by what is worth a slot. Slots that are still free take the expert with the
    largest load a replica. No device has two slots of one expert, and none more load than the most loaded one under
    Algorithm 2, refined.
    """
    loads_E = np.asarray(loads_E, float)
    homes = _homes(loads_E, num_devices)
    load_EP, here_EP = _by_device(homes, loads_E)
    num_slots = homes.slots_PS.shape[1] + replica_slots
    while move := _best_move(load_EP, here_EP, num_slots):
        expert, giver, taker, load = move
        load_EP[expert, [giver, taker]] += [-load, load]
        here_EP[expert, taker] = True
    while replica := _next_replica(loads_E, load_EP, here_EP, num_slots):
        here_EP[replica] = True
    return _slot_map(level(load_EP, here_EP), here_EP, num_slots)


def _best_move(load_EP: np.ndarray, here_EP: np.ndarray, num_slots: int) -> tuple[int, int, int, float] | None:
    """(expert, giver, taker, load) from the most loaded device that can give; None where none helps."""
    load_P, mean = load_EP.sum(axis=0), load_EP.sum() / load_EP.shape[1]
    has_room_P = here_EP.sum(axis=0) < num_slots
    for giver in np.argsort(-load_P, kind="stable").tolist():
        for taker in np.argsort(load_P, kind="stable").tolist():
            helps = min(load_P[giver] - mean, mean - load_P[taker]) > WORTH_A_SLOT * mean
            given_E = np.where(here_EP[:, taker], 0.0, load_EP[:, giver])
            if helps and has_room_P[taker] and given_E.any():
                expert = int(given_E.argmax())
                load = min(given_E[expert], load_P[giver] - mean, mean - load_P[taker])
                return expert, giver, taker, load
    return None


def _next_replica(
    loads_E: np.ndarray, load_EP: np.ndarray, here_EP: np.ndarray, num_slots: int
) -> tuple[int, int] | None:
    """The expert with the largest load a replica that a device with room lacks, and the lightest such device."""
    has_room_P = here_EP.sum(axis=0) < num_slots
    places_EP = has_room_P & ~here_EP
    if not places_EP.any():
        return None
    expert = int(np.where(places_EP.any(axis=1), loads_E / here_EP.sum(axis=1), -1.0).argmax())
    return expert, int(np.where(places_EP[expert], load_EP.sum(axis=0), np.inf).argmin())


def _repeated(first: int, last: int, body: Callable, value):
    """What `jax.lax.fori_loop` is defined to do."""
    for index in range(first, last):
        value = body(index, value)
    return value


def level(load_EP: np.ndarray, here_EP: np.ndarray) -> np.ndarray:
    """The loads [E, P] split anew: one replicated expert after another fills its devices to equal height.

    No device ends above the most loaded one before. here_EP: where each expert has a slot.
    """
    load_EP = load_EP.copy()
    replicated = np.flatnonzero(here_EP.sum(axis=1) > 1)
    for expert in [*replicated[np.argsort(-load_EP[replicated].sum(axis=1), kind="stable")]] * SWEEPS:
        devices = np.flatnonzero(here_EP[expert])
        others = load_EP[:, devices].sum(axis=0) - load_EP[expert, devices]
        load_EP[expert, devices] = np.maximum(_water_level(others, load_EP[expert].sum()) - others, 0)
    return load_EP


def level_in_rounds(load_EP, here_EP, xp=np, repeat: Callable = _repeated):
    """The same with all replicated experts at once, each in part, so that few operations do: what a step has time for.

    Of m replicated experts on a device each moves 1/m of its way in a round, since together they would fill it m times;
    at most half, as two may share two devices. A round goes on with part of the move before. No device ends above the
    most loaded one before: where rounds lead there, the loads stay. xp, repeat: NumPy and a loop, or those of JAX.
    """
    replicated_EP = here_EP & (xp.sum(here_EP, axis=1, keepdims=True) > 1)
    step = 1 / xp.maximum(xp.max(xp.sum(replicated_EP, axis=0)), 2)
    total_E1 = xp.sum(load_EP, axis=1, keepdims=True)
    vessels_1P = xp.arange(1, here_EP.shape[1] + 1)[None]

    def once(_, both):
        load_EP, move_EP = both
        others_EP = xp.where(here_EP, xp.sum(load_EP, axis=0, keepdims=True) - load_EP, xp.inf)
        ascending_EP = xp.sort(others_EP, axis=1)
        finite_EP = xp.isfinite(ascending_EP)
        levels_EP = (total_E1 + xp.cumsum(xp.where(finite_EP, ascending_EP, 0), axis=1)) / vessels_1P
        last_E1 = xp.maximum(xp.sum(finite_EP & (levels_EP >= ascending_EP), axis=1, keepdims=True) - 1, 0)
        filled_EP = xp.take_along_axis(levels_EP, last_E1, axis=1) - others_EP
        filled_EP = xp.where(here_EP, xp.maximum(filled_EP, 0), 0)
        move_EP = MOMENTUM * move_EP + step * (filled_EP - load_EP)
        return load_EP + move_EP, move_EP

    new_EP = xp.maximum(repeat(0, ROUNDS, once, (load_EP, xp.zeros_like(load_EP)))[0], 0)
    new_E1 = xp.sum(new_EP, axis=1, keepdims=True)
    new_EP = xp.where(new_E1 > 0, new_EP * (total_E1 / xp.where(new_E1 > 0, new_E1, 1)), load_EP)
    no_worse = xp.max(xp.sum(new_EP, axis=0)) <= xp.max(xp.sum(load_EP, axis=0))
    return xp.where(no_worse, new_EP, load_EP)


def _water_level(heights: np.ndarray, volume: float) -> float:
    """To which height that volume fills vessels that stand at these heights."""
    ascending = np.sort(heights)
    levels = (volume + np.cumsum(ascending)) / np.arange(1, len(heights) + 1)
    return float(levels[np.flatnonzero(levels >= ascending)[-1]])


def levelled(slot_map: SlotMap, loads_E: np.ndarray) -> SlotMap:
    """The same slots with shares for other loads, as a step makes them from its own counts. loads_E: as of the map."""
    num_experts = slot_map.slots_PS.max() + 1
    require(len(loads_E) == num_experts, "loads", len(loads_E), f"must be of the map's {num_experts} experts")
    loads_E = np.asarray(loads_E, float)
    load_EP, here_EP = _by_device(slot_map, loads_E)
    return _slot_map(level_in_rounds(load_EP, here_EP), here_EP, slot_map.slots_PS.shape[1])


def _by_device(slot_map: SlotMap, loads_E: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The loads as the map splits them, [E, P], and where each expert has a slot: the inverse of `_slot_map`."""
    load_EP = np.zeros((len(loads_E), len(slot_map.slots_PS)))
    here_EP = np.zeros(load_EP.shape, bool)
    for device, (experts, shares) in enumerate(zip(slot_map.slots_PS, slot_map.shares_PS, strict=True)):
        used = experts != EMPTY
        here_EP[experts[used], device] = True
        load_EP[experts[used], device] = loads_E[experts[used]] * shares[used]
    return load_EP, here_EP


def _slot_map(load_EP: np.ndarray, here_EP: np.ndarray, num_slots: int) -> SlotMap:
    """The map in which device p has the experts `here_EP[:, p]`, ascending; experts without tokens: equal shares."""
    weight_EP = np.where(load_EP.any(axis=1, keepdims=True), load_EP, here_EP)
    share_EP = weight_EP / weight_EP.sum(axis=1, keepdims=True)
    slots_PS = np.full((here_EP.shape[1], num_slots), EMPTY)
    shares_PS = np.zeros(slots_PS.shape)
    for device, here_E in enumerate(here_EP.T):
        experts = np.flatnonzero(here_E)
        slots_PS[device, : len(experts)] = experts
        shares_PS[device, : len(experts)] = share_EP[experts, device]
    return SlotMap(slots_PS, shares_PS)


def _homes(loads_E: np.ndarray, num_devices: int) -> SlotMap:
    """Algorithm 2, refined."""
    return in_order(len(loads_E), num_devices).renamed(place(loads_E, num_devices, "refined"))
