"""Reading layers out of one array of experts: values, and gradients that add up in it, against plain indexing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from laep_jax.config import MeshConfig
from laep_jax.model.flat import pick, read_rows, read_window
from laep_jax.sharding import leaf_spec, make_mesh

STARTS, WINDOW = [0, 3, 6, 6], 4  # windows overlap
ROWS = [[0, 1, 1, 3], [5, 3, 4, 4], [9, 6, 8, 7], [6, 6, 6, 6]]


def _sharding():
    mesh = make_mesh(MeshConfig(fsdp=2, expert=4))
    return jax.sharding.NamedSharding(mesh, leaf_spec("down_NFD", (10, 8, 4), mesh))


def _loss(read, flat_NFD, factors_LRFD):
    """Of every layer's rows in a scan, in which the array travels as the carrier of its gradient too."""
    frozen = jax.lax.stop_gradient(flat_NFD)

    def body(carrier, layer):
        index, factors_RFD = layer
        part_RFD, carrier = read(frozen, carrier, index)
        return carrier, jnp.sum(jnp.sin(part_RFD) * factors_RFD)

    return lambda index_L: jnp.sum(jax.lax.scan(jax.checkpoint(body), flat_NFD, (index_L, factors_LRFD))[1])


@pytest.mark.parametrize("form", ["window", "rows"])
def test_reading_in_a_scan_is_indexing_and_its_gradient_is_added_in_place(form):
    rng, sharding = np.random.default_rng(0), _sharding()
    flat_NFD = jax.device_put(rng.normal(size=(10, 8, 4)).astype(np.float32), sharding)
    factors_LRFD = jnp.float32(rng.normal(size=(4, 4, 8, 4)))
    index_L = jnp.int32(STARTS if form == "window" else ROWS)
    rows_LR = np.array(STARTS)[:, None] + np.arange(WINDOW) if form == "window" else np.array(ROWS)

    def read(flat, carrier, index):
        if form == "window":
            return read_window(flat, carrier, index, WINDOW, sharding)
        return read_rows(flat, carrier, index, sharding)

    got = jax.jit(jax.value_and_grad(lambda flat: _loss(read, flat, factors_LRFD)(index_L)))(flat_NFD)
    want = jax.value_and_grad(lambda flat: jnp.sum(jnp.sin(flat[rows_LR]) * factors_LRFD))(flat_NFD)
    np.testing.assert_allclose(got[0], want[0], rtol=1e-6)
    np.testing.assert_allclose(got[1], want[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_picking_by_a_product_is_indexing(dtype):
    window_WXY = jnp.float32(np.random.default_rng(0).normal(size=(5, 3, 4)))
    experts_R = jnp.int32([4, 0, 4, 4, 2])
    np.testing.assert_array_equal(pick(window_WXY, experts_R, dtype), window_WXY.astype(dtype)[experts_R])


def test_gradients_of_picked_replicas_add_up():
    """In float32; XLA for CPU has no product of bfloat16 with a float32 result, which is what TPUs do here."""
    rng = np.random.default_rng(0)
    window_WXY, experts_R = jnp.float32(rng.normal(size=(5, 3, 4))), jnp.int32([4, 0, 4, 4, 2])
    d_RXY = rng.normal(size=(5, 3, 4)).astype(np.float32)
    [d_WXY] = jax.vjp(lambda window: pick(window, experts_R, "float32"), window_WXY)[1](d_RXY)
    want_WXY = np.zeros((5, 3, 4))
    np.add.at(want_WXY, np.array(experts_R), d_RXY)
    np.testing.assert_allclose(d_WXY, want_WXY, rtol=1e-6, atol=1e-6)
