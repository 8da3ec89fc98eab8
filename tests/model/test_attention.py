"""The forms of attention that avoid large arrays of scores, against JAX's own function."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from laep_jax.model.attention import all_at_once, row_by_row, splash


@pytest.mark.parametrize(
    ("attention", "shape"),
    [(functools.partial(splash, interpret=True), (1, 256, 2, 128)), (row_by_row, (2, 300, 2, 16))],
    ids=["splash", "row_by_row"],
)
def test_it_is_plain_attention_within_documents(attention, shape):
    query, key, value = (jax.random.normal(k, shape) for k in jax.random.split(jax.random.key(0), 3))
    padding = shape[1] - 220
    segments_BS = jnp.asarray(np.repeat([[1, 2, 0]] * shape[0], [100, 120, padding], axis=1), jnp.int32)

    def of(attention):
        def loss(*arrays):
            return jnp.sum(jnp.cos(attention(*arrays, segments_BS)))

        return jax.value_and_grad(loss, argnums=(0, 1, 2))(query, key, value)

    plain, other = of(all_at_once), of(attention)
    np.testing.assert_allclose(other[0], plain[0], rtol=1e-5)
    for gradient, expected in zip(other[1], plain[1], strict=True):
        np.testing.assert_allclose(gradient, expected, atol=4e-5)  # float32 sums of 300 terms in another order
