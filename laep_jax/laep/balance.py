"""How evenly loads are spread over experts or devices (paper section 3.3): imbalance, device loads, the least possible.

Axes: E experts in slot order, G devices; device g has the g-th of G groups of neighbouring slots. The groups are equal;
where E does not divide by G, the first E % G of them have one expert more.
"""

import itertools
import math

import numpy as np

MAX_SEARCHED = 12  # experts: at most 15,400 placements, some milliseconds


def imbalance(loads: np.ndarray) -> float:
    """Max / mean of the loads of experts or of devices; 1.0, as for equal loads, where there is no load.

    >>> imbalance(np.array([30, 10, 20])), imbalance(np.zeros(3))
    (1.5, 1.0)
    """
    return float(loads.max() / loads.mean()) if loads.any() else 1.0


def device_loads(loads_E: np.ndarray, num_groups: int) -> np.ndarray:
    """Tokens on each device, [G].

    >>> device_loads(np.array([9, 1, 8, 1, 7, 1]), num_groups=3).tolist()
    [10, 9, 8]
    >>> device_loads(np.array([9, 1, 8, 1, 7]), num_groups=3).tolist()
    [10, 9, 7]
    """
    return np.array([part.sum() for part in np.array_split(loads_E, num_groups)])


def lower_bound(loads_E: np.ndarray, num_groups: int) -> float:
    """What the largest device load cannot be below, in the units of `loads_E`.

    In groups of at most two experts, or of at most MAX_SEARCHED in all, the best placement has this load. Otherwise it
    is the mean device load, or the heaviest expert with the lightest that fill a smaller device, whichever is more.

    >>> lower_bound(np.array([9, 8, 7, 1, 1, 1]), num_groups=3)
    10.0
    """
    size, longer = divmod(len(loads_E), num_groups)
    sizes = (size + 1,) * longer + (size,) * (num_groups - longer)
    ascending = np.sort(loads_E)
    if max(sizes) == 2:  # the heaviest with the lightest, and so on; what is over alone
        pairs = np.pad(ascending, (sizes.count(1), 0))
        return float((pairs + pairs[::-1]).max())
    if len(loads_E) <= MAX_SEARCHED:
        return float(_least_largest(ascending[::-1].tolist(), sizes, math.inf))
    return max(float(ascending.sum() / num_groups), float(ascending[-1] + ascending[: size - 1].sum()))


def _least_largest(loads: list, sizes: tuple[int, ...], below: float) -> float:
    """The least that the largest group load can be, by trying all groups around the first load; at most `below`."""
    if not loads:
        return 0
    first, *others = loads
    for size in {*sizes}:
        at = sizes.index(size)
        for group in itertools.combinations(range(len(others)), size - 1):
            load = first + sum(others[i] for i in group)
            if load < below:
                rest = [other for i, other in enumerate(others) if i not in group]
                below = min(below, max(load, _least_largest(rest, sizes[:at] + sizes[at + 1 :], below)))
    return below
