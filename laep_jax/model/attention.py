"""Multi-head causal attention within documents, optionally with localized filtering (paper 3.4.2).

Scores of all positions at once would be S x S for each head. On TPU they stay inside JAX's splash kernel
(`jax.experimental.pallas.ops.tpu.splash_attention`, after FlashAttention, arXiv 2205.14135), on GPU inside cuDNN's.
Arrays that do not fit the sizes of a kernel are padded: with zeros, which add nothing to a product, and with
positions of a separate document. `attention_kernel` names the kernel that runs.
With grouped queries (GQA, arXiv 2305.13245) a head of keys and values serves several heads of queries, side by side.
Axes: B batch rows, S sequence, D hidden, H heads, of keys and values fewer perhaps, K head size, J heads x head size.
"""

import typing
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

from laep_jax.config import BATCH_AXES, Config, ModelConfig
from laep_jax.model.layers import RMSNorm, rotary
from laep_jax.model.lfa import LocalFilter

LANES = 128  # splash wants S and K in multiples of a vector register's lanes
SPLASH_BLOCK = 512  # queries and keys at once; 512 x 512 float32 scores are 1 MB of VMEM
CUDNN_MULTIPLE = 8  # of K, and here of S too, which has to be even where there is a mask
CPU_BLOCK, MAX_CPU_BLOCKS = 128, 8  # queries at once, or more: each block is compiled by itself
PADDING = -1  # the segment of padded positions: that of no document, nor of the padding of the data


def attend(query_BSHK: jax.Array, key_BSHK: jax.Array, value_BSHK: jax.Array, segments_BS: jax.Array, mesh: Mesh):
    """softmax(q k / sqrt(K)) v over the positions up to one's own with the same segment, like query_BSHK."""
    _, length, _, size = query_BSHK.shape
    attend_here, _ = _choose(length, size, query_BSHK.dtype, mesh.devices.flat[0])
    rows = PartitionSpec(BATCH_AXES)
    on_device = jax.shard_map(attend_here, mesh=mesh, in_specs=(rows,) * 4, out_specs=rows, check_vma=False)
    return on_device(query_BSHK, key_BSHK, value_BSHK, segments_BS)


def attention_kernel(config: Config, device: jax.Device) -> str:
    """What computes the attention of a config on such a device: the kernel and its padding, or why there is none."""
    model = config.model
    return _choose(config.data.sequence_length, model.head_dim, jnp.dtype(model.dtype), device)[1]


def _choose(length: int, size: int, dtype: jnp.dtype, device: jax.Device) -> tuple[Callable[..., jax.Array], str]:
    if device.platform == "cpu":
        return row_by_row, "row by row"
    if device.platform == "tpu":
        return splash, "splash" + _padding(length, size, LANES)
    if reason := _without_cudnn(size, dtype, device):
        return all_at_once, f"all scores at once: {reason}"
    return cudnn, "cuDNN" + _padding(length, size, CUDNN_MULTIPLE)


def _without_cudnn(size: int, dtype: jnp.dtype, device: jax.Device) -> str:
    """Why cuDNN's kernel does not run there; empty where it does (`jax._src.cudnn.fused_attention_stablehlo`)."""
    capability = device.compute_capability
    largest = 256 if float(capability) >= 9 else 128
    if dtype == jnp.float32:
        return "cuDNN has no kernel for float32"
    if float(capability) < 8:
        return f"cuDNN's kernel needs compute capability 8.0, this is {capability}"
    return f"head size {size} is above cuDNN's {largest}" if size > largest else ""


def _padding(length: int, size: int, multiple: int) -> str:
    axes = (("length", length), ("head size", size))
    return "".join(f", {name} padded {n} -> {n + -n % multiple}" for name, n in axes if n % multiple)


def _padded(query_BSHK, key_BSHK, value_BSHK, segments_BS, multiple: int) -> tuple[jax.Array, ...]:
    """The same with S and K up to a multiple."""
    _, length, _, size = query_BSHK.shape
    after = -length % multiple
    widths = ((0, 0), (0, after), (0, 0), (0, -size % multiple))
    arrays = (jnp.pad(x_BSHK, widths) for x_BSHK in (query_BSHK, key_BSHK, value_BSHK))
    return *arrays, jnp.pad(segments_BS, ((0, 0), (0, after)), constant_values=PADDING)


def all_at_once(query_BSHK, key_BSHK, value_BSHK, segments_BS, **settings) -> jax.Array:
    """`attend` of one device's rows by JAX's own function, all scores in one array."""
    same_document_B1SS = (segments_BS[:, :, None] == segments_BS[:, None, :])[:, None]
    return jax.nn.dot_product_attention(  # the scale is 1/sqrt(K) by default
        query_BSHK, key_BSHK, value_BSHK, mask=same_document_B1SS, is_causal=True, **settings
    )


def cudnn(query_BSHK, key_BSHK, value_BSHK, segments_BS) -> jax.Array:
    """`attend` of one device's rows in cuDNN's kernel. The mask of documents is S x S, once for all heads."""
    _, length, _, size = query_BSHK.shape
    padded = _padded(query_BSHK, key_BSHK, value_BSHK, segments_BS, CUDNN_MULTIPLE)
    return all_at_once(*padded, scale=size**-0.5, implementation="cudnn")[:, :length, :, :size]


