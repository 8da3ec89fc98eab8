"""The forms of attention that avoid large arrays of scores, against JAX's own function, and which runs where."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from laep_jax.config import Config, DataConfig, ModelConfig
from laep_jax.model import attention


def cudnn_elsewhere(*arrays, monkeypatch):
    """`cudnn` with JAX's plain function in the place of the kernel, whose shapes and dtype rules hold."""
    plain = jax.nn.dot_product_attention

    def kernel(query_BSHK, *others, implementation, **settings):
        _, length, _, size = query_BSHK.shape
        assert implementation == "cudnn"
        assert (length % 2, size % 8) == (0, 0)
        return plain(query_BSHK, *others, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(jax.nn, "dot_product_attention", kernel)
        return attention.cudnn(*arrays)


@pytest.mark.parametrize(
    ("form", "shape", "kv_heads"),
    [
        ("splash", (1, 230, 2, 20), 2),
        ("splash", (1, 230, 4, 20), 2),
        ("row_by_row", (2, 300, 2, 16), 2),
        ("row_by_row", (2, 300, 4, 16), 2),
        ("cudnn", (2, 231, 2, 12), 2),
        ("cudnn", (2, 231, 4, 12), 2),
    ],
)
def test_it_is_plain_attention_within_documents(form, shape, kv_heads, monkeypatch):
    forms = {
        "splash": functools.partial(attention.splash, interpret=True),
        "row_by_row": attention.row_by_row,
        "cudnn": functools.partial(cudnn_elsewhere, monkeypatch=monkeypatch),
    }
    shapes = (shape, *((*shape[:2], kv_heads, shape[3]),) * 2)
    keys = jax.random.split(jax.random.key(0), 3)
    query, key, value = (jax.random.normal(k, shape) for k, shape in zip(keys, shapes, strict=True))
    padding = shape[1] - 220
    segments_BS = jnp.asarray(np.repeat([[1, 2, 0]] * shape[0], [100, 120, padding], axis=1), jnp.int32)

    def of(attend):
        def loss(*arrays):
            mixed_BSHK = attend(*arrays, segments_BS)
            assert mixed_BSHK.shape == shape
            return jnp.sum(jnp.cos(mixed_BSHK))

        return jax.value_and_grad(loss, argnums=(0, 1, 2))(query, key, value)

    plain, other = of(attention.all_at_once), of(forms[form])
    np.testing.assert_allclose(other[0], plain[0], rtol=1e-5)
    for gradient, expected in zip(other[1], plain[1], strict=True):
        assert gradient.shape == expected.shape
        np.testing.assert_allclose(gradient, expected, atol=4e-5)  # float32 sums of 300 terms in another order


@pytest.mark.parametrize(
    ("device", "length", "size", "dtype", "kernel"),
    [
        ("cpu", 128, 32, "float32", "row by row"),
        ("tpu", 1024, 128, "bfloat16", "splash"),
        ("tpu", 1024, 64, "float32", "splash, head size padded 64 -> 128"),
        ("tpu", 100, 192, "float32", "splash, length padded 100 -> 128, head size padded 192 -> 256"),
        ("9.0", 1024, 256, "bfloat16", "cuDNN"),
        ("8.0", 1023, 100, "bfloat16", "cuDNN, length padded 1023 -> 1024, head size padded 100 -> 104"),
        ("9.0", 1024, 64, "float32", "all scores at once: cuDNN has no kernel for float32"),
        ("8.6", 1024, 130, "bfloat16", "all scores at once: head size 130 is above cuDNN's 128"),
        ("10.0", 1024, 258, "bfloat16", "all scores at once: head size 258 is above cuDNN's 256"),
        ("7.5", 1024, 64, "bfloat16", "all scores at once: cuDNN's kernel needs compute capability 8.0, this is 7.5"),
    ],
)
def test_the_kernel_is_named_with_its_padding_or_why_there_is_none(device, length, size, dtype, kernel):
    platform = device if device in ("cpu", "tpu") else "gpu"
    there = types.SimpleNamespace(platform=platform, compute_capability=device)
    config = Config(model=ModelConfig(head_dim=size, dtype=dtype), data=DataConfig(sequence_length=length))
    assert attention.attention_kernel(config, there) == kernel
