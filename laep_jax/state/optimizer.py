"""AdamW with global-norm clipping and the schedule of its learning rate, from optax."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from laep_jax.config import Config
from laep_jax.sharding import leaf_name


def make_schedule(config: Config) -> optax.Schedule:
    """Learning rate by optimizer step: 0 to the peak over the warm-up, then to the end of the run.

    cosine: from the peak at once. Every rate depends on `num_steps`.
    wsd: warm-up, stable, decay (MiniCPM, arXiv 2404.06395): the peak, then linearly down over the last
    `decay_fraction` of the steps. Until the decay no rate depends on `num_steps`, so a run can be extended.
    """
    optimizer, num_steps = config.optimizer, config.train.num_steps
    peak, warmup = optimizer.learning_rate, optimizer.warmup_steps
    start, end = 0.0 if warmup else peak, peak * optimizer.final_fraction
    if optimizer.schedule == "cosine":
        return optax.warmup_cosine_decay_schedule(
            init_value=start,
            peak_value=peak,
            warmup_steps=warmup,
            decay_steps=max(num_steps, warmup + 1),
            end_value=end,
        )
    decay = config.decay_steps
    phases = [
        optax.linear_schedule(start, peak, warmup),
        optax.constant_schedule(peak),
        optax.linear_schedule(peak, end, decay),
    ]
    return optax.join_schedules(phases, [warmup, num_steps - decay])


def learning_rate(config: Config, step: int) -> float:
    """The rate of the step that follows `step` optimizer steps."""
    return float(np.asarray(make_schedule(config)(step)))


def _decayed(params):
    """True for matrices: norm scales and biases are not decayed."""
    return jax.tree_util.tree_map_with_path(lambda path, _: len(leaf_name(path).rpartition("_")[2]) > 1, params)


def without_moments(opt_state: optax.OptState) -> optax.OptState:
    """The optimizer's state with Adam as at the beginning; the schedule goes on. The old state is released."""

    def zeroed(part):
        return jax.tree.map(jnp.zeros_like, part) if isinstance(part, optax.ScaleByAdamState) else part

    def reset(state):
        return jax.tree.map(zeroed, state, is_leaf=lambda part: isinstance(part, optax.ScaleByAdamState))

    shardings = jax.tree.map(lambda leaf: leaf.sharding, opt_state)
    return jax.jit(reset, out_shardings=shardings, donate_argnums=0)(opt_state)


def make_optimizer(config: Config) -> optax.GradientTransformationExtraArgs:
    """`optax.adamw` behind the clipping, with its state. `update` also takes `finite`: if False, no moment changes."""
    optimizer = config.optimizer
    return optax.chain(
        optax.clip_by_global_norm(optimizer.clip_norm),
        optax.chain(
            _scale_by_adam(optimizer.b1, optimizer.b2, optimizer.eps),
            optax.add_decayed_weights(optimizer.weight_decay, mask=_decayed),
            optax.scale_by_learning_rate(make_schedule(config)),
        ),
    )


def _scale_by_adam(b1: float, b2: float, eps: float) -> optax.GradientTransformationExtraArgs:
    """`optax.scale_by_adam`, but updates are made from the moments that are kept, new or old.

    XLA:CPU makes an operation of each result. Were updates made from the new ones before that choice, it would copy the
    old ones, since both need them and the kept ones take their place.
    """
    adam = optax.scale_by_adam(b1, b2, eps)

    def update(updates, state, params=None, **extra_args):
        del params
        new = adam.update(updates, state)[1]
        new = jax.tree.map(lambda new, old: jnp.where(extra_args["finite"], new, old), new, state)
        mean, square = (
            optax.tree.bias_correction(moment, decay, new.count) for moment, decay in ((new.mu, b1), (new.nu, b2))
        )
        return jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + eps), mean, square), new

    return optax.GradientTransformationExtraArgs(adam.init, update)
