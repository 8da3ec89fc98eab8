"""A small made-up corpus, the same on every machine: topics with their own letters, words and phrases.

Topics, phrases and words are drawn by Zipf's law (the r-th has weight 1/r), so that a few are frequent:
experts that specialise get skewed loads. Built on PCG64's raw output alone, which NumPy keeps for ever.
Axes: P phrases.
"""

from collections.abc import Iterator

import numpy as np

NUM_TOPICS, NUM_WORDS, NUM_PHRASES = 16, 120, 240  # words and phrases of each topic
NUM_DOCUMENTS, MAX_DOCUMENT = 512, 180  # in phrases
LETTERS = b"abcdefghijklmnopqrstuvwxyz"


class _Zipf:
    """Draws ranks 0, 1, ... with weight 1 / (rank + 1)."""

    def __init__(self, seed: int):
        self.bits = np.random.PCG64(seed)

    def uniform(self, size: int) -> np.ndarray:
        return (self.bits.random_raw(size) >> np.uint64(11)) * 2.0**-53

    def integers(self, low: int, high: int, size: int) -> np.ndarray:
        """Uniform in low, ..., high - 1."""
        return low + (self.uniform(size) * (high - low)).astype(np.int64)

    def ranks(self, number: int, size: int) -> np.ndarray:
        cumulative = np.cumsum(1 / np.arange(1, number + 1))
        return np.searchsorted(cumulative, self.uniform(size) * cumulative[-1], side="right")


def synthetic_documents() -> Iterator[tuple[str, bytes]]:
    """(name, text) of every document; a name is `topic-NN/NNNN`. About 1.7 MB."""
    topics = [_phrases(topic) for topic in range(NUM_TOPICS)]
    draw = _Zipf(NUM_TOPICS)
    lengths = draw.integers(MAX_DOCUMENT // 4, MAX_DOCUMENT + 1, NUM_DOCUMENTS)
    for index, topic in enumerate(draw.ranks(NUM_TOPICS, NUM_DOCUMENTS)):
        ranks_P = draw.ranks(NUM_PHRASES, int(lengths[index]))
        yield f"topic-{topic:02d}/{index:04d}", b"\n".join(topics[topic][rank] for rank in ranks_P) + b"\n"


def _phrases(topic: int) -> list[bytes]:
    """The phrases of one topic, most frequent first: 3 to 6 words each, of 2 to 8 letters."""
    draw = _Zipf(topic)
    letters = bytes(LETTERS[i] for i in np.argsort(draw.uniform(len(LETTERS)), kind="stable"))

    def word(length: int) -> bytes:
        return bytes(letters[rank] for rank in draw.ranks(len(letters), length))

    words = [word(length) for length in draw.integers(2, 9, NUM_WORDS)]
    return [
        b" ".join(words[rank] for rank in draw.ranks(NUM_WORDS, length))
        for length in draw.integers(3, 7, NUM_PHRASES).tolist()
    ]
