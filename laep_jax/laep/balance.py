"""How evenly loads are spread over experts or devices (paper section 3.3): imbalance, device loads, the least possible.

Axes: E experts in slot order, G devices; device g has the g-th of G equal groups of neighbouring slots.
"""

import itertools
import math

import numpy as np

from laep_jax.errors import require_divisible

MAX_SEARCHED = 12  # experts: at most 15,400 placements, some milliseconds


def imbalance(loads: np.ndarray) -> float:
    """Max / mean of the loads of experts or of devices; 1.0, as for equal loads, where there is no load.

    >>> imbalance(np.array([30, 10, 20])), imbalance(np.zeros(3))
    (1.5, 1.0)
    """
    return float(loads.max() / loads.mean()) if loads.any() else 1.0


def device_loads(loads_E: np.ndarray, num_groups: int) -> np.ndarray:
    """Tokens on each device, [G]. `UserError` where E is not divisible by `num_groups`.

    >>> device_loads(np.array([9, 1, 8, 1, 7, 1]), num_groups=3).tolist()
    [10, 9, 8]
    """
    return loads_E.reshape(num_groups, group_size(len(loads_E), num_groups)).sum(axis=1)


def group_size(num_experts: int, num_groups: int) -> int:
    """Experts of a device. `UserError` where the groups cannot be equal."""
    require_divisible("num_experts", num_experts, "expert_parallel", num_groups)
    return num_experts // num_groups


def lower_bound(loads_E: np.ndarray, num_groups: int) -> float:
    """What the largest device load cannot be below in equal groups, in the units of `loads_E`.

    With at most two experts on a device, or at most MAX_SEARCHED in all, the best placement has this load. Otherwise
    it is the mean device load, or the heaviest expert with the lightest that fill its device, whichever is more.

    >>> lower_bound(np.array([9, 8, 7, 1, 1, 1]), num_groups=3)
    10.0
    """
    size = group_size(len(loads_E), num_groups)
    ascending = np.sort(loads_E)
    if size == 2:  # the heaviest with the lightest, and so on
        return float((ascending + ascending[::-1]).max())
    if len(loads_E) <= MAX_SEARCHED:
        return float(_least_largest(ascending[::-1].tolist(), size, math.inf))
    return max(float(ascending.sum() / num_groups), float(ascending[-1] + ascending[: size - 1].sum()))


def _least_largest(loads: list, size: int, below: float) -> float:
    """The least that the largest group load can be, by trying all groups around the first load; at most `below`."""
    if not loads:
        return 0
    first, *others = loads
    for group in itertools.combinations(range(len(others)), size - 1):
        load = first + sum(others[i] for i in group)
        if load < below:
            rest = [other for i, other in enumerate(others) if i not in group]
            below = min(below, max(load, _least_largest(rest, size, below)))
    return below
