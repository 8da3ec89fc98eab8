"""Placing the survivors: by whose loads, and how near to the best is greedy? (paper section 3.3)

Every placement is judged by the loads of the run's last window. Axes: E experts, G devices.
"""

import statistics

import numpy as np
import scipy.optimize

from experiments.phases import windows
from experiments.results import Result
from laep_jax.laep.balance import device_loads, imbalance
from laep_jax.laep.placement import METHODS, place

SOLVER = {"time_limit": 20.0, "mip_rel_gap": 1e-3}  # a layer


def optimal(loads_E: np.ndarray, num_groups: int) -> np.ndarray:
    """The expert of each slot, as `place`, by mixed-integer programming: as good as 20 s make it."""
    num_experts = len(loads_E)
    size = num_experts // num_groups
    # x[e, g]: expert e lies on device g; the last variable is the largest device load
    one_place = np.kron(np.eye(num_experts), np.ones(num_groups))
    full = np.kron(np.ones(num_experts), np.eye(num_groups))
    load = np.kron(loads_E / loads_E.sum(), np.eye(num_groups))
    pad = [np.pad(rows, ((0, 0), (0, 1))) for rows in (one_place, full)]
    below = np.hstack([load, -np.ones((num_groups, 1))])
    found = scipy.optimize.milp(
        np.append(np.zeros(num_experts * num_groups), 1.0),
        integrality=np.append(np.ones(num_experts * num_groups), 0),
        bounds=scipy.optimize.Bounds(0, 1),
        constraints=[
            scipy.optimize.LinearConstraint(pad[0], 1, 1),
            scipy.optimize.LinearConstraint(pad[1], size, size),
            scipy.optimize.LinearConstraint(below, -np.inf, 0),
        ],
        options=SOLVER,
    )
    if found.x is None:
        raise RuntimeError(f"no placement was found: {found.message}")
    groups_E = found.x[:-1].reshape(num_experts, num_groups).argmax(axis=1)
    return np.argsort(groups_E, kind="stable")


def measure(results: dict[str, Result], num_devices: int) -> dict[str, dict[str, float]]:
    """Imbalance (max / mean) of the devices, the mean over the layers, by placement of what `alpha_hybrid` keeps."""
    result = results["alpha_hybrid"]
    before, after, last = (windows(result)[step] for step in sorted(windows(result)))
    found: dict[str, list[float]] = {}
    for layer, order in enumerate(result["order"]):
        kept = np.sort(order)
        placements = {"as before": np.arange(len(kept))}
        for name, loads_LE in (("old model", before), ("pruned model", after)):
            loads_E = loads_LE[layer][kept]
            placements |= {f"{method}, {name}": place(loads_E, num_devices, method) for method in METHODS}
            placements[f"optimal, {name}"] = optimal(loads_E, num_devices)
        placements["of the run"] = np.searchsorted(kept, order)
        for name, places in placements.items():
            loads_G = device_loads(last[layer][kept][places], num_devices)
            found.setdefault(name, []).append(imbalance(loads_G))
    return {"device_load": {name: statistics.fmean(ratios) for name, ratios in found.items()}}
