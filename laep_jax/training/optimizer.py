"""AdamW with global-norm clipping, linear warm-up and cosine decay, from optax."""

import jax
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
