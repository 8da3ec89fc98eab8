"""What a prune may be told beyond the rule: a plan from a file, moments that begin anew; and where no one is to go."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import optax
import pytest

from laep_jax.checkpoint.checkpointer import Checkpoints
from laep_jax.config import Config, LaepConfig
from laep_jax.errors import UserError
from laep_jax.laep.plan import chosen_plan, identity_plan
from laep_jax.laep.rule import PruneRule
from laep_jax.sharding import make_mesh
from laep_jax.state.tree import abstract_state
from laep_jax.training.prune.guard import softened
from laep_jax.training.start import train
from tests.support.tiny_run import change, differences, records, tiny_config
from tests.support.watching import InterruptError, after, interrupt

PRUNE_STEP, NUM_STEPS = 4, 7
PRUNED = [[1, 2, 5, 7], []]
RULE = PruneRule.from_settings(LaepConfig(placement="greedy"), 2, top_k=2, expert_parallel=4)


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Config:
    return tiny_config(
        str(tmp_path_factory.mktemp("tokens")),
        laep={"prune_at_step": PRUNE_STEP, "prune_delay": 0, "guard_tolerance": None, "placement_loads": "recorded"},
        train={"num_steps": NUM_STEPS, "checkpoint_every": 50},
    )


@pytest.fixture
def plan_file(tmp_path) -> Path:
    loads = [np.arange(8.0)] * 2
    path = tmp_path / "plan.json"
    path.write_text(chosen_plan(loads, PRUNED, RULE).to_json())
    return path


def test_a_plan_from_a_file_is_applied_once_and_a_second_one_to_the_pruned_model(config, plan_file, tmp_path):
    first = change(config, laep={"plan": str(plan_file), "max_prunes": 1})
    train(first, tmp_path / "run")
    [prune] = records(tmp_path / "run", "prune")
    assert prune["step"] == PRUNE_STEP
    assert [sorted(ids) for ids in prune["lineage"]] == [[0, 3, 4, 6], [*range(8)]]
    loads = [np.arange(4.0), np.arange(8.0)]
    second = chosen_plan(loads, [[], [0, 1, 2, 3]], RULE)
    plan_file.write_text(second.to_json())
    later = {"max_prunes": 2, "prune_at_step": NUM_STEPS + 1}
    train(change(first, laep=later, train={"num_steps": NUM_STEPS + 3}), tmp_path / "run")
    assert [prune["step"] for prune in records(tmp_path / "run", "prune")] == [PRUNE_STEP, NUM_STEPS + 1]
    assert sorted(records(tmp_path / "run", "prune")[1]["lineage"][1]) == sorted(prune["lineage"][1][4:])


def test_a_plan_that_was_refused_is_not_tried_again(plan_file):
    assert softened(LaepConfig(plan=str(plan_file), prune_at_step=1), 1, 2).max_prunes == 0


def test_a_plan_that_does_not_fit(config, plan_file, tmp_path):
    with pytest.raises(UserError, match=r"LaepConfig\.plan='x\.json' needs prune_at_step"):
        LaepConfig(plan="x.json")
    with pytest.raises(UserError, match=r"missing\.json cannot be read"):
        train(change(config, laep={"plan": str(tmp_path / "missing.json")}), tmp_path / "run")
    other = chosen_plan([np.ones(8)], [[0, 1, 2, 3]], dataclasses.replace(RULE, alpha=(0.4,)))
    plan_file.write_text(other.to_json())
    with pytest.raises(UserError, match=r"plan\.json: num_experts=\(8,\) is not the run's \(8, 8\)$"):
        train(change(config, laep={"plan": str(plan_file)}), tmp_path / "run")
    plan_file.write_text(identity_plan((8, 8), expert_parallel=4, top_k=2).to_json())
    with pytest.raises(UserError, match="prunes no experts"):
        train(change(config, laep={"plan": str(plan_file)}), tmp_path / "run")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize("prune_via", ["checkpoint", "memory"])
def test_moments_begin_anew_after_a_prune(config, plan_file, tmp_path, prune_via):
    config = change(config, laep={"plan": str(plan_file), "reset_moments": True, "prune_via": prune_via})
    train(config, tmp_path / "run")
    cut = config.with_num_experts((4, 8)).resolve(8)
    with Checkpoints(tmp_path / "run" / "checkpoints", keep=3) as checkpoints:
        state = checkpoints.restore(NUM_STEPS, abstract_state(cut, make_mesh(cut.mesh)))
    parts = jax.tree.leaves(state.opt_state, is_leaf=lambda part: isinstance(part, optax.ScaleByAdamState))
    [adam] = [part for part in parts if isinstance(part, optax.ScaleByAdamState)]
    assert int(adam.count) == NUM_STEPS - PRUNE_STEP
    [schedule] = [part for part in parts if not isinstance(part, optax.ScaleByAdamState)]
    assert (int(schedule), int(state.step)) == (NUM_STEPS, NUM_STEPS)


def test_where_the_rule_prunes_no_expert_nothing_is_pruned(config, tmp_path):
    train(change(config, laep={"alpha": 0.0}), tmp_path)
    assert records(tmp_path, "prune") == []


def test_experts_that_do_not_divide_by_the_devices_are_pruned_and_resumed(config, tmp_path):
    """12 experts on 8 devices, then 9 and 11."""
    loads = [np.arange(12.0)] * 2
    plan = tmp_path / "plan.json"
    rule = dataclasses.replace(RULE, expert_parallel=8)
    plan.write_text(chosen_plan(loads, [[0, 1, 2], [5]], rule).to_json())
    wide = change(
        config,
        model={"num_experts": 12},
        mesh={"fsdp": None, "expert": None},
        laep={"plan": str(plan)},
        train={"checkpoint_every": PRUNE_STEP + 1},
    )
    train(wide, tmp_path / "whole")
    with pytest.raises(InterruptError):
        train(wide, tmp_path / "resumed", watch=after("record", PRUNE_STEP + 2, interrupt))
    train(wide, tmp_path / "resumed")
    assert records(tmp_path / "resumed", "prune")[0]["experts_after"] == [9, 11]
    assert not differences(tmp_path / "resumed", tmp_path / "whole")
