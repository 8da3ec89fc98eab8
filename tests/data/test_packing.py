"""Rows against a loop over documents, cell by cell."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from laep_jax.data.packing import num_rows, pack, split_rows

EOD = 9
DOCUMENTS = st.lists(st.lists(st.integers(0, 8), max_size=12), min_size=1, max_size=8)
FIELDS = ("tokens_BS", "targets_BS", "segments_BS", "positions_BS")


def stream_of(documents):
    return np.array([token for document in documents for token in [*document, EOD]], np.uint16)


def rows_of(stream, length, rows):
    return pack(split_rows(stream, np.array(rows), length), EOD)


def by_loop(documents, length):
    """The cells (token, target, segment, position) of every row, padded to full rows."""
    cells = []
    for document in documents:
        tokens = [*document, EOD]
        position = 0
        for i, token in enumerate(tokens):
            if len(cells) % length == 0:
                segment = position = 0
            if position == 0:
                segment += 1
            cells.append((token, tokens[i + 1] if token != EOD else -1, segment, position))
            position += 1
    return cells + [(0, -1, 0, 0)] * (-len(cells) % length)


@given(DOCUMENTS, st.integers(2, 7))
def test_rows_are_those_of_a_loop(documents, length):
    stream = stream_of(documents)
    batch = rows_of(stream, length, range(num_rows(stream, length)))
    cells = np.array(by_loop(documents, length)).reshape(-1, length, 4)
    for i, name in enumerate(FIELDS):
        assert batch[name].dtype == np.int32
        np.testing.assert_array_equal(batch[name], cells[:, :, i], err_msg=name)


@given(DOCUMENTS, st.integers(2, 7))
def test_every_token_but_the_first_of_a_document_is_a_target_once(documents, length):
    stream = stream_of(documents)
    targets_BS = rows_of(stream, length, range(num_rows(stream, length)))["targets_BS"]
    expected = [token for document in documents for token in [*document, EOD][1:]]
    assert targets_BS[targets_BS >= 0].tolist() == expected


def test_worked_example():
    batch = rows_of(stream_of([[1, 2], [3, 4, 5, 6]]), 5, [0, 1])
    assert batch["tokens_BS"].tolist() == [[1, 2, 9, 3, 4], [5, 6, 9, 0, 0]]
    assert batch["targets_BS"].tolist() == [[2, 9, -1, 4, 5], [6, 9, -1, -1, -1]]
    assert batch["segments_BS"].tolist() == [[1, 1, 1, 2, 2], [1, 1, 1, 0, 0]]
    assert batch["positions_BS"].tolist() == [[0, 1, 2, 0, 1], [0, 1, 2, 0, 0]]


def test_rows_past_the_end_are_padding_and_rows_come_as_asked():
    stream = stream_of([[1, 2, 3], [4, 5, 6]])
    batch, alone = rows_of(stream, 4, [2, 1, 7]), rows_of(stream, 4, [1])
    for row in (0, 2):
        assert [batch[name][row].tolist() for name in FIELDS] == [[0] * 4, [-1] * 4, [0] * 4, [0] * 4]
    for name in FIELDS:
        assert batch[name][1].tolist() == alone[name][0].tolist()
