"""RMS normalisation, rotary positions and the gate of SwiGLU.

Axes: B batch rows, S sequence, H heads, K head size, D hidden, F ffn, G = 2F, gate first.
"""

import jax
import jax.numpy as jnp
from flax import nnx


class RMSNorm(nnx.Module):
    """x / rms(x) * scale over the last dimension, in float32, returned in x's dtype."""

    def __init__(self, size: int, eps: float):
        self.eps = eps
        self.scale_D = nnx.Param(jnp.ones((size,)))

    def __call__(self, x_BSD: jax.Array) -> jax.Array:
        return rms_norm(x_BSD, self.scale_D[...], self.eps)


def rms_norm(x_BSD: jax.Array, scale_D: jax.Array, eps: float) -> jax.Array:
    """[..., D], whatever is in front."""
    x32 = x_BSD.astype(jnp.float32)
    inverse_rms = jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return (x32 * inverse_rms * scale_D.reshape((1,) * (x32.ndim - 1) + (-1,))).astype(x_BSD.dtype)


def rotary(x_BSHK: jax.Array, positions_BS: jax.Array, base: float) -> jax.Array:
    """Rotates dimension pairs (i, i + K/2) by position * base**(-2i/K); angles in float32.

    Source: RoFormer, arXiv 2104.09864, equation 15, with the two halves of the head as the pairs.
    """
    half = x_BSHK.shape[-1] // 2
    frequency = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle_BS1k = positions_BS[..., None, None].astype(jnp.float32) * frequency[None, None, None]
    cos, sin = jnp.cos(angle_BS1k), jnp.sin(angle_BS1k)
    first, second = jnp.split(x_BSHK.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, first * sin + second * cos], axis=-1)
    return turned.astype(x_BSHK.dtype)


def gated(both_BG: jax.Array) -> jax.Array:
    """silu(gate) * up (SwiGLU, arXiv 2002.05202)."""
    gate_BF, up_BF = jnp.split(both_BG, 2, axis=-1)
    return jax.nn.silu(gate_BF) * up_BF
