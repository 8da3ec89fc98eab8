"""One optimizer step and one evaluation as jitted functions of (state, batch), built from a config.

Losses and gradients are sums over the targets of the whole batch divided by their number, however the
batch is split into micro-batches; token counts add up over micro-batches and are outputs.
Axes: A micro-batches, B rows, S sequence, L layers, W experts of a window, P devices of the expert axis, M domains.
"""

import functools
import typing

import jax
import jax.numpy as jnp
import numpy as np
import optax

from laep_jax.chips import chip_of
from laep_jax.config import Config
from laep_jax.laep.layout import Layout
from laep_jax.model.router import update_bias
from laep_jax.model.transformer import token_losses
from laep_jax.sharding import Mesh, batch_sharding, replicated
from laep_jax.state.optimizer import make_optimizer, make_schedule
from laep_jax.state.tree import TrainState, abstract_state

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array | dict[str, jax.Array]]


def abstract_batch(config: Config, mesh: Mesh, *, validation: bool = False) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and shardings of a batch; validation: of the eval step's, which has the domains too."""
    shape = (config.data.batch_size, config.data.sequence_length)
    names = ("tokens_BS", "targets_BS", "segments_BS", "positions_BS", *["domains_BS"] * validation)
    return {name: jax.ShapeDtypeStruct(shape, np.int32, sharding=batch_sharding(mesh)) for name in names}


def _micro_batches(batch: Batch, number: int) -> Batch:
    """[B, S] -> [A, B/A, S], rows interleaved so that every device keeps its own."""

    def split(x_BS):
        rows, length = x_BS.shape
        return jnp.swapaxes(x_BS.reshape(rows // number, number, length), 0, 1)

    return jax.tree.map(split, batch)


def _loss(params: dict, state: TrainState, layout: Layout, batch: Batch, num_targets, config: Config, mesh: Mesh):
    """One micro-batch's share of the step's loss, and what is reported of it."""
    loss_BS, moe_aux = token_losses(
        params, state.router_bias, layout, batch, config.model, config.aux_loss, mesh, num_targets
    )
    cross_entropy = jnp.sum(loss_BS) / num_targets
    share = 1 / config.train.grad_accumulation
    aux = {name: share * jnp.mean(loss_L) for name, loss_L in moe_aux.losses.items()}
    weighted = sum(getattr(config.aux_loss, name) * value for name, value in aux.items())
    report = {
        "loss": cross_entropy,
        "aux": aux,
        "tokens_per_expert": moe_aux.tokens_per_expert_E,
        "tokens_per_device": moe_aux.tokens_per_device_P,
    }
    return cross_entropy + weighted, report


def _loss_and_gradients(state: TrainState, layout: Layout, batch: Batch, config: Config, mesh: Mesh):
    """What `_loss` reports and the gradients, added over the micro-batches."""
    num_targets = jnp.maximum(jnp.sum(batch["targets_BS"] >= 0), 1).astype(jnp.float32)

    def one(micro_batch):
        function = functools.partial(_loss, config=config, mesh=mesh)
        gradients, report = jax.grad(function, has_aux=True)(state.params, state, layout, micro_batch, num_targets)
        return report, gradients

    if config.train.grad_accumulation == 1:
        return one(batch)
    micro_batches = _micro_batches(batch, config.train.grad_accumulation)
    shapes = jax.eval_shape(one, jax.tree.map(lambda x: x[0], micro_batches))
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    total, _ = jax.lax.scan(lambda total, x: (jax.tree.map(jnp.add, total, one(x)), None), zeros, micro_batches)
    return total


def _if_finite(finite: jax.Array, path: tuple, new: jax.Array, old: jax.Array) -> jax.Array:
    """The new leaf of a state where the step was finite, else the old. The optimizer has chosen its moments itself."""
    is_moment = path[0] == jax.tree_util.GetAttrKey("opt_state") and new.ndim > 0
    return new if is_moment else jnp.where(finite, new, old)


def train_step(
    state: TrainState, layout: Layout, batch: Batch, *, config: Config, mesh: Mesh
) -> tuple[TrainState, Metrics]:
    """One step of the optimizer.

    Returns:
      the new state and float32 scalars loss (mean cross-entropy in nats), grad_norm (before clipping),
      learning_rate, aux {name: mean over layers, unweighted}; int32 tokens_per_expert [L, W] and
      tokens_per_device [L, P], of the whole batch; finite, whether loss and gradients are. Where they are not, the
      state is the old.
    """
    report, gradients = _loss_and_gradients(state, layout, batch, config, mesh)
    grad_norm = optax.tree.norm(gradients)
    finite = jnp.isfinite(report["loss"]) & jnp.isfinite(grad_norm)
    with jax.named_scope("optimizer"):
        updates, opt_state = make_optimizer(config).update(gradients, state.opt_state, state.params, finite=finite)
        params = typing.cast(dict, optax.apply_updates(state.params, updates))
        router_bias = state.router_bias
        if step_size := config.aux_loss.loss_free_bias:
            counts_LW = report["tokens_per_expert"]
            router_bias = {"bias_N": update_bias(router_bias["bias_N"], counts_LW, layout.is_own_W, step_size)}
        updated = TrainState(state.step + 1, params, opt_state, router_bias)
        kept = jax.tree_util.tree_map_with_path(functools.partial(_if_finite, finite), updated, state)
    metrics = report | {
        "grad_norm": grad_norm,
        "learning_rate": jnp.asarray(make_schedule(config)(state.step), jnp.float32),
        "finite": finite,
    }
    return kept, metrics


def make_train_step(config: Config, mesh: Mesh) -> jax.stages.Wrapped:
    """`train_step`, jitted: (state, layout, batch) -> (state, metrics).

    Donates its state and keeps its shardings; metrics are whole everywhere. Compiled with the options of its chip.
    """
    chip = chip_of(mesh.devices.flat[0].device_kind)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(config, mesh))
    step = functools.partial(train_step, config=config, mesh=mesh)
    options = chip.compiler_options if chip else {}
    out_shardings = (shardings, replicated(mesh))
    return jax.jit(step, donate_argnums=0, out_shardings=out_shardings, compiler_options=options)


def make_eval_step(config: Config, mesh: Mesh, num_domains: int):
    """A jitted (layout, params, router_bias, batch with domains_BS) -> (loss_M, targets_M, tokens_per_expert_LMW).

    loss_M: float32 sum of each domain's cross-entropy. targets_M: int32, how many that are. Tokens are int32.
    """

    def eval_step(layout: Layout, params: dict, router_bias: dict, batch: Batch):
        belongs_BSM = jax.nn.one_hot(batch["domains_BS"], num_domains, dtype=bool)
        targets_M = jnp.sum(belongs_BSM & (batch["targets_BS"] >= 0)[..., None], axis=(0, 1))
        batch = batch | {"domains_BSM": belongs_BSM}
        loss_BS, moe_aux = token_losses(
            params, router_bias, layout, batch, config.model, config.aux_loss, mesh, summed=targets_M[0]
        )
        loss_M = jnp.sum(jnp.where(belongs_BSM, loss_BS[..., None], 0), axis=(0, 1))  # a scatter has no fixed order
        return loss_M, targets_M, moe_aux.tokens_per_domain_ME

    return jax.jit(eval_step, out_shardings=replicated(mesh))
