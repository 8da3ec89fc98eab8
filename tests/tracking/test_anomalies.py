"""Steps that are not finite change nothing; spikes are told with their place in the data."""

import jax
import numpy as np
import pytest

from laep_jax.checkpoint.checkpointer import Checkpoints
from laep_jax.config import Config
from laep_jax.data.dataset import Dataset, make_dataset
from laep_jax.sharding import make_mesh, put_batch
from laep_jax.state.tree import abstract_state, init_state, initial_layout
from laep_jax.tracking.anomalies import MIN_RECENT, is_spike
from laep_jax.training.start import train
from laep_jax.training.step import make_train_step
from tests.support.tiny_run import records, steps_on_disk, tiny_config

NUM_STEPS, NOT_FINITE, SPIKE = 36, (24, 25), 32
NO_TOKEN = 10**6  # the logit of what is past the end of the vocabulary reads as NaN


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Config:
    return tiny_config(
        str(tmp_path_factory.mktemp("tokens")),
        model={"num_layers": 1, "num_experts": 8, "router_init": 0.02},
        laep={"max_prunes": 0},
        optimizer={"learning_rate": 2e-2},
        train={"num_steps": NUM_STEPS, "checkpoint_every": 10, "max_skipped_steps": 3},
    )


def spoilt(train_batch, not_finite, spike):
    """`Dataset.train_batch` with steps (counted from 1) whose targets are no tokens, and one of random ones."""

    def batch(self, step: int) -> dict[str, np.ndarray]:
        arrays = train_batch(self, step)
        if step + 1 in not_finite:
            arrays["targets_BS"] = np.full_like(arrays["targets_BS"], NO_TOKEN)
        if step + 1 == spike:
            arrays["targets_BS"] = np.random.default_rng(0).integers(0, 256, arrays["targets_BS"].shape, np.int32)
        return arrays

    return batch


def test_a_step_that_is_not_finite_changes_nothing(config):
    resolved = config.resolve(8)
    mesh = make_mesh(resolved.mesh)
    data = make_dataset(
        config.data, eval_batches=config.train.eval_batches, seed=0, vocab_size=384, process_index=0, process_count=1
    )
    step = make_train_step(resolved, mesh)
    state, metrics = step(init_state(resolved, mesh), initial_layout(resolved), put_batch(data.train_batch(0), mesh))
    assert metrics["finite"]
    before = jax.device_get(state)
    batch = data.train_batch(1)
    batch["targets_BS"][3, 7] = NO_TOKEN
    after, metrics = step(state, initial_layout(resolved), put_batch(batch, mesh))
    assert not metrics["finite"]
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(after), before)


def test_skipped_steps_and_spikes_are_told_with_their_rows(config, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Dataset, "train_batch", spoilt(Dataset.train_batch, NOT_FINITE, SPIKE))
    summary = train(config, tmp_path)
    data = make_dataset(
        config.data, eval_batches=config.train.eval_batches, seed=0, vocab_size=384, process_index=0, process_count=1
    )
    assert [record["step"] for record in records(tmp_path, "skipped")] == list(NOT_FINITE)
    assert [record["step"] for record in records(tmp_path, "spike")] == [SPIKE]
    for record in (*records(tmp_path, "skipped"), *records(tmp_path, "spike")):
        rows = data.batch_rows(record["step"] - 1)
        assert record["rows"] == {"synthetic": rows["synthetic"].tolist()}
    assert summary["skipped_steps"] == len(NOT_FINITE)
    assert summary["validation_loss_end"] < 4
    losses = [record["loss"] for record in records(tmp_path, "train")]
    assert [step for step, loss in enumerate(losses, 1) if loss is None] == list(NOT_FINITE)
    out = capsys.readouterr().out
    assert f"step {NOT_FINITE[0]}: loss nan" in out
    assert f"step {SPIKE}: loss" in out


def test_too_many_in_a_row_stop_the_run_and_the_last_good_state_is_there(config, tmp_path, monkeypatch):
    monkeypatch.setattr(Dataset, "train_batch", spoilt(Dataset.train_batch, range(12, 99), None))
    with pytest.raises(FloatingPointError, match="3 steps in a row until step 14 were not finite"):
        train(config, tmp_path)
    assert steps_on_disk(tmp_path)[-1] == 10
    resolved = config.resolve(8)
    with Checkpoints(tmp_path / "checkpoints", keep=3) as checkpoints:
        state = checkpoints.restore(10, abstract_state(resolved, make_mesh(resolved.mesh)))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(jax.device_get(state)))


def test_a_spike_stands_out_of_the_noise_and_of_a_falling_loss():
    rng = np.random.default_rng(0)
    falling = 6 * np.exp(-np.arange(400) / 100) + 2 + 0.1 * rng.normal(size=400)
    assert not any(is_spike(falling[i], falling[max(0, i - 64) : i]) for i in range(400))
    assert is_spike(falling[-1] + 1.5, falling[-65:-1])
    assert not is_spike(1e9, falling[: MIN_RECENT - 1])
    assert is_spike(2.1, [2.0] * MIN_RECENT)
    assert not is_spike(2.05, [2.0] * MIN_RECENT)
