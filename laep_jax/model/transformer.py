"""The decoder: pre-norm blocks of attention and mixture of experts, as one scan over the layers.

What all layers have alike is stacked; the experts of all layers are in one array a parameter (`laep_jax.model.flat`),
so layers may have any number of them. Parameters are plain dictionaries; NNX modules hold the code of one layer and are
merged with them inside the trace.
Axes: B batch rows, S sequence, D hidden, V vocabulary, L layers, E experts of a layer, W of its window, N of all layers
(or parts of a sequence), R experts in slots.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from laep_jax.config import AuxLossConfig, ModelConfig
from laep_jax.laep.layout import Layout
from laep_jax.model.attention import Attention
from laep_jax.model.dispatch import DISPATCH_NAMES
from laep_jax.model.experts import SharedExpert
from laep_jax.model.flat import pick, read_rows, read_window
from laep_jax.model.layers import RMSNorm, rms_norm
from laep_jax.model.moe import MoE, MoEAux
from laep_jax.model.slots import SLOTS_NAME
from laep_jax.sharding import batch_sharding, leaf_spec, platform, tree_shardings

LOGITS_CHUNK = 2**27  # of one row: half a gigabyte in float32
ROUTER = "router_ED"
EXPERTS = {"router_ND": ROUTER, "gate_up_NDG": "gate_up_RDG", "down_NFD": "down_RFD"}  # of all layers: in `MoE`


class Block(nnx.Module):
    """One layer: x + attention(norm(x)), then x + moe(norm(x)), to which a shared expert adds."""

    def __init__(self, config: ModelConfig, num_experts: int, aux_losses: AuxLossConfig, *, rngs: nnx.Rngs):
        self.attention_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.attention = Attention(config, rngs=rngs)
        self.moe_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.moe = MoE(config, num_experts, aux_losses, rngs=rngs)
        self.shared = SharedExpert(config, rngs=rngs) if config.shared_ffn_size else None

    def __call__(
        self, x_BSD: jax.Array, batch: dict, bias_E: jax.Array, layout: Layout, mesh: Mesh
    ) -> tuple[jax.Array, MoEAux]:
        segments_BS = batch["segments_BS"]
        with jax.named_scope("attention"):
            x_BSD = x_BSD + self.attention(self.attention_norm(x_BSD), segments_BS, batch["positions_BS"], mesh)
        normed_BSD = self.moe_norm(x_BSD)
        y_BSD, aux = self.moe(normed_BSD, segments_BS > 0, bias_E, layout, mesh, batch.get("domains_BSM"))
        if self.shared is not None:
            y_BSD += self.shared(normed_BSD)
        return x_BSD + y_BSD, aux


def _new_block(config: ModelConfig, num_experts: int, aux_losses: AuxLossConfig, key: jax.Array):
    return nnx.split(Block(config, num_experts, aux_losses, rngs=nnx.Rngs(params=key)))


@functools.lru_cache(maxsize=128)
def _block_graph(config: ModelConfig, aux_losses: AuxLossConfig) -> nnx.GraphDef:
    make = functools.partial(Block, config, config.experts_per_layer[0], aux_losses)
    return nnx.split(nnx.eval_shape(lambda: make(rngs=nnx.Rngs(params=0))))[0]


def init_params(config: ModelConfig, aux_losses: AuxLossConfig, key: jax.Array) -> dict:
    """Fresh float32 parameters; a layer's values depend on the key, its index and its expert count only."""
    embedding_key, unembedding_key, layers_key = jax.random.split(key, 3)
    init = nnx.initializers.normal(0.02)
    vocab, hidden = config.vocab_size, config.hidden_size
    equal, first = [], 0
    for experts, neighbours in itertools.groupby(config.experts_per_layer):
        layers = len(list(neighbours))
        keys = jax.vmap(functools.partial(jax.random.fold_in, layers_key))(first + jnp.arange(layers))
        new = functools.partial(_new_block, config, experts, aux_losses)
        equal.append(jax.vmap(lambda key, new=new: nnx.to_pure_dict(new(key)[1]))(keys))
        first += layers
    moe = [layers.pop("moe") for layers in equal]

    def of_all_layers(name: str) -> jax.Array:
        return jnp.concatenate([part[name].reshape(-1, *part[name].shape[2:]) for part in moe])

    params = {
        "embedding_VD": init(embedding_key, (vocab, hidden)),
        "layers": jax.tree.map(lambda *parts: jnp.concatenate(parts), *equal),
        "experts": {flat: of_all_layers(name) for flat, name in EXPERTS.items()},
        "final_norm": {"scale_D": jnp.ones((hidden,))},
    }
    return params if config.tie_embeddings else params | {"unembedding_DV": init(unembedding_key, (hidden, vocab))}


