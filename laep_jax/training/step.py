"""One optimizer step and one evaluation as jitted functions of (state, batch), built from a config.

Losses and gradients are sums over the targets of the whole batch divided by their number, however the
batch is split into micro-batches; token counts add up over micro-batches and are outputs.
Axes: A micro-batches, B rows, S sequence, E experts, M domains.
"""

import functools
import typing

import jax
import jax.numpy as jnp
import numpy as np
import optax

from laep_jax.config import Config
from laep_jax.model.router import update_bias
from laep_jax.model.transformer import token_losses
from laep_jax.sharding import Mesh, batch_sharding, replicated
from laep_jax.state.optimizer import make_optimizer, make_schedule
from laep_jax.state.tree import TrainState, abstract_state

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array | list[jax.Array] | dict[str, jax.Array]]


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


def _loss(params: dict, router_bias: dict, batch: Batch, num_targets: jax.Array, config: Config, mesh: Mesh):
    """One micro-batch's share of the step's loss, and what is reported of it."""
    loss_BS, run_aux = token_losses(params, router_bias, batch, config.model, config.aux_loss, mesh, num_targets)
    cross_entropy = jnp.sum(loss_BS) / num_targets
    names = run_aux[0].losses
    share = 1 / config.train.grad_accumulation
    aux = {name: share * jnp.mean(jnp.concatenate([part.losses[name] for part in run_aux])) for name in names}
    weighted = sum(getattr(config.aux_loss, name) * value for name, value in aux.items())
    counts = [part.tokens_per_expert_E for part in run_aux]
    return cross_entropy + weighted, {"loss": cross_entropy, "aux": aux, "tokens_per_expert": counts}


def _loss_and_gradients(state: TrainState, batch: Batch, config: Config, mesh: Mesh):
    """What `_loss` reports and the gradients, added over the micro-batches."""
    num_targets = jnp.maximum(jnp.sum(batch["targets_BS"] >= 0), 1).astype(jnp.float32)

    def one(micro_batch):
        function = functools.partial(_loss, config=config, mesh=mesh)
        gradients, report = jax.grad(function, has_aux=True)(state.params, state.router_bias, micro_batch, num_targets)
        return report, gradients

    if config.train.grad_accumulation == 1:
        return one(batch)
    micro_batches = _micro_batches(batch, config.train.grad_accumulation)
    shapes = jax.eval_shape(one, jax.tree.map(lambda x: x[0], micro_batches))
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    total, _ = jax.lax.scan(lambda total, x: (jax.tree.map(jnp.add, total, one(x)), None), zeros, micro_batches)
    return total


def _updated_bias(router_bias: dict, tokens_per_expert: list[jax.Array], step_size: float) -> dict:
    runs = zip(router_bias["runs"], tokens_per_expert, strict=True)
    return {"runs": [{"bias_E": update_bias(run["bias_E"], counts_E, step_size)} for run, counts_E in runs]}


def train_step(state: TrainState, batch: Batch, *, config: Config, mesh: Mesh) -> tuple[TrainState, Metrics]:
    """One step of the optimizer.

    Returns:
      the new state and float32 scalars loss (mean cross-entropy in nats), grad_norm (before clipping),
      learning_rate, aux {name: mean over layers, unweighted}; tokens_per_expert, for each run int32
      [layers, E], of the whole batch; finite, whether loss and gradients are. Where they are not, the state is the old.
    """
    report, gradients = _loss_and_gradients(state, batch, config, mesh)
    grad_norm = optax.tree.norm(gradients)
    finite = jnp.isfinite(report["loss"]) & jnp.isfinite(grad_norm)
    with jax.named_scope("optimizer"):
        updates, opt_state = make_optimizer(config).update(gradients, state.opt_state, state.params)
        params = typing.cast(dict, optax.apply_updates(state.params, updates))
        router_bias = state.router_bias
        if config.aux_loss.loss_free_bias:
            router_bias = _updated_bias(router_bias, report["tokens_per_expert"], config.aux_loss.loss_free_bias)
        updated = TrainState(state.step + 1, params, opt_state, router_bias)
        kept = jax.tree.map(lambda new, old: jnp.where(finite, new, old), updated, state)
    metrics = report | {
        "grad_norm": grad_norm,
        "learning_rate": jnp.asarray(make_schedule(config)(state.step), jnp.float32),
        "finite": finite,
    }
    return kept, metrics


def make_train_step(config: Config, mesh: Mesh) -> jax.stages.Wrapped:
    """`train_step`, jitted: (state, batch) -> (state, metrics).

    Donates its state and keeps its shardings; metrics are whole everywhere.
    """
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(config, mesh))
    step = functools.partial(train_step, config=config, mesh=mesh)
    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, replicated(mesh)))


def make_eval_step(config: Config, mesh: Mesh, num_domains: int):
    """A jitted (params, router_bias, batch with domains_BS) -> (loss_M, targets_M, tokens_per_expert by run).

    loss_M: float32 sum of each domain's cross-entropy. targets_M: int32, how many that are.
    """

    def eval_step(params: dict, router_bias: dict, batch: Batch):
        belongs_BSM = jax.nn.one_hot(batch["domains_BS"], num_domains, dtype=bool)
        targets_M = jnp.sum(belongs_BSM & (batch["targets_BS"] >= 0)[..., None], axis=(0, 1))
        loss_BS, run_aux = token_losses(
            params, router_bias, batch, config.model, config.aux_loss, mesh, summed=targets_M[0]
        )
        loss_M = jnp.sum(jnp.where(belongs_BSM, loss_BS[..., None], 0), axis=(0, 1))  # a scatter has no fixed order
        return loss_M, targets_M, [part.tokens_per_expert_E for part in run_aux]

    return jax.jit(eval_step, out_shardings=replicated(mesh))
