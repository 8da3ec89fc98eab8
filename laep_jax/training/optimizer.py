"""AdamW with global-norm clipping, linear warm-up and cosine decay, from optax."""

import jax
import jax.numpy as jnp
import optax

from laep_jax.config import Config
from laep_jax.sharding import leaf_name


def make_schedule(config: Config) -> optax.Schedule:
    """Learning rate by optimizer step: 0 to the peak over the warm-up, then a cosine to the end."""
    optimizer = config.optimizer
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0 if optimizer.warmup_steps else optimizer.learning_rate,
        peak_value=optimizer.learning_rate,
        warmup_steps=optimizer.warmup_steps,
        decay_steps=max(config.train.num_steps, optimizer.warmup_steps + 1),
        end_value=optimizer.learning_rate * optimizer.final_fraction,
    )


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


def make_optimizer(config: Config) -> optax.GradientTransformation:
    optimizer = config.optimizer
    return optax.chain(
        optax.clip_by_global_norm(optimizer.clip_norm),
        optax.adamw(
            make_schedule(config),
            b1=optimizer.b1,
            b2=optimizer.b2,
            eps=optimizer.eps,
            weight_decay=optimizer.weight_decay,
            mask=_decayed,
        ),
    )