def _gathered(tree, dtype, mesh: Mesh):
    """Matrices in the compute dtype, replicated; vectors (norm scales) stay float32."""
    whole = NamedSharding(mesh, PartitionSpec())
    return jax.lax.with_sharding_constraint(_cast(tree, dtype), whole)


def _gathered_layer(weights: dict, dtype, mesh: Mesh) -> dict:
    """The same of a layer's parameters, by name, but their gradients come in the slices of the parameters."""
    cast = _cast(weights, dtype)
    return jax.tree.map(_replicate, cast, tree_shardings(cast, mesh))


def _cast(tree, dtype):
    return jax.tree.map(lambda leaf: leaf.astype(dtype) if leaf.ndim > 1 else leaf, tree)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _replicate(weight: jax.Array, sharding: NamedSharding) -> jax.Array:
    """The weight on every device; its gradient stays in slices: `sharding`, as the weight's. JAX would replicate it."""
    return jax.lax.with_sharding_constraint(weight, NamedSharding(sharding.mesh, PartitionSpec()))


_replicate.defvjp(
    lambda weight, sharding: (_replicate(weight, sharding), None),
    lambda sharding, _, d_weight: (jax.lax.with_sharding_constraint(d_weight, sharding),),
)


def _remat(body, policy: str):
    if policy == "none":
        return body
    names = (SLOTS_NAME, *(DISPATCH_NAMES if policy == "save_dispatch" else ()))
    return jax.checkpoint(body, policy=jax.checkpoint_policies.save_only_these_names(*names))


def _read_experts(experts: dict, carriers: dict, layout: Layout, dtype, mesh: Mesh) -> tuple[dict, dict]:
    """A layer's router and the experts in its slots, as `MoE` has them, and the carriers."""
    width, (devices, _) = layout.is_own_W.size, layout.expert_PS.shape
    by_rows = devices > 1 and platform(mesh) != "tpu"
    moe, carried = {}, {}
    for flat, name in EXPERTS.items():
        sharding = NamedSharding(mesh, leaf_spec(flat, experts[flat].shape, mesh))
        in_slots = name != ROUTER and devices > 1
        if in_slots and by_rows:
            rows_R = layout.start + layout.expert_PS.reshape(-1)
            moe[name], carried[flat] = read_rows(experts[flat], carriers[flat], rows_R, sharding)
            continue
        moe[name], carried[flat] = read_window(experts[flat], carriers[flat], layout.start, width, sharding)
        if in_slots:
            moe[name] = pick(moe[name], layout.expert_PS.reshape(-1), dtype)
    return moe, carried


def _run_layers(x_BSD, params: dict, bias_N, layout: Layout, batch: dict, config: ModelConfig, graph, mesh: Mesh):
    """All layers; `MoEAux` comes back stacked over them."""
    experts = jax.lax.stop_gradient(params["experts"])  # the gradient is with the carriers

    def body(carry, layer):
        x_BSD, carriers = carry
        weights, layout = layer
        dense = _gathered_layer(weights, x_BSD.dtype, mesh)
        moe, carriers = _read_experts(experts, carriers, layout, x_BSD.dtype, mesh)
        bias_W = jax.lax.dynamic_slice_in_dim(bias_N, layout.start, layout.is_own_W.size)
        x_BSD, aux = nnx.merge(graph, dense | {"moe": moe})(x_BSD, batch, bias_W, layout, mesh)
        return (jax.lax.with_sharding_constraint(x_BSD, batch_sharding(mesh)), carriers), aux

    carry, layers = (x_BSD, params["experts"]), (params["layers"], layout)
    (x_BSD, _), aux = jax.lax.scan(_remat(body, config.remat), carry, layers, unroll=config.layers == "unrolled")
    return x_BSD, aux


@jax.custom_vjp
def _logits(x_BSD: jax.Array, unembedding_DV: jax.Array) -> jax.Array:
    """x W in float32, [B, S, V], not rounded to the dtype of its operands; the gradients have that dtype."""
    return jnp.matmul(x_BSD, unembedding_DV, preferred_element_type=jnp.float32)


def _logits_backward(operands, dlogits_BSV: jax.Array):
    """Of the plain product: without it both products would take float32 operands, at a fraction of the speed."""
    return jax.vjp(jnp.matmul, *operands)[1](dlogits_BSV.astype(operands[0].dtype))


_logits.defvjp(
    lambda x_BSD, unembedding_DV: (_logits(x_BSD, unembedding_DV), (x_BSD, unembedding_DV)), _logits_backward
)


def _cross_entropy(x_BSD: jax.Array, unembedding_DV: jax.Array, targets_BS: jax.Array) -> jax.Array:
    logits_BSV = _logits(x_BSD, unembedding_DV)
    chosen_BS = jnp.take_along_axis(logits_BSV, jnp.maximum(targets_BS, 0)[..., None], axis=-1)[..., 0]
    return jnp.where(targets_BS >= 0, jax.nn.logsumexp(logits_BSV, axis=-1) - chosen_BS, 0.0)


