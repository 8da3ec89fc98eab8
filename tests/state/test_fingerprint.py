import jax
import jax.numpy as jnp
import numpy as np
import pytest

from laep_jax.state.fingerprint import (
    fingerprints,
    first_difference,
    from_arrays,
    pruned_fingerprints,
    to_arrays,
)
from laep_jax.state.surgery import kept_rows

COUNTS = (16, 16, 8, 8)


def of_experts(x_NFD: np.ndarray) -> np.ndarray:
    """The fingerprints [N, S] of experts."""
    return fingerprints({"down_NFD": jax.device_put(x_NFD)})["down_NFD"]


def test_one_for_every_leaf_layer_and_expert_and_the_same_on_every_mesh(states):
    want = fingerprints(states.random(COUNTS, states.mesh()))
    for name in ("params.experts.down_NFD", "params.experts.router_ND", "router_bias.bias_N"):
        assert want[name].shape == (48, 2)
    assert want["params.layers.attention.query_JD"].shape == (4, 2)
    assert want["params.embedding_VD"].shape == want["step"].shape == (2,)
    assert all(values.dtype == np.uint32 for values in want.values())
    for sizes in [(2, 2, 2), (1, 1, 1)]:
        assert first_difference(fingerprints(states.random(COUNTS, states.mesh(*sizes))), want) is None


def test_a_prune_moves_them_as_it_moves_experts(states):
    rng = np.random.default_rng(0)
    x_NFD = rng.normal(size=(64, 4, 8)).astype(np.float32)
    rows_N = kept_rows((16,) * 4, states.plan((16,) * 4, COUNTS))
    want = pruned_fingerprints(fingerprints({"down_NFD": jax.device_put(x_NFD)}), rows_N)
    new = fingerprints({"down_NFD": jax.device_put(x_NFD[rows_N])})
    assert first_difference(new, want) is None
    experts = [(row // 16, row % 16) for row in rows_N]
    new["down_NFD"] = new["down_NFD"].copy()
    new["down_NFD"][[37, 40]] += 1
    message = f"down_NFD of layer 2, expert {experts[37][1]} (1 more places)"
    assert first_difference(new, want, experts) == message


def test_the_layer_is_named():
    layers = {"query_JD": jax.numpy.ones((3, 4, 2))}
    want, got = fingerprints(layers), fingerprints({"query_JD": layers["query_JD"].at[1].set(2)})
    assert first_difference(got, want) == "query_JD of layer 1"


@pytest.mark.parametrize("dtype", ["float32", "int32", "bfloat16", "float8_e4m3fn", "bool"])
def test_every_flipped_bit_shows_in_both_sums_of_its_expert_only(dtype):
    rng = np.random.default_rng(1)
    x_EFD = rng.integers(0, 2, (3, 2, 4)).astype(jnp.dtype(dtype))
    bits = 1 if dtype == "bool" else 8 * x_EFD.itemsize
    flips = [(place, bit) for place in np.ndindex(x_EFD.shape) for bit in range(bits)]
    copies = np.stack([x_EFD] * (1 + len(flips)))
    words = copies.view({1: np.uint8, 2: np.uint16, 4: np.uint32}[x_EFD.itemsize])
    for i, (place, bit) in enumerate(flips):
        words[(1 + i, *place)] ^= 1 << bit
    found = of_experts(copies.reshape(-1, 2, 4)).reshape(-1, 3, 2)
    for i, ((expert, *_), _) in enumerate(flips):
        changed_ES = found[1 + i] != found[0]
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
