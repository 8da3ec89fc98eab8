"""A prune that does harm is undone; what stays of it is a softer rule, or none."""

import json
from pathlib import Path

import pytest

from laep_jax.config import Config, LaepConfig
from laep_jax.faults.damage import change_stored
from laep_jax.faults.tiny import change, differences, records, tiny_config
from laep_jax.laep.plan import Plan
from laep_jax.laep.recorded_loads import read_loads
from laep_jax.training import controller, loop, prune
from laep_jax.training.checkpoint import Checkpoints
from laep_jax.training.console import RunConsole
from laep_jax.training.guard import softened
from laep_jax.training.run import Run
from laep_jax.training.runlog import RunLog
from laep_jax.training.start import train

PLAN_STEP, CUT_STEP, GUARD_STEPS, NUM_STEPS = 40, 42, 1, 50
BETA, TOLERANCE = 0.8, 0.005
EXPERT = "params.runs.0.moe.down_EFD", (0, 1, 2, 3)  # one number of it


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Config:
    return tiny_config(
        str(tmp_path_factory.mktemp("tokens")),
        model={"hidden_size": 32, "head_dim": 8, "ffn_size": 32, "top_k": 1},
        aux_loss={"loss_free_bias": 0.1},
        laep={
            "alpha": 4.0,
            "beta": BETA,
            "prune_at_step": PLAN_STEP,
            "cut_delay": CUT_STEP - PLAN_STEP,
            "guard_steps": GUARD_STEPS,
            "guard_tolerance": TOLERANCE,
        },
        optimizer={"learning_rate": 2e-2},
        train={
            "num_steps": NUM_STEPS,
            "eval_every": 100,
            "eval_batches": 2,
            "checkpoint_every": 50,
            "keep_checkpoints": 1,
        },
    )


def harmful_plan(tokens, make_plan=controller.make_plan, **settings):
    """With the rule as it is, not softened, the experts that are used most are pruned."""
    if settings["beta"] == BETA:
        tokens = [layer_NE.max() - layer_NE for layer_NE in tokens]
    return make_plan(tokens, **settings)


@pytest.fixture(scope="module")
def undone(config, tmp_path_factory) -> Path:
    """An uninterrupted run whose first prune is undone."""
    run_dir = tmp_path_factory.mktemp("undone")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(controller, "make_plan", harmful_plan)
        train(config, run_dir)
    return run_dir


def test_a_prune_that_does_harm_is_undone_and_a_softer_one_stands(undone):
    summary = json.loads((undone / "summary.json").read_text())
    [prune] = records(undone, "prune")
    first, second = records(undone, "guard")
    assert (first["stands"], first["step"], first["cut_step"]) == (False, CUT_STEP, CUT_STEP)
    assert first["heldout_loss"] > first["heldout_loss_before"] + TOLERANCE
    assert (second["stands"], second["cut_step"]) == (True, prune["step"])
    assert second["step"] == prune["step"] + GUARD_STEPS
    assert prune["step"] > CUT_STEP
    plan = Plan.from_json((undone / prune["plan"]).read_text())
    assert (plan.alpha, plan.beta) == ((2.0, 2.0), 0.4)
    assert summary["prune_steps"] == [prune["step"]]
    assert summary["undone"] == [CUT_STEP]
    steps = [record["step"] for record in records(undone, "train")]
    assert steps == list(range(1, NUM_STEPS + 1))


def test_after_the_last_retry_the_run_goes_on_as_if_it_had_never_been_pruned(config, tmp_path, monkeypatch):
    train(change(config, laep={"max_prunes": 0}), tmp_path / "never")
    monkeypatch.setattr(controller, "make_plan", harmful_plan)
    train(change(config, laep={"max_retries": 0}), tmp_path / "given up")
    assert len(records(tmp_path / "given up", "guard")) == 1
    evals = records(tmp_path / "given up", "eval")
    assert [(record["step"], record["when"]) for record in evals] == [(CUT_STEP, "before_prune"), (NUM_STEPS, "end")]
    assert evals[-1] == records(tmp_path / "never", "eval")[-1]
    different = differences(tmp_path / "given up", tmp_path / "never")
    assert different == ["eval records", "guard records", "heldout records", "retries", "summary"]
    assert (read_loads(tmp_path / "given up").tokens_NLE >= 0).all()


