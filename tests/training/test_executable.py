"""A step compiled here, written, and loaded by a run: the same losses, and every misfit named."""

import dataclasses

import jax
import pytest

from laep_jax.config import Config, DataConfig, MeshConfig, ModelConfig, TrainConfig
from laep_jax.errors import UserError
from laep_jax.sharding import make_mesh
from laep_jax.state.tree import abstract_layout, abstract_state
from laep_jax.training.executable import load_step, save_step
from laep_jax.training.prune import compile_ahead
from laep_jax.training.start import train
from laep_jax.training.step import abstract_batch, make_train_step
from tests.support.tiny_run import records

CONFIG = Config(
    model=ModelConfig(num_layers=2, hidden_size=16, num_heads=2, head_dim=8, ffn_size=8, num_experts=8),
    mesh=MeshConfig(fsdp=2, expert=4),
    data=DataConfig(source="synthetic", sequence_length=32, batch_size=16),
    train=TrainConfig(num_steps=3, eval_batches=1),
)


@pytest.fixture(scope="module")
def step() -> jax.stages.Compiled:
    mesh = make_mesh(CONFIG.mesh)
    arguments = abstract_state(CONFIG, mesh), abstract_layout(CONFIG, mesh), abstract_batch(CONFIG, mesh)
    return make_train_step(CONFIG, mesh).lower(*arguments).compile()


@pytest.fixture(scope="module")
def saved(step, tmp_path_factory):
    file = tmp_path_factory.mktemp("step") / "step.bin"
    save_step(file, step, CONFIG, make_mesh(CONFIG.mesh))
    return file


def losses(run_dir) -> list[float]:
    return [record["loss"] for record in records(run_dir, "train")]


def test_a_run_with_the_executable_compiles_no_step_and_has_the_same_losses(saved, tmp_path, monkeypatch):
    config = dataclasses.replace(CONFIG, data=dataclasses.replace(CONFIG.data, cache_dir=str(tmp_path / "cache")))
    train(config, tmp_path / "compiled")

    def forbidden(*_):
        raise AssertionError("a step was compiled")

    monkeypatch.setattr(compile_ahead, "make_train_step", forbidden)
    train(config, tmp_path / "loaded", executable=saved)
    assert len(losses(tmp_path / "loaded")) == 3
    assert losses(tmp_path / "loaded") == losses(tmp_path / "compiled")


@pytest.mark.parametrize(
    ("part", "field", "value"),
    [("model", "ffn_size", 16), ("data", "batch_size", 32), ("train", "num_steps", 4), ("laep", "replica_slots", 0)],
)
def test_another_config_is_refused_by_name(saved, part, field, value):
    other = dataclasses.replace(CONFIG, **{part: dataclasses.replace(getattr(CONFIG, part), **{field: value})})
    with pytest.raises(UserError, match=rf"{part}.{field}={value} does not fit --executable"):
        load_step(saved, other, make_mesh(CONFIG.mesh))


def test_another_machine_is_refused(saved):
    mesh = make_mesh(MeshConfig(fsdp=1, expert=4), jax.devices()[:4])
    with pytest.raises(UserError, match=r"devices='4 cpu' does not fit --executable=.*, made for 8 cpu"):
        load_step(saved, CONFIG, mesh)


def test_what_is_no_such_file_is_refused(step, tmp_path):
    (tmp_path / "x").write_bytes(b"\x80\n")
    for file, message in ((tmp_path / "x", "is not JSON"), (tmp_path / "y", "cannot be read")):
        with pytest.raises(UserError, match=message):
            load_step(file, CONFIG, make_mesh(CONFIG.mesh))
    with pytest.raises(UserError, match=r"--save=.*cannot be written"):
        save_step(tmp_path / "no" / "z", step, CONFIG, make_mesh(CONFIG.mesh))
