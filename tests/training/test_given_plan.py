"""What a cut may be told beyond the rule: a plan from a file, moments that begin anew; and where no one is to go."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import optax
import pytest

from laep_jax.config import Config, DataConfig, LaepConfig, ModelConfig, OptimizerConfig, TrainConfig
from laep_jax.errors import UserError
from laep_jax.files import read_records
from laep_jax.laep.plan import chosen_plan, identity_plan
from laep_jax.sharding import make_mesh
from laep_jax.training.checkpoint import Checkpoints
from laep_jax.training.guard import softened
from laep_jax.training.start import train
from laep_jax.training.state import abstract_state

CUT_STEP, NUM_STEPS = 4, 7
PRUNED = [[1, 2, 5, 7], [0, 3]]


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Config:
    model = ModelConfig(num_layers=2, hidden_size=16, num_heads=4, head_dim=4, ffn_size=8, num_experts=8)
    cache_dir = str(tmp_path_factory.mktemp("tokens"))
    return Config(
        model=model,
        data=DataConfig(source="synthetic", sequence_length=32, batch_size=16, cache_dir=cache_dir),
        laep=LaepConfig(prune_at_step=CUT_STEP, cut_delay=0, window=2, guard_steps=None, placement_loads="recorded"),
        optimizer=OptimizerConfig(warmup_steps=2),
        train=TrainConfig(num_steps=NUM_STEPS, eval_batches=1, checkpoint_every=9),
    )


@pytest.fixture
def with_laep(config):
    def change(**fields) -> Config:
        mesh = dataclasses.replace(config.mesh, fsdp=4, expert=2)
        return dataclasses.replace(config, mesh=mesh, laep=dataclasses.replace(config.laep, **fields))

    return change


@pytest.fixture
def plan_file(tmp_path) -> Path:
    loads = [np.arange(8.0)] * 2
    path = tmp_path / "plan.json"
    path.write_text(chosen_plan(loads, PRUNED, expert_parallel=2, top_k=2, placement="greedy").to_json())
    return path


def cuts(run_dir: Path) -> list[dict]:
    return [record for record in read_records(run_dir / "metrics.jsonl") if record["kind"] == "prune"]


def test_a_plan_from_a_file_is_carried_out_once(with_laep, plan_file, tmp_path):
    train(with_laep(plan=str(plan_file), max_prunes=1), tmp_path / "run")
    [cut] = cuts(tmp_path / "run")
    assert cut["step"] == CUT_STEP
    assert [sorted(ids) for ids in cut["lineage"]] == [[0, 3, 4, 6], [1, 2, 4, 5, 6, 7]]


def test_a_plan_that_was_undone_is_not_tried_again(plan_file):
    assert softened(LaepConfig(plan=str(plan_file), prune_at_step=1), 1, 2).max_prunes == 0


def test_a_plan_that_does_not_fit(with_laep, plan_file, tmp_path):
    with pytest.raises(UserError, match=r"LaepConfig\.plan='x\.json' needs prune_at_step"):
        LaepConfig(plan="x.json")
    with pytest.raises(UserError, match=r"missing\.json cannot be read"):
        train(with_laep(plan=str(tmp_path / "missing.json")), tmp_path / "run")
    other = chosen_plan([np.ones(8)], [[0, 1]], expert_parallel=2, top_k=2, placement="greedy")
    plan_file.write_text(other.to_json())
    with pytest.raises(UserError, match=r"LaepConfig\.plan .*plan\.json: \(num_experts, .* is not \(\(8, 8\), 2, 2\)"):
        train(with_laep(plan=str(plan_file)), tmp_path / "run")
    plan_file.write_text(identity_plan((8, 8), expert_parallel=2, top_k=2).to_json())
    with pytest.raises(UserError, match="prunes no one"):
        train(with_laep(plan=str(plan_file)), tmp_path / "run")


@pytest.mark.parametrize("restore", ["orbax", "memory"])
def test_moments_begin_anew_after_a_cut(with_laep, plan_file, tmp_path, restore):
    config = with_laep(plan=str(plan_file), reset_moments=True, restore=restore)
    train(config, tmp_path / "run")
    cut = config.with_num_experts((4, 6)).resolve(8)
    with Checkpoints(tmp_path / "run" / "checkpoints", keep=3) as checkpoints:
        state = checkpoints.restore(NUM_STEPS, abstract_state(cut, make_mesh(cut.mesh)))
    parts = jax.tree.leaves(state.opt_state, is_leaf=lambda part: isinstance(part, optax.ScaleByAdamState))
    [adam] = [part for part in parts if isinstance(part, optax.ScaleByAdamState)]
    assert int(adam.count) == NUM_STEPS - CUT_STEP
    [schedule] = [part for part in parts if not isinstance(part, optax.ScaleByAdamState)]
    assert (int(schedule), int(state.step)) == (NUM_STEPS, NUM_STEPS)


def test_where_the_rule_prunes_no_one_nothing_is_cut(with_laep, tmp_path):
    train(with_laep(alpha=0.0), tmp_path)
    assert cuts(tmp_path) == []
