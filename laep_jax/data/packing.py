"""One stream of tokens cut into rows, and rows into the fields of a batch. Pure NumPy.

The stream is every document followed by the end-of-document token. Row r holds tokens r*S to r*S+S-1,
and as its last target the token after them, so that every token but the first of a document is a target
exactly once; a document split by the end of a row continues in the next as a separate segment.
Axes: B rows, S sequence, T = S + 1.
"""

import numpy as np

PADDING = -1


def num_rows(stream: np.ndarray, sequence_length: int) -> int:
    """Rows that a stream fills, the last one perhaps in part."""
    return -(-len(stream) // sequence_length)


def split_rows(stream: np.ndarray, rows_B: np.ndarray, sequence_length: int) -> np.ndarray:
    """The named rows and the token after each, int32 [B, T]; PADDING past the end of the stream."""
    places_BT = rows_B[:, None] * sequence_length + np.arange(sequence_length + 1)
    tokens_BT = stream[np.minimum(places_BT, len(stream) - 1)].astype(np.int32)
    return np.where(places_BT < len(stream), tokens_BT, np.int32(PADDING))


def document_indices(ends: np.ndarray, rows_B: np.ndarray, sequence_length: int) -> np.ndarray:
    """The document that each token of the named rows is in, and so its target, [B, S]; the last one on padding.

    ends: where each document's last token is, ascending; or that of each run of documents.
    """
    places_BS = rows_B[:, None] * sequence_length + np.arange(sequence_length)
    return np.searchsorted(ends, np.minimum(places_BS, ends[-1]))


def to_document_end(tokens: np.ndarray, eod: int) -> np.ndarray:
    """The tokens before the first end of a document, all of them where there is none."""
    return tokens[: np.argmax(tokens == eod)] if eod in tokens else tokens


def pack(tokens_BT: np.ndarray, eod: int) -> dict[str, np.ndarray]:
    """Model inputs and targets of rows, each int32 [B, S].

    targets_BS: the next token of the same document, -1 where there is none (after the document's end).
    segments_BS: 1, 2, ... by document within the row, 0 on padding. positions_BS: from 0 in each segment.
    """
    tokens_BS = tokens_BT[:, :-1]
    real_BS, ends_BS = tokens_BS != PADDING, tokens_BS == eod
    starts_BS = np.ones_like(real_BS)
    starts_BS[:, 1:] = ends_BS[:, :-1]
    places_S = np.arange(tokens_BS.shape[1], dtype=np.int32)
    positions_BS = places_S - np.maximum.accumulate(np.where(starts_BS, places_S, 0), axis=1)
    return {
        "tokens_BS": np.where(real_BS, tokens_BS, 0),
        "targets_BS": np.where(real_BS & ~ends_BS, tokens_BT[:, 1:], -1),
        "segments_BS": np.where(real_BS, np.cumsum(starts_BS, axis=1, dtype=np.int32), 0),
        "positions_BS": np.where(real_BS, positions_BS, 0),
    }