def cross_entropy(
    x_BSD: jax.Array, unembedding_DV: jax.Array, targets_BS: jax.Array, logits_chunk: int = LOGITS_CHUNK
) -> jax.Array:
    """-log softmax(x W)[target], float32 [B, S], zero where there is no target.

    No row has more than about `logits_chunk` logits in memory: what is more is done in parts of the
    sequence, whose logits the backward pass computes again.
    """
    rows, length, hidden = x_BSD.shape
    vocab = unembedding_DV.shape[1]
    divisors = (n for n in range(1, length + 1) if length % n == 0)
    parts = next(n for n in divisors if n == length or length // n * vocab <= logits_chunk)
    if parts == 1:
        return _cross_entropy(x_BSD, unembedding_DV, targets_BS)
    x_NBSD = jnp.swapaxes(x_BSD.reshape(rows, parts, length // parts, hidden), 0, 1)
    targets_NBS = jnp.swapaxes(targets_BS.reshape(rows, parts, length // parts), 0, 1)
    part = jax.checkpoint(lambda x: _cross_entropy(x[0], unembedding_DV, x[1]))
    return jnp.swapaxes(jax.lax.map(part, (x_NBSD, targets_NBS)), 0, 1).reshape(rows, length)


def _after(x: jax.Array, *numbers: jax.Array | float) -> jax.Array:
    """x itself, which now needs these finite numbers, so that the collectives they come from are done before.

    Of a loop and a collective beside it emulated devices begin either first, and hang where they differ in it.
    """
    return x + sum(0 * jax.lax.stop_gradient(jnp.asarray(number, x.dtype)) for number in numbers)


def hidden_states(
    params: dict,
    router_bias: dict,
    layout: Layout,
    batch: dict[str, jax.Array],
    config: ModelConfig,
    aux_losses: AuxLossConfig,
    mesh: Mesh,
    summed: jax.Array | float = 0.0,
) -> tuple[jax.Array, jax.Array, MoEAux]:
    """What the decoder makes of its tokens, before the logits.

    Args:
      params, router_bias: as `init_params` and `TrainState.router_bias`. layout: of all layers.
      batch: int32 arrays [B, S]: tokens_BS, segments_BS (0: padding), positions_BS; where tokens are to be counted by
        domain, bool domains_BSM [B, S, M].
      summed: a finite number that was summed over the devices for the caller; the layers wait for it on CPU.

    Returns:
      x_BSD, unembedding_DV in the compute dtype, and the layers' `MoEAux`, stacked; counts are of the experts of each
      layer's window.
    """
    dtype = jnp.dtype(config.dtype)
    table_VD = _gathered(params["embedding_VD"], dtype, mesh)
    x_BSD = jax.lax.with_sharding_constraint(table_VD[batch["tokens_BS"]], batch_sharding(mesh))
    with jax.named_scope("head"):
        unembedding_DV = table_VD.T if config.tie_embeddings else _gathered(params["unembedding_DV"], dtype, mesh)
        scale_D = _gathered(params["final_norm"]["scale_D"], dtype, mesh)
    if platform(mesh) == "cpu":
        x_BSD = _after(x_BSD, summed, unembedding_DV[0, 0], scale_D[0])
    layout = jax.tree.map(jnp.asarray, layout)
    graph = _block_graph(config, aux_losses)
    x_BSD, aux = _run_layers(x_BSD, params, router_bias["bias_N"], layout, batch, config, graph, mesh)
    with jax.named_scope("head"):
        return rms_norm(x_BSD, scale_D, config.norm_eps), unembedding_DV, aux


def token_losses(
    params: dict,
    router_bias: dict,
    layout: Layout,
    batch: dict[str, jax.Array],
    config: ModelConfig,
    aux_losses: AuxLossConfig,
    mesh: Mesh,
    summed: jax.Array | float = 0.0,
) -> tuple[jax.Array, MoEAux]:
    """Cross-entropy of every target, in nats: float32 [B, S], zero where there is no target, and the layers' `MoEAux`.

    Arguments as in `hidden_states`; batch has targets_BS as well, -1 for none.
    """
    x_BSD, unembedding_DV, aux = hidden_states(params, router_bias, layout, batch, config, aux_losses, mesh, summed)
    with jax.named_scope("head"):
        return cross_entropy(x_BSD, unembedding_DV, batch["targets_BS"]), aux


def logits(params: dict, router_bias: dict, layout: Layout, batch: dict, config: ModelConfig, mesh: Mesh) -> jax.Array:
    """Float32 [B, S, V]; arguments as in `hidden_states`."""
    x_BSD, unembedding_DV, _ = hidden_states(params, router_bias, layout, batch, config, AuxLossConfig(), mesh)
    return _logits(x_BSD, unembedding_DV)
