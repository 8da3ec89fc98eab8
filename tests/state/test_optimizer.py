"""The learning rate by step: which schedules keep it when a run is extended."""

import pytest

from laep_jax.config import Config, OptimizerConfig, TrainConfig
from laep_jax.errors import UserError
from laep_jax.state.optimizer import learning_rate


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
