"""The rows of the experiments: every file reads, is used, and branches from what it should."""

import dataclasses

import pytest

from experiments.catalogue import EXPERIMENTS
from experiments.derived import DERIVED
from experiments.results import FOLDER, read_results
from experiments.rows import base_of, load_row, names
from experiments.runner import branch_step
from laep_jax.errors import UserError

USED = {entry.row for experiment in EXPERIMENTS.values() for entry in experiment.entries}


def test_every_file_is_a_row_of_an_experiment_and_the_other_way_round():
    assert set(names()) == USED
    assert set(DERIVED) <= USED


@pytest.mark.parametrize("name", sorted(USED))
def test_a_row_that_prunes_branches_from_the_same_run_without_a_prune(name):
    row = load_row(name, seed=3)
    base = base_of(row)
    assert row.seed == 3
    assert (base is not None) == row.prunes
    if base:
        assert not base.prunes
        assert dataclasses.replace(base.config, laep=row.config.laep) == row.config
        kept = row.config.train.keep_checkpoints * row.config.train.checkpoint_every
        assert branch_step(row) > row.config.train.num_steps - kept - 1, "the base run keeps no checkpoint so old"


def test_every_stored_result_is_of_a_row_as_it_is_now():
    stored = [result for result in read_results(FOLDER) if result["row"] in USED]
    assert len(stored) > 100
    for result in stored:
        assert result["digest"] == load_row(result["row"], result["seed"]).digest, (result["row"], result["seed"])


def test_rows_of_a_table_differ_in_nothing_but_what_they_are_about():
    base = load_row("base", 0).config
    for name in USED:
        config = load_row(name, 0).config
        batches = 60 if name.startswith(("domains", "tasks")) else 20  # all validation text
        assert dataclasses.replace(base.train, eval_batches=batches) == dataclasses.replace(
            config.train, checkpoint_every=50
        ), name
        assert config.optimizer == base.optimizer, name
        assert (config.mesh == base.mesh) == (name != "other_order"), name


def test_the_base_of_a_row():
    bases = {"alpha_0.4": "base", "no_lfa_alpha_0.2": "no_lfa", "experts_256_hybrid": "experts_256", "early": "base"}
    for name, base in bases.items():
        found = base_of(load_row(name, 1))
        assert found
        assert (found.name, found.seed) == (base, 1)


def test_a_digest_changes_with_every_setting_that_counts():
    row = load_row("base", 0)
    same = load_row("base", 0, bindings=["TrainConfig.log_every = 7"])
    others = [load_row("base", 1), load_row("base", 0, bindings=["OptimizerConfig.learning_rate = 1e-4"])]
    assert row.digest == same.digest
    assert len({row.digest, *(other.digest for other in others)}) == 3


def test_a_name_that_there_is_not():
    with pytest.raises(UserError, match=r"there is no 'alpha_0\.5' in .*configs; there are .*alpha_0\.4"):
        load_row("alpha_0.5", 0)
    with pytest.raises(UserError, match=r"there is no .moon. in .*scales"):
        load_row("base", 0, scale="moon")