def test_the_dry_run_softens_a_plan_before_anything_is_cut(config, tmp_path, monkeypatch):
    monkeypatch.setattr(controller, "make_plan", harmful_plan)
    summary = train(change(config, laep={"dry_run_tolerance": TOLERANCE}), tmp_path)
    first, second = records(tmp_path, "dry_run")
    assert (first["step"], first["stands"], second["stands"]) == (PLAN_STEP, False, True)
    assert first["heldout_loss"] > first["heldout_loss_before"] + TOLERANCE
    [prune] = records(tmp_path, "prune")
    assert Plan.from_json((tmp_path / prune["plan"]).read_text()).beta == BETA / 2
    assert (summary["prune_steps"], summary["undone"]) == ([CUT_STEP], [])


class InterruptError(Exception):
    pass


@pytest.mark.parametrize(
    ("owner", "method"),
    [
        (RunLog, "rewind"),
        (Run, "save"),
        (Checkpoints, "remove_after"),
    ],
    ids=["before the log", "before the save", "after the save"],
)
def test_interrupted_on_the_way_back_it_is_undone_all_the_same(undone, config, tmp_path, monkeypatch, owner, method):
    monkeypatch.setattr(controller, "make_plan", harmful_plan)
    original, undo = getattr(owner, method), prune._undo
    undoing: list[bool] = []

    def stop(*args, **kwargs):
        if undoing:
            raise InterruptError
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(prune, "_undo", lambda *args: (undoing.append(True), undo(*args)))
        patch.setattr(owner, method, stop)
        with pytest.raises(InterruptError):
            train(config, tmp_path)
    assert train(config, tmp_path)["undone"] == [CUT_STEP]
    assert not differences(tmp_path, undone)


@pytest.mark.parametrize(
    "damage",
    [lambda path: (path / "manifest.json").unlink(), lambda path: change_stored(path, *EXPERT)],
    ids=["seen in the manifest", "seen in the fingerprints"],
)
def test_a_prune_whose_state_before_is_damaged_stands(config, tmp_path, monkeypatch, capsys, damage):
    def damaged(run, step: int) -> bool:
        path = run.checkpoints.directory / str(CUT_STEP)
        if path.exists():
            damage(path)
        return prune.judge(run, step)

    trained: list[int] = []
    monkeypatch.setattr(controller, "make_plan", harmful_plan)
    monkeypatch.setattr(loop, "judge", damaged)
    monkeypatch.setattr(RunConsole, "train", lambda self, step, record: trained.append(step))
    summary = train(config, tmp_path)
    assert (summary["prune_steps"], summary["undone"]) == ([CUT_STEP], [])
    assert trained == [record["step"] for record in records(tmp_path, "train")] == list(range(1, NUM_STEPS + 1))
    told = capsys.readouterr().out.replace("\n", " ")
    assert f"the prune of step {CUT_STEP} did harm, but what was before it is damaged: it stands" in told


def test_the_rule_softens_by_halves_and_then_prunes_no_more():
    laep = LaepConfig(alpha="hybrid", beta=0.1, max_retries=2)
    assert softened(laep, 0, 6) == laep
    assert softened(laep, 2, 6).alpha == (0.05, 0.1, 0.1, 0.1, 0.1, 0.05)
    assert softened(laep, 2, 6).beta == pytest.approx(0.025)
    assert softened(laep, 3, 6).max_prunes == 0
    unbounded = softened(LaepConfig(alpha="inf", beta=0.4), 1, 2)
    assert (unbounded.alpha, unbounded.beta) == ("inf", 0.2)
