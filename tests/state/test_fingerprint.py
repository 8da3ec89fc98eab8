import jax
import jax.numpy as jnp
import numpy as np
import pytest

from laep_jax.state.fingerprint import (
    OUTSIDE,
    fingerprints,
    first_difference,
    from_arrays,
    pruned_fingerprints,
    to_arrays,
)

COUNTS = (16, 16, 8, 8)


def of_experts(x_EDF: np.ndarray) -> np.ndarray:
    """The fingerprints [E, S] of a layer's experts."""
    found = fingerprints({"runs": [{"down_EFD": jax.device_put(x_EDF[None])}]})
    return found["runs.down_EFD", 0]


def test_one_for_every_leaf_layer_and_expert_and_the_same_on_every_mesh(states):
    want = fingerprints(states.random(COUNTS, states.mesh()))
    assert [want["params.runs.moe.down_EFD", layer].shape for layer in range(4)] == [(n, 2) for n in COUNTS]
    assert want["params.runs.moe.router_DE", 2].shape == want["router_bias.runs.bias_E", 2].shape == (8, 2)
    assert want["params.runs.attention.query_DHK", 3].shape == (2,)
    assert want["params.embedding_VD", OUTSIDE].shape == want["step", OUTSIDE].shape == (2,)
    assert all(values.dtype == np.uint32 for values in want.values())
    for sizes in [(2, 2, 2), (1, 1, 1)]:
        assert first_difference(fingerprints(states.random(COUNTS, states.mesh(*sizes))), want) is None


def test_a_prune_moves_them_as_it_moves_experts_whatever_the_runs(states):
    rng = np.random.default_rng(0)
    x_LEFD = rng.normal(size=(4, 16, 4, 8)).astype(np.float32)
    old = fingerprints({"runs": [{"down_EFD": jax.device_put(x)} for x in (x_LEFD[:1], x_LEFD[1:])]})
    kept = states.plan((16,) * 4, COUNTS)
    cut = [np.stack([x_LEFD[layer][kept[layer]] for layer in layers]) for layers in ((0, 1), (2, 3))]
    new = fingerprints({"runs": [{"down_EFD": jax.device_put(x)} for x in cut]})
    assert first_difference(new, pruned_fingerprints(old, kept)) is None
    for layer, slot in ((2, 5), (3, 0)):
        new["runs.down_EFD", layer] = new["runs.down_EFD", layer].copy()
        new["runs.down_EFD", layer][slot] += 1
    message = f"runs.down_EFD of layer 2, expert {kept[2][5]} (1 more places)"
    assert first_difference(new, pruned_fingerprints(old, kept), kept) == message


@pytest.mark.parametrize("dtype", ["float32", "int32", "bfloat16", "float8_e4m3fn", "bool"])
def test_every_flipped_bit_shows_in_both_sums_of_its_expert_only(dtype):
    rng = np.random.default_rng(1)
    x_EFD = rng.integers(0, 2, (3, 2, 4)).astype(jnp.dtype(dtype))
    bits = 1 if dtype == "bool" else 8 * x_EFD.itemsize
    flips = [(place, bit) for place in np.ndindex(x_EFD.shape) for bit in range(bits)]
    layers = np.stack([x_EFD] * (1 + len(flips)))
    words = layers.view({1: np.uint8, 2: np.uint16, 4: np.uint32}[x_EFD.itemsize])
    for i, (place, bit) in enumerate(flips):
        words[(1 + i, *place)] ^= 1 << bit
    found = fingerprints({"runs": [{"down_EFD": jax.device_put(layers)}]})
    for i, ((expert, *_), _) in enumerate(flips):
        changed_ES = found["runs.down_EFD", 1 + i] != found["runs.down_EFD", 0]
        np.testing.assert_array_equal(changed_ES, np.arange(3)[:, None] == [expert, expert])


def test_values_that_trade_places_signs_or_experts_show():
    rng = np.random.default_rng(2)
    x_EFD = rng.normal(size=(4, 8, 16)).astype(np.float32)
    want = of_experts(x_EFD)
    rows, signs, halves = x_EFD.copy(), x_EFD.copy(), x_EFD.copy()
    rows[1, [0, 5]] = rows[1, [5, 0]]
    signs[1, 0, :2] *= -1  # two changes of the highest bit would cancel out in sums of words times odd numbers
    halves[1, :4] = 0
    for x in (rows, signs, halves):
        np.testing.assert_array_equal((of_experts(x) != want).all(1), [False, True, False, False])
    swapped = of_experts(x_EFD[[0, 2, 1, 3]])
    np.testing.assert_array_equal(swapped, want[[0, 2, 1, 3]])
    assert len({tuple(sums) for sums in want.tolist()}) == 4


def test_they_come_back_from_arrays(states):
    want = fingerprints(states.random(COUNTS, states.mesh()))
    got = from_arrays(to_arrays(want))
    assert list(got) == list(want)
    assert all(got[name].shape == want[name].shape for name in want)
    assert first_difference(got, want) is None
