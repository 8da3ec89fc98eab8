"""Counts from files: each documented form, layers of unequal width, and what is said of what was read."""

import numpy as np
import pytest

from laep_jax.errors import UserError
from laep_jax.laep.counts import describe, read_counts

LAYERS = [np.arange(6).reshape(2, 3), np.arange(8).reshape(2, 4), np.arange(4).reshape(2, 2)]


@pytest.mark.parametrize(
    "names",
    [
        ("layer_0", "layer_1", "layer_2"),
        ("tokens_per_expert_2", "tokens_per_expert_0", "tokens_per_expert_1"),
        ("model.layers.01.mlp", "model.layers.00.mlp", "model.layers.2.mlp"),
        ("arr_0", "arr_1", "arr_2"),
        ("2", "1", "0"),
    ],
)
def test_one_array_a_layer_in_the_order_of_its_numbers(tmp_path, names):
    order = [int("".join(filter(str.isdigit, name))) for name in names]
    np.savez(tmp_path / "x.npz", **{name: LAYERS[layer] for name, layer in zip(names, order, strict=True)})
    assert [tokens_NE.tolist() for tokens_NE in read_counts(tmp_path / "x.npz")] == [a.tolist() for a in LAYERS]


def test_ten_layers_are_in_the_order_of_numbers_not_of_names(tmp_path):
    np.savez(tmp_path / "x.npz", **{f"layer_{layer}": np.full(layer + 1, layer) for layer in range(12)})
    assert [tokens_NE.shape for tokens_NE in read_counts(tmp_path / "x.npz")] == [(1, n + 1) for n in range(12)]


def test_the_array_of_all_layers_is_meant_where_there_is_one(tmp_path):
    np.savez(tmp_path / "x.npz", layer_0=LAYERS[0], tokens_per_expert=np.ones((2, 5, 3), int), names=np.array(["a"]))
    assert [tokens_NE.shape for tokens_NE in read_counts(tmp_path / "x.npz")] == [(2, 3)] * 5


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"layer_0": LAYERS[0], "steps": np.arange(2)}, r"^arrays in counts '.*'=\['layer_0', 'steps'\] must include"),
        ({"layer_0": LAYERS[0], "bias_1": LAYERS[1]}, "for each domain$"),
        ({"layer_1": LAYERS[0], "layer_2": LAYERS[1]}, "for each domain$"),
        ({"layer_0": LAYERS[0], "layer_2": LAYERS[1]}, "for each domain$"),
        ({"layer_0": LAYERS[0], "layer_00": LAYERS[1]}, "for each domain$"),
        ({"a0b1": LAYERS[0]}, "for each domain$"),
        ({"layer_0": np.array(7)}, r"^shape of tokens_per_expert of layer 0=\(\) must be"),
        ({"layer_0": np.ones((1, 2, 3), int)}, r"^shape of tokens_per_expert of layer 0=\(1, 2, 3\) must be"),
        ({"layer_0": LAYERS[0], "layer_1": LAYERS[1][0]}, "^iterations of layer 1=1 is not 2$"),
    ],
)
def test_arrays_that_are_no_layers_are_refused(tmp_path, arrays, message):
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(UserError, match=message):
        read_counts(tmp_path / "x.npz")


def counts(num_layers=6, iterations=50) -> list[np.ndarray]:
    return [np.full((iterations, 8), 32) for _ in range(num_layers)]


def test_sizes_and_tokens_are_said():
    assert describe(counts(), top_k=2) == ["6 layers x 8 experts, 50 iterations of 128 tokens x top 2"]
    assert describe(counts(1, 1), top_k=2) == ["1 layer x 8 experts, 1 iteration of 128 tokens x top 2"]
    uneven = [np.full((2, 8), 30), np.full((2, 16), 15)]
    assert describe(uneven, top_k=1) == ["2 layers x 8 to 16 experts, 2 iterations of 240 tokens x top 1"]
    uneven[0][1] *= 2
    uneven[1][1] *= 2  # batches may differ in size
    assert describe(uneven, top_k=1) == ["2 layers x 8 to 16 experts, 2 iterations of 240 to 480 tokens x top 1"]


def test_what_looks_odd_is_said():
    dropped = counts(3, 2)
    dropped[1][0, 5] -= 31
    assert describe(dropped, top_k=2) == [
        "3 layers x 8 experts, 2 iterations of 225 to 256 counts a layer, not a multiple of top_k=2",
        "the layers' tokens of an iteration differ: layer 1 has 6.1% fewer than the layer with most",
    ]


def test_iterations_without_tokens_are_named():
    all_layers, some, many = counts(), counts(), counts()
    for tokens_NE in all_layers:
        tokens_NE[10:20] = 0
    some[3][:10], some[5][7] = 0, 0
    for layer in range(5):
        many[layer][: layer + 1] = 0
    ending = "of 50 iterations have no tokens and are left out"
    assert describe(all_layers, top_k=2)[1:] == [f"every layer: 10 {ending}"]
    assert describe(some, top_k=2)[1:] == [f"layer 3: 10 {ending}", f"layer 5: 1 {ending}"]
    assert describe(many, top_k=2)[1:] == [f"5 layers: 1 to 5 {ending}, most in layer 4"]
    assert describe([np.zeros((3, 4), int)], top_k=2) == [
        "1 layer x 4 experts, 3 iterations of 0 tokens x top 2",
        "every layer: 3 of 3 iterations have no tokens and are left out",
    ]
