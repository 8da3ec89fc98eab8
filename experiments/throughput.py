"""Throughput of the experts across devices, from the loads that the runs recorded (paper Table 5).

Each device's rows are timed by themselves (`benchmarks.straggler`), and a layer takes as long as its most loaded
device. So it is that part of a step that waits for the most loaded device; Table 5 is of whole steps.

Axes: L layers, E experts, P devices, S slots of a device.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from benchmarks.replay import rows_of_slots, with_slots
from benchmarks.straggler import ALONE, rank_seconds
from experiments.phases import windows
from experiments.results import Result
from laep_jax.laep.balance import imbalance
from laep_jax.laep.slots import SlotMap, in_order

ROWS = ALONE.rows_per_expert * 64  # of a layer, whatever it keeps
LAEP = "alpha_hybrid"
NOT_REARRANGED = "not rearranged"
PLANNED_FROM = 300  # the step from which on replicas are planned by the first window, some after the prune at 260


def measure(results: dict[str, Result], num_devices: int) -> dict[str, dict[str, float]]:
    """Throughput over that of `base`, and imbalance of the devices, of each row, and of what is not run but placed.

    results: by row, of one seed, `base` and LAEP among them. Not run: LAEP without Algorithm 2, and with replica slots,
    which are planned by a window after the prune and judged, as all of it, by the last one, about 190 steps later.
    """
    maps = {name: _in_order(result["order"], num_devices) for name, result in results.items()}
    maps[NOT_REARRANGED] = _in_order([sorted(ids) for ids in results[LAEP]["order"]], num_devices)
    of_row = {name: name for name in results} | {NOT_REARRANGED: LAEP}
    for name, slots in {"base": (1,), LAEP: (1, 2)}.items():
        placed = _with_slots(results[name], name, num_devices, slots)
        maps |= placed
        of_row |= dict.fromkeys(placed, name)
    rows = {name: device_rows(results[of_row[name]], layers) for name, layers in maps.items()}
    most = max(rows_LPS.shape[2] for rows_LPS in rows.values())
    rows = {name: np.pad(r, ((0, 0), (0, 0), (0, most - r.shape[2]))) for name, r in rows.items()}
    seconds = rank_seconds([rows_LPS.reshape(-1, most) for rows_LPS in rows.values()], ALONE)
    step = {name: sum(max(seconds[tuple(d)] for d in layer.tolist()) for layer in r) for name, r in rows.items()}
    return {
        "throughput": {name: step["base"] / time for name, time in step.items()},
        "device_load": {name: float(np.mean([*map(imbalance, r.sum(axis=2))])) for name, r in rows.items()},
    }


def _in_order(order: Sequence[Sequence[int]], num_devices: int) -> list[SlotMap]:
    return [in_order(len(ids), num_devices).renamed(np.array(ids)) for ids in order]


def _with_slots(result: Result, name: str, num_devices: int, slots: Sequence[int]) -> dict[str, list[SlotMap]]:
    """Maps of the layers by name; `planned` and `levelled`."""
    loads = windows(result)
    planned_LE, last_LE = loads[min(step for step in loads if step >= PLANNED_FROM)], loads[max(loads)]
    layers = [
        with_slots(name, np.sort(ids), planned_LE[layer], last_LE[layer], num_devices, slots)
        for layer, ids in enumerate(result["order"])
    ]
    return {variant: [maps[variant] for maps in layers] for variant in layers[0]}


def device_rows(result: Result, maps: Sequence[SlotMap]) -> np.ndarray:
    """[L, P, S] rows of each slot by the last window's loads, 0 where a slot is empty."""
    loads: Mapping[int, np.ndarray] = windows(result)
    layers = []
    for slot_map, ids, loads_E in zip(maps, result["order"], loads[max(loads)], strict=True):
        kept_E = np.where(np.isin(np.arange(len(loads_E)), ids), loads_E, 0)
        layers.append(rows_of_slots(slot_map, np.rint(kept_E * (ROWS / kept_E.sum())).astype(int)))
    most = max(rows_PS.shape[1] for rows_PS in layers)
    return np.stack([np.pad(rows_PS, ((0, 0), (0, most - rows_PS.shape[1]))) for rows_PS in layers]).astype(np.int32)
