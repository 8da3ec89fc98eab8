"""Losses far off those before."""

from collections.abc import Sequence

import numpy as np

RECENT = 64  # losses to compare with
MIN_RECENT = 16  # of them, to say anything
FAR = 8.0  # standard deviations, of the noise and not of the outliers
MIN_SPREAD = 0.005  # of the median: where losses hardly waver


def is_spike(loss: float, recent: Sequence[float]) -> bool:
    """Whether a loss is far above the median of the recent ones, in units of their median absolute deviation.

    >>> is_spike(2.1, [2.0, 1.9] * 10), is_spike(3.0, [2.0, 1.9] * 10)
    (False, True)
    """
    if len(recent) < MIN_RECENT:
        return False
    median = float(np.median(recent))
    spread = 1.4826 * float(np.median(np.abs(np.asarray(recent) - median)))  # of normal noise: its deviation
    return loss > median + FAR * max(spread, MIN_SPREAD * median)
