"""The learning rate by step: which schedules keep it when a run is extended. AdamW: as optax, without copies."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from laep_jax.config import Config, OptimizerConfig, TrainConfig
from laep_jax.errors import UserError
from laep_jax.state.optimizer import learning_rate, make_optimizer, make_schedule


def config(num_steps=400, **optimizer):
    return Config(
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=50, **optimizer),
        train=TrainConfig(num_steps=num_steps),
    )


def test_wsd_warms_up_stays_and_decays_over_the_last_steps():
    wsd = config(schedule="wsd", decay_fraction=0.25)
    expected = {0: 0.0, 25: 5e-4, 50: 1e-3, 300: 1e-3, 350: 5.5e-4, 400: 1e-4, 500: 1e-4}
    assert {step: learning_rate(wsd, step) for step in expected} == pytest.approx(expected, rel=1e-5)
    at_once = Config(optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=0, schedule="wsd"))
    assert learning_rate(at_once, 0) == pytest.approx(1e-3)


def test_wsd_extended_before_its_decay_keeps_every_rate_so_far_and_cosine_does_not():
    for step in (10, 100, 319):
        assert learning_rate(config(schedule="wsd"), step) == learning_rate(config(800, schedule="wsd"), step)
    assert learning_rate(config(800), 319) > 2 * learning_rate(config(), 319)


def test_cosine_is_the_closed_form():
    assert learning_rate(config(), 225) == pytest.approx(5.5e-4, rel=1e-5)  # half of the way from 1e-3 to 1e-4


def test_a_decay_that_begins_within_the_warm_up_is_refused():
    with pytest.raises(
        UserError, match=r"OptimizerConfig.decay_fraction=0.9 leaves 40 of num_steps=400 .* warmup_steps=50"
    ):
        config(schedule="wsd", decay_fraction=0.9)
    config(decay_fraction=0.9)  # of no account to the cosine


def _update(optimizer, **extra):
    """A jitted (gradients, state, params) -> (state, params), which take the place of the old ones."""

    def update(gradients, state, params):
        updates, state = optimizer.update(gradients, state, params, **extra)
        return state, optax.apply_updates(params, updates)

    return jax.jit(update, donate_argnums=(1, 2))


def _adamw(config: Config) -> optax.GradientTransformation:
    """What `make_optimizer` is by definition."""
    o = config.optimizer
    adamw = optax.adamw(
        make_schedule(config),
        o.b1,
        o.b2,
        o.eps,
        weight_decay=o.weight_decay,
        mask={"weight_XY": True, "scale_X": False},
    )
    return optax.chain(optax.clip_by_global_norm(o.clip_norm), adamw)


def _gradients(step: int) -> dict:
    return {name: 0.1 * jax.random.normal(jax.random.key(step), shape) for name, shape in SHAPES.items()}


SHAPES = {"weight_XY": (600, 400), "scale_X": (600,)}


def test_it_is_the_adamw_of_optax_bit_for_bit():
    ours, theirs = make_optimizer(config()), _adamw(config())
    params = {name: jnp.ones(shape) for name, shape in SHAPES.items()}
    mine, reference = (ours.init(params), params), (theirs.init(params), jax.tree.map(jnp.copy, params))
    assert jax.tree.structure(mine) == jax.tree.structure(reference)
    for step in range(4):
        mine = _update(ours, finite=True)(_gradients(step), *mine)
        reference = _update(theirs)(_gradients(step), *reference)
    jax.tree.map(np.testing.assert_array_equal, mine, reference)


def test_the_moments_are_not_copied():
    """XLA:CPU copies both of each leaf where the update and a choice of the new or old ones are made from the old."""
    leaf, finite = {"weight_XY": jax.ShapeDtypeStruct((600, 400), jnp.float32)}, jax.ShapeDtypeStruct((), bool)
    optimizer = make_optimizer(config())

    def step(gradients, state, params, finite):
        updates, state = optimizer.update(gradients, state, params, finite=finite)
        new = optax.apply_updates(params, updates)
        return state, jax.tree.map(lambda new, old: jnp.where(finite, new, old), new, params)

    arguments = leaf, jax.eval_shape(optimizer.init, leaf), leaf, finite
    memory = jax.jit(step, donate_argnums=(1, 2)).lower(*arguments).compile().memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < 1.1 * 4 * 600 * 400  # the clipped gradient; copies would be two more
