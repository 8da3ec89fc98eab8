"""Throughput of the experts across devices, from the loads that the runs recorded (paper Table 5).

Each device's rows are timed by themselves (`benchmarks.straggler`), and a layer takes as long as its fullest
device. So it is that part of a step that waits for the fullest device; Table 5 is of whole steps.

Axes: L layers, G devices, S slots of a device.
"""

import numpy as np

from benchmarks.straggler import ALONE, rank_seconds
from experiments.phases import windows
from experiments.results import Result
from laep_jax.laep.balance import imbalance

ROWS = ALONE.rows_per_expert * 64  # of a layer, whatever it keeps
NOT_REARRANGED = "not rearranged"


def device_rows(result: Result, order: list[list[int]], num_devices: int) -> np.ndarray:
    """[L, G, S] rows of each slot by the last window's loads, 0 where a slot is empty. order: experts by slot."""
    last_LE = list(windows(result).values())[-1]
    slots = max(len(ids) for ids in result["order"]) // num_devices
    rows_LGS = np.zeros((len(order), num_devices, slots), np.int32)
    for layer, ids in enumerate(order):
        rows = last_LE[layer][ids]
        rows_LGS[layer, :, : len(ids) // num_devices] = np.rint(rows * (ROWS / rows.sum())).reshape(num_devices, -1)
    return rows_LGS


def measure(results: dict[str, Result], num_devices: int) -> dict[str, dict[str, float]]:
    """Throughput over that of `base`, and imbalance of the devices, of each row and of LAEP without Algorithm 2.

    results: by row, of one seed, `base` and `alpha_hybrid` among them.
    """
    rows = {name: device_rows(result, result["order"], num_devices) for name, result in results.items()}
    laep = results["alpha_hybrid"]
    rows[NOT_REARRANGED] = device_rows(laep, [sorted(ids) for ids in laep["order"]], num_devices)
    most = max(rows_LGS.shape[2] for rows_LGS in rows.values())
    rows = {name: np.pad(r, ((0, 0), (0, 0), (0, most - r.shape[2]))) for name, r in rows.items()}
    seconds = rank_seconds([rows_LGS.reshape(-1, most) for rows_LGS in rows.values()], ALONE)
    step = {name: sum(max(seconds[tuple(d)] for d in layer.tolist()) for layer in r) for name, r in rows.items()}
    return {
        "throughput": {name: step["base"] / time for name, time in step.items()},
        "device_load": {name: float(np.mean([*map(imbalance, r.sum(axis=2))])) for name, r in rows.items()},
    }
