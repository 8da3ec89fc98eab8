"""Algorithm 2, expert rearranging (paper section 3.3): groups of as many experts with even token loads.

`greedy` is the printed algorithm: heaviest expert first, each to the lightest device that has room.
Two things in the print are mended: it marks a full device by an infinite sum, which loses the sum,
and it never ends when the experts do not divide by the devices; here the first devices then have room for one more.
The result is the permutation, not the reordered loads, because all that belongs to an expert has to follow it.
`refined` then makes the best pairwise swaps.

Axes: E experts, G devices, K slots of a device, the last of which may be EMPTY.
"""

import numpy as np

from laep_jax.config_parts import PLACEMENTS as METHODS

EMPTY = -1


def place(loads_E: np.ndarray, num_groups: int, method: str) -> np.ndarray:
    """The experts by device, [E] int64, so that `loads_E[place(...)]` is in the order of `balance.device_loads`.

    loads_E: tokens of each expert, non-negative. Ties go to the lower index.

    >>> place(np.array([9, 8, 7, 1, 1, 1]), num_groups=3, method="greedy").tolist()
    [0, 5, 1, 4, 2, 3]
    """
    assert method in METHODS, method
    loads_E = integers(np.asarray(loads_E))
    slots_GK = _greedy(loads_E, num_groups)
    if method == "refined":
        _refine(np.append(loads_E, 0), slots_GK)  # the load of EMPTY, which is the last index
    return slots_GK[slots_GK != EMPTY]


def integers(loads_E: np.ndarray) -> np.ndarray:
    """Loads as int64, so that sums compare exactly and swapping must end.

    Floats become multiples of 2**-60 of their total or finer, less than float64 resolves of that.
    """
    if loads_E.dtype.kind in "iu":
        return loads_E.astype(np.int64)
    assert (np.isfinite(loads_E) & (loads_E >= 0)).all(), loads_E
    _, exponent = np.frexp(loads_E.sum(dtype=np.float64))
    return np.rint(np.ldexp(loads_E.astype(np.float64), 61 - exponent)).astype(np.int64)


def _greedy(loads_E: np.ndarray, num_groups: int) -> np.ndarray:
    """[G, K] experts: each, by (-load, index), to the lightest group with room, the lowest of equals."""
    room = [len(part) for part in np.array_split(loads_E, num_groups)]
    groups: list[list[int]] = [[] for _ in range(num_groups)]
    sums = [0] * num_groups
    for expert in np.argsort(-loads_E, kind="stable").tolist():
        group = min((g for g in range(num_groups) if len(groups[g]) < room[g]), key=sums.__getitem__)
        groups[group].append(expert)
        sums[group] += int(loads_E[expert])
    return np.array([group + [EMPTY] * (room[0] - len(group)) for group in groups], np.int64)


def _refine(loads_X: np.ndarray, slots_GK: np.ndarray) -> None:
    """Swaps experts between two devices, in place, until no swap lowers the heavier of the two.

    Each swap lowers the device loads, sorted from the largest and compared like words; there are
    finitely many placements, so this ends.
    """
    while swap := _best_swap(loads_X[slots_GK], slots_GK != EMPTY):
        one, other = swap
        slots_GK[one], slots_GK[other] = slots_GK[other], slots_GK[one]


def _best_swap(loads_GK: np.ndarray, is_used_GK: np.ndarray) -> tuple[tuple[int, int], tuple[int, int]] | None:
    """The two slots to swap, from the heaviest device that a swap can relieve; None where there is none.

    Among its swaps the one that leaves the smallest load on the heavier of the two devices.
    """
    sums_G = loads_GK.sum(axis=1)
    for heavy in np.argsort(-sums_G, kind="stable").tolist():
        moved_KGK = loads_GK[heavy][:, None, None] - loads_GK
        helps_KGK = is_used_GK & (moved_KGK > 0) & (moved_KGK < (sums_G[heavy] - sums_G)[:, None])
        if helps_KGK.any():
            heavier_KGK = np.maximum(sums_G[heavy] - moved_KGK, sums_G[:, None] + moved_KGK)
            heavier_KGK[~helps_KGK] = np.iinfo(np.int64).max
            slot, group, other = np.unravel_index(heavier_KGK.argmin(), heavier_KGK.shape)
            return (heavy, int(slot)), (int(group), int(other))
    return None