def row_by_row(query_BSHK, key_BSHK, value_BSHK, segments_BS) -> jax.Array:
    """`attend` of one device's rows on CPU: scores that fit the cache, none of positions to come.

    A block of queries meets the keys up to its own end. The backward pass computes the scores again.
    """
    length, size = query_BSHK.shape[1], query_BSHK.shape[3]
    block = max(CPU_BLOCK, -(-length // MAX_CPU_BLOCKS))

    sharing = query_BSHK.shape[2] // key_BSHK.shape[2]
    if sharing > 1:
        key_BSHK, value_BSHK = (jnp.repeat(x, sharing, axis=2) for x in (key_BSHK, value_BSHK))

    def one_block(start, query_HSK, key_HSK, value_HSK, segments_S):
        end = min(start + block, length)
        scores_HQS = jnp.einsum(
            "hqk,hsk->hqs", query_HSK[:, start:end], key_HSK[:, :end], preferred_element_type=jnp.float32
        )
        seen_QS = jnp.arange(start, end)[:, None] >= jnp.arange(end)[None]
        seen_QS &= segments_S[start:end, None] == segments_S[None, :end]
        shares_HQS = jax.nn.softmax(jnp.where(seen_QS[None], scores_HQS * size**-0.5, -jnp.inf), axis=-1)
        return jnp.einsum("hqs,hsk->hqk", shares_HQS.astype(value_HSK.dtype), value_HSK[:, :end])

    def one_row(row):
        return jnp.concatenate([one_block(start, *row) for start in range(0, length, block)], axis=1)

    heads_first = (jnp.swapaxes(x, 1, 2) for x in (query_BSHK, key_BSHK, value_BSHK))
    mixed_BHSK = jax.lax.map(jax.checkpoint(one_row), (*heads_first, segments_BS))
    return jnp.swapaxes(mixed_BHSK, 1, 2)


def splash(query_BSHK, key_BSHK, value_BSHK, segments_BS, *, interpret: bool = False) -> jax.Array:
    """`attend` of one device's rows in the TPU kernel; `interpret` runs it anywhere, slowly."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

    _, length, heads, size = query_BSHK.shape
    padded = _padded(query_BSHK * size**-0.5, key_BSHK, value_BSHK, segments_BS, LANES)
    padded_length = padded[0].shape[1]
    block = next(block for block in (SPLASH_BLOCK, SPLASH_BLOCK // 2, LANES) if padded_length % block == 0)
    mask = splash_attention_mask.CausalMask((padded_length, padded_length))
    kernel = splash_attention_kernel.make_splash_mha(
        splash_attention_mask.MultiHeadMask([mask] * heads),
        block_sizes=splash_attention_kernel.BlockSizes(
            block_q=block,
            block_kv=block,
            block_q_dkv=block,
            block_kv_dkv=block,
            block_q_dq=block,
            block_kv_dq=block,
        ),
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )

    def one_row(query_SHK, key_SHK, value_SHK, segments_S):
        segment_ids = splash_attention_kernel.SegmentIds(segments_S, segments_S)
        query_HSK, key_HSK, value_HSK = (jnp.swapaxes(x, 0, 1) for x in (query_SHK, key_SHK, value_SHK))
        mixed_HSK = kernel(query_HSK, key_HSK, value_HSK, segment_ids)
        return jnp.swapaxes(typing.cast(jax.Array, mixed_HSK), 0, 1)

    return jax.vmap(one_row)(*padded)[:, :length, :, :size]


class Attention(nnx.Module):
    """[B, S, D] -> [B, S, D]. Queries and keys are made from the filtered input, values from x."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        hidden, size = config.hidden_size, config.head_dim
        of_queries, of_keys = config.num_heads * size, config.kv_heads * size
        init = nnx.initializers.normal(0.02)
        residual_init = nnx.initializers.normal(0.02 / (2 * config.num_layers) ** 0.5)
        self.query_JD = nnx.Param(init(rngs.params(), (hidden, of_queries)).T)
        self.key_JD = nnx.Param(init(rngs.params(), (hidden, of_keys)).T)
        self.value_JD = nnx.Param(init(rngs.params(), (hidden, of_keys)).T)
        self.output_JD = nnx.Param(residual_init(rngs.params(), (of_queries, hidden)))
        if config.qk_norm != "none":
            by_head = config.qk_norm == "head"
            self.query_norm = RMSNorm(size if by_head else of_queries, config.norm_eps)
            self.key_norm = RMSNorm(size if by_head else of_keys, config.norm_eps)
        if config.lfa:
            self.lfa = LocalFilter(config, rngs=rngs)
        self.config = config

    def __call__(self, x_BSD: jax.Array, segments_BS: jax.Array, positions_BS: jax.Array, mesh: Mesh) -> jax.Array:
        qk_norm, rope_base = self.config.qk_norm, self.config.rope_base
        filtered_BSD = self.lfa(x_BSD, segments_BS) if self.config.lfa else x_BSD
        query_BSJ = jnp.einsum("bsd,jd->bsj", filtered_BSD, self.query_JD[...])
        key_BSJ = jnp.einsum("bsd,jd->bsj", filtered_BSD, self.key_JD[...])
        value_BSJ = jnp.einsum("bsd,jd->bsj", x_BSD, self.value_JD[...])
        if qk_norm == "whole":
            query_BSJ, key_BSJ = self.query_norm(query_BSJ), self.key_norm(key_BSJ)
        query_BSHK, key_BSHK, value_BSHK = (
            x_BSJ.reshape(*x_BSJ.shape[:2], -1, self.config.head_dim) for x_BSJ in (query_BSJ, key_BSJ, value_BSJ)
        )
        if qk_norm == "head":
            query_BSHK, key_BSHK = self.query_norm(query_BSHK), self.key_norm(key_BSHK)
        mixed_BSHK = attend(
            rotary(query_BSHK, positions_BS, rope_base),
            rotary(key_BSHK, positions_BS, rope_base),
            value_BSHK,
            segments_BS,
            mesh,
        )
        return mixed_BSHK.reshape(*x_BSD.shape[:2], -1) @ self.output_JD[...]
