"""Counts from anywhere are checked by name, and the history gives back what it was told."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from laep_jax.errors import UserError
from laep_jax.laep.load import LoadHistory, as_counts


def recorded(steps, num_experts=(3, 2), capacity=8) -> LoadHistory:
    """A history in which each count tells its step, layer and expert: 100 * step + 10 * layer + expert."""
    history = LoadHistory(num_experts, capacity)
    for step in steps:
        history.record(
            step, [100 * step + 10 * layer + np.arange(experts) for layer, experts in enumerate(num_experts)]
        )
    return history


def same(a: LoadHistory, b: LoadHistory) -> bool:
    arrays, others = a.to_arrays(), b.to_arrays()
    return arrays.keys() == others.keys() and all(np.array_equal(arrays[name], others[name]) for name in arrays)


def test_an_array_is_split_into_layers():
    tokens_NLE = np.arange(24).reshape(2, 3, 4)
    counts = as_counts(tokens_NLE)
    assert [tokens_NE.tolist() for tokens_NE in counts] == [tokens_NLE[:, layer].tolist() for layer in range(3)]
    assert all(tokens_NE.dtype == np.int64 for tokens_NE in counts)


@pytest.mark.parametrize("dtype", ["int8", "uint16", "int32", "uint64", "float16", "float32", "float64"])
def test_whole_numbers_of_any_type_pass(dtype):
    (tokens_NE,) = as_counts(np.array([[[0, 7, 100]]], dtype))
    assert tokens_NE.dtype == np.int64
    assert tokens_NE.tolist() == [[0, 7, 100]]


def test_layers_may_differ_in_their_experts():
    counts = as_counts([np.ones((2, 3), int), np.array([[2.0], [3.0]])])
    assert [tokens_NE.tolist() for tokens_NE in counts] == [[[1, 1, 1], [1, 1, 1]], [[2], [3]]]


def test_counts_are_a_copy():
    tokens_NLE = np.ones((1, 1, 2), np.int64)
    (tokens_NE,) = as_counts(tokens_NLE)
    tokens_NLE[:] = 5
    assert tokens_NE.tolist() == [[1, 1]]


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (np.ones((2, 3), int), r"tokens_per_expert.shape=\(2, 3\) must be \[iterations, layers, experts\]"),
        (np.ones((1, 2, 3, 4), int), r"tokens_per_expert.shape=\(1, 2, 3, 4\) must be"),
        ([], r"tokens_per_expert=\[\] has no layers"),
        (np.ones((2, 0, 4), int), r"tokens_per_expert=\[\] has no layers"),
        (np.ones((0, 2, 4), int), r"shape of tokens_per_expert of layer 0=\(0, 4\) must be .* neither of them 0"),
        (np.ones((2, 2, 0), int), r"shape of tokens_per_expert of layer 0=\(2, 0\) must be .* neither of them 0"),
        ([np.ones((1, 2), int), np.ones(2, int)], r"shape of tokens_per_expert of layer 1=\(2,\) must be"),
        ([np.ones((2, 3), int), np.ones((1, 3), int)], "iterations of layer 1=1 is not 2"),
        (np.array([[["7", "8"]]]), "dtype of tokens_per_expert of layer 0='<U1' must be integer"),
        (np.ones((1, 1, 2), bool), "dtype of tokens_per_expert of layer 0='bool' must be integer"),
        (np.ones((1, 1, 2), complex), "dtype of tokens_per_expert of layer 0='complex128' must be integer"),
        (np.array([[[1, None]]]), "dtype of tokens_per_expert of layer 0='object' must be integer"),
        (np.array([[[1, 2], [3, -4]]]), r"tokens_per_expert\[0, 1, 1\]=-4 must not be negative"),
        (np.array([[[1, 2.5]]]), r"tokens_per_expert\[0, 0, 1\]=2.5 must be an integer"),
        (np.array([[[1.0, 2.0]], [[np.nan, 1.0]]]), r"tokens_per_expert\[1, 0, 0\]=nan must be finite"),
        (np.array([[[1, np.inf]]]), r"tokens_per_expert\[0, 0, 1\]=inf must be finite"),
        (
            np.array([[[2**47, 2**47]]]),
            r"sum of tokens_per_expert of layer 0=2814749767106\d\d.0 must be below 2\*\*48",
        ),
        (np.array([[[2**64 - 1]]], np.uint64), r"sum of tokens_per_expert of layer 0=1.8\d*e\+19 must be below"),
        (np.full((1, 1, 2), 1e308), "sum of tokens_per_expert of layer 0=inf must be below"),
    ],
)
def test_bad_counts_are_refused(tokens, message):
    with pytest.raises(UserError, match=f"^{message}") as error:
        as_counts(tokens)
    assert "\n" not in str(error.value)


def test_windows_count_back_from_the_newest_step():
    history = recorded([0, 1, 2, 5, 7, 8, 9])  # steps may be skipped
    assert len(history) == 7
    assert history.last_step == 9
    newest, older = history.window(3), history.window(3, back=1)
    assert newest[0].tolist() == [[700, 701, 702], [800, 801, 802], [900, 901, 902]]
    assert newest[1].tolist() == [[710, 711], [810, 811], [910, 911]]
    assert older[1].tolist() == [[110, 111], [210, 211], [510, 511]]
    with pytest.raises(AssertionError, match="7 steps do not hold 3 windows of 3"):
        history.window(3, back=2)


def test_the_oldest_steps_go():
    history = recorded(range(11), capacity=4)
    assert len(history) == 4
    assert history.window(4)[1][:, 0].tolist() == [710, 810, 910, 1010]
    assert recorded(range(5), capacity=1).window(1)[0].tolist() == [[400, 401, 402]]


def test_steps_ascend_and_shapes_fit():
    history = recorded([3])
    with pytest.raises(AssertionError):
        history.record(3, [np.ones(3), np.ones(2)])
    with pytest.raises(AssertionError):
        history.record(4, [np.ones(3), np.ones(3)])
    with pytest.raises(AssertionError):
        history.record(4, [np.ones(3)])
    assert len(history) == 1


def test_an_empty_history_knows_no_step():
    history = LoadHistory((3, 2), capacity=4)
    assert len(history) == 0
    assert history.last_step is None
    with pytest.raises(AssertionError):
        history.window(1)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(1, 5), min_size=1, max_size=4),
    st.sets(st.integers(0, 50), max_size=9),
    st.integers(1, 10),
    st.integers(1, 10),
)
def test_round_trip_through_arrays_keeps_the_last_steps(num_experts, steps, capacity, smaller):
    history = recorded(sorted(steps), tuple(num_experts), capacity)
    arrays = history.to_arrays()
    assert {name: array.dtype for name, array in arrays.items()} == dict.fromkeys(arrays, np.dtype(np.int64))
    assert arrays["tokens"].shape == (len(history), sum(num_experts))
    assert same(LoadHistory.from_arrays(arrays, capacity), history)
    kept = LoadHistory.from_arrays(arrays, smaller)
    assert same(kept, recorded(sorted(steps)[-min(capacity, smaller) :], tuple(num_experts), smaller))
    assert kept.num_experts == tuple(num_experts)


def test_a_restored_history_goes_on_like_the_old_one():
    history = recorded(range(5), capacity=4)
    restored = LoadHistory.from_arrays(history.to_arrays(), capacity=4)
    for either in (history, restored):
        either.record(9, [np.array([1, 2, 3]), np.array([4, 5])])
    assert same(history, restored)
    assert restored.last_step == 9


def test_an_empty_history_is_restored_empty():
    restored = LoadHistory.from_arrays(LoadHistory((3, 2), capacity=4).to_arrays(), capacity=2)
    assert len(restored) == 0
    restored.record(0, [np.zeros(3), np.zeros(2)])
    assert restored.window(1)[1].tolist() == [[0, 0]]
