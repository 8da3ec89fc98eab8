"""The block loop and the kernels against `ragged_dot`, with groups of every kind of length, on one device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from laep_jax.model.dispatch import BLOCK, make_routes
from laep_jax.model.experts import REST_BLOCK, experts_by_blocks, experts_by_megablox, experts_by_ragged_dot

SIZES = (
    (0, 5, BLOCK, 2 * BLOCK + 44, REST_BLOCK, REST_BLOCK - 1, 2 * BLOCK + 1, 0),
    (BLOCK + REST_BLOCK + 1, BLOCK, 1, 0, 3 * BLOCK, 1),
)


@pytest.mark.parametrize(("hidden", "ffn"), [(256, 192), (320, 512), (2048, 192), (64, 64), (4608, 1024)])
def test_kernels_of_every_width_lower_for_tpu_with_their_gradients(hidden, ffn):
    routes = make_routes(jnp.zeros((64, 2), jnp.int32), 4)
    shapes = ((64, hidden), (64, 2), (4, hidden, 2 * ffn), (4, ffn, hidden))
    arrays = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]

    def loss(x_TD, weights_TK, gate_up_EDG, down_EFD):
        return experts_by_megablox(x_TD, weights_TK, routes, gate_up_EDG, down_EFD).astype(jnp.float32).sum()

    gradients = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3)))
    assert export.export(gradients, platforms=["tpu"])(*arrays).mlir_module().count("tpu_custom_call") == 6


INTERPRETED = functools.partial(experts_by_megablox, interpret=True)


@pytest.mark.parametrize(
    ("experts", "sizes"),
    [(experts_by_blocks, SIZES[0]), (experts_by_blocks, SIZES[1]), (INTERPRETED, SIZES[0])],
    ids=["blocks, ends", "blocks, rests", "megablox"],
)
def test_it_agrees_with_ragged_dot_in_values_and_all_gradients(experts, sizes):
    num_experts, num_tokens, hidden, ffn = len(sizes), sum(sizes) + 7, 8, 16  # 7 tokens go nowhere
    rng = np.random.default_rng(0)
    ids_T = np.repeat(np.arange(num_experts + 1), (*sizes, 7))
    routes = make_routes(jnp.asarray(rng.permutation(ids_T), jnp.int32)[:, None], num_experts)
    assert routes.group_sizes_E.tolist() == list(sizes)
    shapes = (num_tokens, hidden), (num_tokens, 1), (num_experts, hidden, 2 * ffn), (num_experts, ffn, hidden)
    x_TD, weights_TK, *matrices = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes)
    dy_TD = jnp.asarray(rng.standard_normal(x_TD.shape), jnp.float32)

    def with_gradients(experts):
        y_TD, backward = jax.vjp(lambda x, w, *m: experts(x, w, routes, *m), x_TD, weights_TK, *matrices)
        return y_TD, *backward(dy_TD)

    names = ("y", "dx", "dweights", "dgate_up", "ddown")
    pairs = zip(with_gradients(experts), with_gradients(experts_by_ragged_dot), strict=True)
    for name, (got, want) in zip(names, pairs, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4 * float(jnp.abs(want).max()), err_msg=name)
