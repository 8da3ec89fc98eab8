"""The experts of all layers in one array a parameter, read inside the scan over layers.

A layer's own experts are neighbours in the array. Every layer reads W rows of it, as many as the widest layer has, so
that one program serves layers of any sizes; what else is in the window belongs to its neighbours, and the router never
chooses it (`laep.layout`).

JAX would make the gradient of a slice of the array an array of its size, in each layer. Here the array travels through
the scan a second time, as the carrier: nobody reads it, and on the way back its cotangent is the gradient so far, to
which each layer adds its rows in place.

Axes: N experts of all layers, W experts of the window, R rows.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def read_window(
    flat_N: jax.Array, carrier_N: jax.Array, start: jax.Array, window: int, sharding: NamedSharding
) -> tuple[jax.Array, jax.Array]:
    """Rows `start` to `start + window` and the carrier. sharding: of both; XLA would gather first and slice then."""
    return jax.lax.with_sharding_constraint(jax.lax.dynamic_slice_in_dim(flat_N, start, window), sharding), carrier_N


def _window_backward(window, sharding, start, cotangents):
    d_window, d_carrier_N = cotangents
    so_far = jax.lax.dynamic_slice_in_dim(d_carrier_N, start, window)
    d_carrier_N = jax.lax.dynamic_update_slice_in_dim(d_carrier_N, so_far + d_window, start, 0)
    return None, jax.lax.with_sharding_constraint(d_carrier_N, sharding), None


read_window.defvjp(
    lambda flat, carrier, start, *static: (read_window(flat, carrier, start, *static), start), _window_backward
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def read_rows(
    flat_N: jax.Array, carrier_N: jax.Array, rows_R: jax.Array, sharding: NamedSharding
) -> tuple[jax.Array, jax.Array]:
    """The rows `rows_R`, which may repeat, and the carrier. For TPU, XLA would make a loop over rows of it."""
    return jax.lax.with_sharding_constraint(flat_N[rows_R], sharding), carrier_N


def _rows_backward(sharding, rows_R, cotangents):
    d_rows, d_carrier_N = cotangents
    return None, jax.lax.with_sharding_constraint(d_carrier_N.at[rows_R].add(d_rows), sharding), None


read_rows.defvjp(
    lambda flat, carrier, rows_R, sharding: (read_rows(flat, carrier, rows_R, sharding), rows_R), _rows_backward
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def pick(window_WXY: jax.Array, experts_R: jax.Array, dtype) -> jax.Array:
    """Experts of a window in the compute dtype, as a product with ones and zeros: exact, without a loop."""
    chosen_RW = jax.nn.one_hot(experts_R, window_WXY.shape[0], dtype=dtype)
    return jnp.einsum("rw,wxy->rxy", chosen_RW, window_WXY.astype(dtype), precision="highest")


def _pick_backward(dtype, residuals, d_picked_RXY):
    """Replicas add up in float32."""
    experts_R, width = residuals
    chosen_RW = jax.nn.one_hot(experts_R, width, dtype=dtype)
    exact = {"precision": "highest", "preferred_element_type": jnp.float32}
    return jnp.einsum("rw,rxy->wxy", chosen_RW, d_picked_RXY, **exact), None


pick.defvjp(
    lambda window, experts_R, dtype: (pick(window, experts_R, dtype), (experts_R, window.shape[0])), _pick_backward
)
