"""Imbalance, device loads and the lower bound by hand."""

import numpy as np
import pytest

from laep_jax.laep.balance import device_loads, imbalance, lower_bound


def test_imbalance_and_device_loads_by_hand():
    loads_E = np.array([4, 0, 1, 3])
    assert imbalance(loads_E) == 2.0
    assert device_loads(loads_E, 2).tolist() == [4, 4]
    assert imbalance(device_loads(loads_E, 2)) == 1.0
    assert imbalance(loads_E / 7) == pytest.approx(2.0)
    assert device_loads(loads_E, 3).tolist() == [4, 1, 3]  # four experts on three devices: the first has two
    assert lower_bound(loads_E, 3) == 4


@pytest.mark.parametrize(
    ("loads", "num_groups", "bound"),
    [
        ([100, 3, 2, 1], 2, 101),
        ([3, 3, 3, 3], 2, 6),
        ([5, 1, 1], 1, 7),
        ([8, 7, 6, 5, 4, 0], 2, 15),
        ([9, 8, 7, 6, 5, 4, 3, 2, 1, 0, 0, 0], 4, 12),  # 9 2 1, 8 3 0, 7 4 0, 6 5 0
        ([10] * 8 + [9] * 6, 7, 20),  # pairs: the mean of 19.14 is out of reach
        ([344, 224, 132, 127, 69, 69, 30], 3, 374),  # two devices of two experts: none has 344 alone
        ([9, 5, 4, 3], 3, 9),
        ([10] * 9 + [0] * 9, 6, 15),  # three a device: 20 at best, the bound is the mean
    ],
)
def test_the_bound_by_hand(loads, num_groups, bound):
    assert lower_bound(np.array(loads), num_groups) == bound
