"""Axes: B batch rows, S sequence, D hidden, C half of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from laep_jax.config import MeshConfig, ModelConfig
from laep_jax.model.attention import Attention
from laep_jax.model.lfa import LocalFilter
from laep_jax.sharding import make_mesh

SEGMENTS = jnp.array([[1, 1, 1, 2, 2, 3, 3, 3], [1, 1, 1, 1, 1, 1, 0, 0]])
POSITIONS = jnp.array([[0, 1, 2, 0, 1, 0, 1, 2], [0, 1, 2, 3, 4, 5, 0, 0]])


def model_config(**changes):
    return ModelConfig(hidden_size=16, num_heads=2, head_dim=8, **changes)


def direct_filter(filter_, x_BSD, segments_BS):
    """The equations of the module's docstring, one position after the other."""
    a0, a1 = filter_.previous_in_DC[...], filter_.current_in_DC[...]
    b0, b1 = filter_.previous_out_CD[...], filter_.current_out_CD[...]
    bias_in, bias_out = (filter_.bias_in_C[...], filter_.bias_out_D[...]) if filter_.has_bias else (0, 0)
    out = np.zeros(x_BSD.shape, np.float32)
    for row in range(x_BSD.shape[0]):
        last_y1 = np.zeros(x_BSD.shape[2] // 2)
        for t in range(x_BSD.shape[1]):
            continues = t > 0 and segments_BS[row, t - 1] == segments_BS[row, t]
            y1 = x_BSD[row, t] @ a1 + bias_in
            y1 = y1 + x_BSD[row, t - 1] @ a0 if continues else y1
            y2 = y1 @ b1 + bias_out
            y2 = y2 + last_y1 @ b0 if continues else y2
            last_y1 = y1
            f = y2 + x_BSD[row, t]
            out[row, t] = f / np.sqrt(np.mean(np.square(f)) + 1e-6)
    return out


@pytest.mark.parametrize("lfa_bias", [False, True])
def test_filter_equals_a_direct_loop(lfa_bias):
    filter_ = LocalFilter(model_config(lfa_bias=lfa_bias), rngs=nnx.Rngs(0))
    for name in ("previous_in_DC", "current_in_DC", "previous_out_CD", "current_out_CD"):
        weight = getattr(filter_, name)
        weight[...] = weight[...] * 15.0  # large enough that every term shows
    if lfa_bias:
        filter_.bias_in_C[...] = jnp.linspace(-1, 1, 8)
        filter_.bias_out_D[...] = jnp.linspace(1, 2, 16)
    x_BSD = jax.random.normal(jax.random.key(1), (2, 8, 16))
    np.testing.assert_allclose(filter_(x_BSD, SEGMENTS), direct_filter(filter_, x_BSD, SEGMENTS), atol=2e-5)


@pytest.mark.parametrize("lfa", [False, True])
def test_attention_sees_only_the_past_of_its_own_document(lfa):
    attention = Attention(model_config(lfa=lfa), rngs=nnx.Rngs(0))
    mesh = make_mesh(MeshConfig(fsdp=1, expert=1), jax.devices()[:1])
    x_SD = jax.random.normal(jax.random.key(1), (8, 16))

    def outputs(x_SD):
        return attention(x_SD[None], SEGMENTS[:1], POSITIONS[:1], mesh)[0].sum(-1)

    influence_SS = np.abs(jax.jacobian(outputs)(x_SD)).sum(-1) > 0
    documents = np.asarray(SEGMENTS[0])
    allowed_SS = np.tril(documents[:, None] == documents[None])
    np.testing.assert_array_equal(influence_SS, allowed_SS)
