"""What a run is opened with, and what is refused before anything is compiled."""

import json

import pytest

from laep_jax.errors import UserError
from laep_jax.storage import Disk
from laep_jax.training.check import check
from laep_jax.training.resume import find_run_state
from laep_jax.training.run_state import RunState
from laep_jax.training.start import train
from tests.support.tiny_run import change, tiny_config


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return tiny_config(str(tmp_path_factory.mktemp("tokens")), train={"num_steps": 2, "checkpoint_every": 2})


def test_a_check_refuses_what_training_would_and_writes_nothing(config, tmp_path):
    [*_, last] = check(config, tmp_path / "new")
    assert last == f"{tmp_path / 'new'}: the run starts; nothing was trained"
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    for name, file in (("damaged", "manifest.json"), ("aside", "damaged.json")):
        Disk(tmp_path / name / "checkpoints").write(f"3/{file}", b"")
    for name, message in (
        ("file", "file is not a directory"),
        ("file/x", "file is not a directory"),
        ("damaged", r"3/manifest\.json is damaged"),
        ("aside", "no checkpoint in .* validates"),
    ):
        with pytest.raises(UserError, match=message):
            check(config, tmp_path / name)


def test_a_complete_run_is_shown_again_with_the_summary_that_a_kill_cost_it(config, tmp_path):
    summary = train(config, tmp_path)
    assert check(config, tmp_path)[-1].endswith("the run is complete; nothing was trained")
    (tmp_path / "summary.json").unlink()
    assert train(config, tmp_path) == summary == json.loads((tmp_path / "summary.json").read_text())


def test_plans_refused_by_another_rule_do_not_count(config, tmp_path):
    state = RunState.fresh(config.resolve(8), "sha")
    state.step, state.retries = 3, 3
    meta = json.loads(json.dumps(state.to_meta()))
    where = f"{tmp_path}/3"
    assert find_run_state(config, "sha", where, meta, 8)[0].retries == 3
    softer = change(config, laep={"guard_tolerance": None})
    assert find_run_state(softer, "sha", where, meta, 8)[0].retries == 0


def test_decays_of_one_are_refused():
    with pytest.raises(UserError, match=r"OptimizerConfig\.b1=1 must be"):
        change(tiny_config("x"), optimizer={"b1": 1})
