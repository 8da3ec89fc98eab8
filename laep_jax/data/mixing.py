"""In which order the rows of one corpus or of several are read. A single one is a mixture of one.

Rows of all sources are numbered through, those of the first source first. Grain's random access mixes them: how many
rows of a source come before a place depends on the place and the weights only, and every stretch of rows has the
sources in their fractions, to a row or two.
Axes: N sources, B rows, S sequence, T = S + 1.
"""

import itertools
from collections.abc import Sequence

import grain
import numpy as np

from laep_jax.data.packing import PADDING, document_indices, num_rows, split_rows

SMALLEST = 100  # what grain makes of the smallest weight, before it rounds the others down


def shares(weights: Sequence[float]) -> list[int]:
    """Weights as whole numbers of which the smallest is SMALLEST: grain takes these as they are.

    Rounding moves a weight by at most half a percent.

    >>> shares([0.7, 0.3]), shares([7, 3]), shares([2.5])
    ([233, 100], [233, 100], [100])
    """
    return [round(SMALLEST * weight / min(weights)) for weight in weights]


class Rows:
    """The rows of several streams of tokens. counts_N: how many each has."""

    def __init__(self, streams: Sequence[np.ndarray], sequence_length: int):
        self.streams, self.sequence_length = streams, sequence_length
        self.counts_N = [num_rows(stream, sequence_length) for stream in streams]
        self._bounds = list(itertools.pairwise(itertools.accumulate(self.counts_N, initial=0)))

    def numbers(self) -> list[range]:
        """Of each source."""
        return [range(*bounds) for bounds in self._bounds]

    def own(self, rows_B: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
        """For each source: which of the rows are its own, bool [B]; and their numbers in its own stream."""
        masks = [(first <= rows_B) & (rows_B < end) for first, end in self._bounds]
        return [(own_B, rows_B[own_B] - first) for own_B, (first, _) in zip(masks, self._bounds, strict=True)]

    def tokens(self, rows_B: np.ndarray) -> np.ndarray:
        """The rows and the token after each, int32 [B, T]; PADDING past the end of a stream and past the last row."""
        tokens_BT = np.full((len(rows_B), self.sequence_length + 1), PADDING, np.int32)
        for stream, (own_B, local) in zip(self.streams, self.own(rows_B), strict=True):
            tokens_BT[own_B] = split_rows(stream, local, self.sequence_length)
        return tokens_BT

    def runs(self, rows_B: np.ndarray, ends: Sequence[np.ndarray]) -> np.ndarray:
        """For each target the index of its run, [B, S]: 0, 1, ... through all sources; the last one on padding.

        ends: for each source the place of the last token of each of its runs.
        """
        runs_BS, before = np.full((len(rows_B), self.sequence_length), sum(map(len, ends)) - 1), 0
        for ends_R, (own_B, local) in zip(ends, self.own(rows_B), strict=True):
            if own_B.any():
                runs_BS[own_B] = before + document_indices(ends_R, local, self.sequence_length)
            before += len(ends_R)
        return runs_BS


def train_order(numbers: Sequence[range], shares_N: Sequence[int], seed: int) -> grain.MapDataset:
    """The row at each place, without end. Of each source: one epoch after the other, each all rows in a new order."""
    sources = [grain.MapDataset.source(rows).seed(seed).shuffle().repeat() for rows in numbers]
    return grain.MapDataset.mix(sources, shares_N)


def validation_order(numbers: Sequence[range], shares_N: Sequence[int], seed: int, most: int) -> np.ndarray:
    """The first rows of all in a mixed order, int64 [at most `most`]: every row once.

    Mixed as in training, as long as no source ends; a source that ends leaves its places to the others.
    """
    orders = [grain.MapDataset.source(rows).seed(seed).shuffle() for rows in numbers]
    taken = [np.array([order[i] for i in range(min(len(order), most))], np.int64) for order in orders]
    places = [(np.arange(len(rows)) + 0.5) / share for rows, share in zip(taken, shares_N, strict=True)]
    return np.concatenate(taken)[np.argsort(np.concatenate(places), kind="stable")[:most]]
