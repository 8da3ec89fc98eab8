"""Algorithm 2, expert rearranging (paper section 3.3): equal groups of experts with even token loads.

`greedy` is the printed algorithm: heaviest expert first, each to the lightest device that has room.
The code corrects two errors in the print: it marks a full device by an infinite sum, which loses the
sum, and it never ends when the experts do not divide by the devices. The result is the permutation, not
the reordered loads, because all that belongs to an expert has to follow it. `refined` then makes
the best pairwise swaps.

Axes: E experts, G devices, K slots of a device; slot s lies on device s // K.
"""

import itertools
import math

import numpy as np

from laep_jax.config_parts import PLACEMENTS as METHODS
from laep_jax.errors import require

MAX_SEARCHED = 12  # experts: at most 15,400 placements, some milliseconds


def place(loads_E: np.ndarray, num_groups: int, method: str) -> np.ndarray:
    """The expert of each slot, [E] int64, so that `loads_E[place(...)]` is in device order.

    loads_E: tokens of each expert, non-negative. Ties go to the lower index. `UserError` where E is
    not a multiple of `num_groups`.

    >>> place(np.array([9, 8, 7, 1, 1, 1]), num_groups=3, method="greedy").tolist()
    [0, 5, 1, 4, 2, 3]
    """
    require(method in METHODS, "placement", method, f"must be one of {', '.join(METHODS)}")
    size = _group_size(len(loads_E), num_groups)
    loads_E = _integers(np.asarray(loads_E))
    slots_GK = _greedy(loads_E, num_groups, size)
    if method == "refined":
        _refine(loads_E, slots_GK)
    return slots_GK.ravel()


def device_loads(loads_E: np.ndarray, permutation: np.ndarray, num_groups: int) -> np.ndarray:
    """Tokens on each device, [G], with expert `permutation[s]` in slot s."""
    return loads_E[permutation].reshape(num_groups, _group_size(len(loads_E), num_groups)).sum(axis=1)


def lower_bound(loads_E: np.ndarray, num_groups: int) -> float:
    """A lower bound on the load of the most loaded device in equal groups, in the units of `loads_E`.

    With at most two experts on a device, or at most MAX_SEARCHED in all, the best placement has this load. Otherwise
    it is the mean device load, or the heaviest expert with the K - 1 lightest beside it, whichever is more.

    >>> lower_bound(np.array([9, 8, 7, 1, 1, 1]), num_groups=3)
    10.0
    """
    size = _group_size(len(loads_E), num_groups)
    ascending = np.sort(loads_E)
    if size == 2:  # the heaviest with the lightest, and so on
        return float((ascending + ascending[::-1]).max())
    if len(loads_E) <= MAX_SEARCHED:
        return float(_least_largest(ascending[::-1].tolist(), size, math.inf))
    return max(float(ascending.sum() / num_groups), float(ascending[-1] + ascending[: size - 1].sum()))


def _least_largest(loads: list, size: int, below: float) -> float:
    """The least possible largest group load, by trying all groups around the first load; at most `below`."""
    if not loads:
        return 0
    first, *others = loads
    for group in itertools.combinations(range(len(others)), size - 1):
        load = first + sum(others[i] for i in group)
        if load < below:
            rest = [other for i, other in enumerate(others) if i not in group]
            below = min(below, max(load, _least_largest(rest, size, below)))
    return below


def _group_size(num_experts: int, num_groups: int) -> int:
    require(
        num_experts > 0 and num_experts % num_groups == 0,
        "num_experts",
        num_experts,
        f"is not divisible by expert_parallel={num_groups}",
    )
    return num_experts // num_groups


def _integers(loads_E: np.ndarray) -> np.ndarray:
    """Loads as int64, so that sums compare exactly and swapping must end.

    Floats become multiples of 2**-60 of their total or finer, less than float64 resolves of that.
    """
    if loads_E.dtype.kind in "iu":
        return loads_E.astype(np.int64)
    assert (np.isfinite(loads_E) & (loads_E >= 0)).all(), loads_E
    _, exponent = np.frexp(loads_E.sum(dtype=np.float64))
    return np.rint(np.ldexp(loads_E.astype(np.float64), 61 - exponent)).astype(np.int64)


def _greedy(loads_E: np.ndarray, num_groups: int, size: int) -> np.ndarray:
    """[G, K] experts: each, by (-load, index), to the lightest group with room, the lowest of equals."""
    groups: list[list[int]] = [[] for _ in range(num_groups)]
    sums = [0] * num_groups
    for expert in np.argsort(-loads_E, kind="stable").tolist():
        group = min((g for g in range(num_groups) if len(groups[g]) < size), key=sums.__getitem__)
        groups[group].append(expert)
        sums[group] += int(loads_E[expert])
    return np.array(groups, np.int64)


def _refine(loads_E: np.ndarray, slots_GK: np.ndarray) -> None:
    """Swaps experts between two devices, in place, until no swap lowers the heavier of the two.

    Each swap lowers the device loads, sorted from the largest and compared like words; there are
    finitely many placements, so this ends.
    """
    while swap := _best_swap(loads_E[slots_GK]):
        one, other = swap
        slots_GK[one], slots_GK[other] = slots_GK[other], slots_GK[one]


def _best_swap(loads_GK: np.ndarray) -> tuple[tuple[int, int], tuple[int, int]] | None:
    """The two slots to swap, from the heaviest device that a swap can relieve; None where there is none.

    Among its swaps the one that leaves the smallest load on the heavier of the two devices.
    """
    sums_G = loads_GK.sum(axis=1)
    for heavy in np.argsort(-sums_G, kind="stable").tolist():
        moved_KGK = loads_GK[heavy][:, None, None] - loads_GK
        helps_KGK = (moved_KGK > 0) & (moved_KGK < (sums_G[heavy] - sums_G)[:, None])
        if helps_KGK.any():
            heavier_KGK = np.maximum(sums_G[heavy] - moved_KGK, sums_G[:, None] + moved_KGK)
            heavier_KGK[~helps_KGK] = np.iinfo(np.int64).max
            slot, group, other = np.unravel_index(heavier_KGK.argmin(), heavier_KGK.shape)
            return (heavy, int(slot)), (int(group), int(other))
    return None
