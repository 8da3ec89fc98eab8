"""A prune that does harm is undone; what stays of it is a softer rule, or none."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from laep_jax.config import (
    AuxLossConfig,
    Config,
    DataConfig,
    LaepConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
)
from laep_jax.faults.damage import change_stored
from laep_jax.laep.plan import Plan
from laep_jax.sharding import make_mesh
from laep_jax.training import controller, loop, prune
from laep_jax.training.checkpoint import Checkpoints
from laep_jax.training.console import RunConsole
from laep_jax.training.guard import softened
from laep_jax.training.run import Run
from laep_jax.training.runlog import RunLog
from laep_jax.training.start import train
from laep_jax.training.state import abstract_state

PLAN_STEP, CUT_STEP, GUARD_STEPS, NUM_STEPS = 40, 42, 1, 50
BETA, TOLERANCE = 0.8, 0.005
EXPERT = "params.runs.0.moe.down_EFD", (0, 1, 2, 3)  # one number of it


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Config:
    return Config(
        model=ModelConfig(
            num_layers=2, hidden_size=32, num_heads=4, head_dim=8, ffn_size=32, num_experts=8, top_k=1, router_init=1.0
        ),
        mesh=MeshConfig(fsdp=2, expert=4),
        aux_loss=AuxLossConfig(loss_free_bias=0.1),
        data=DataConfig(
            source="synthetic", sequence_length=32, batch_size=16, cache_dir=str(tmp_path_factory.mktemp("tokens"))
        ),
        laep=LaepConfig(
            alpha=4.0,
            beta=BETA,
            window=4,
            prune_at_step=PLAN_STEP,
            cut_delay=CUT_STEP - PLAN_STEP,
            guard_steps=GUARD_STEPS,
            guard_tolerance=TOLERANCE,
        ),
        optimizer=OptimizerConfig(warmup_steps=2, learning_rate=2e-2),
        train=TrainConfig(num_steps=NUM_STEPS, eval_every=100, eval_batches=2, checkpoint_every=50, keep_checkpoints=1),
    )


def with_laep(config: Config, **fields) -> Config:
    return dataclasses.replace(config, laep=dataclasses.replace(config.laep, **fields))


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


def records(run_dir: Path, kind: str) -> list[dict]:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


def timeless(record: dict) -> dict:
    return {name: value for name, value in record.items() if "second" not in name and "bytes" not in name}


def final_state(run_dir: Path) -> dict[str, bytes]:
    """Every array of the last checkpoint, and the layout."""
    with Checkpoints(run_dir / "checkpoints", keep=1) as checkpoints:
        meta = checkpoints.read_meta(NUM_STEPS)
        config = Config.from_dict(meta["config"]).with_num_experts(tuple(meta["num_experts"]))
        state = checkpoints.restore(NUM_STEPS, abstract_state(config, make_mesh(config.mesh)))
        arrays = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]}
        arrays |= checkpoints.read_history(NUM_STEPS) | {"lineage": np.array([str(ids) for ids in meta["lineage"]])}
    return {name: np.asarray(array).tobytes() for name, array in arrays.items()}


def assert_same_run(got: Path, want: Path) -> None:
    for kind in ("train", "eval", "stability", "prune", "guard"):
        assert list(map(timeless, records(got, kind))) == list(map(timeless, records(want, kind))), kind
    with np.load(got / "loads.npz") as a, np.load(want / "loads.npz") as b:
        for name in b.files:
            np.testing.assert_array_equal(a[name], b[name], err_msg=name)
    assert final_state(got) == final_state(want)


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
    train(with_laep(config, max_prunes=0), tmp_path / "never")
    monkeypatch.setattr(controller, "make_plan", harmful_plan)
    train(with_laep(config, max_retries=0), tmp_path / "given up")
    assert len(records(tmp_path / "given up", "guard")) == 1
    evals = records(tmp_path / "given up", "eval")
    assert [(record["step"], record["when"]) for record in evals] == [(CUT_STEP, "before_prune"), (NUM_STEPS, "end")]
    assert evals[-1] == records(tmp_path / "never", "eval")[-1]
    for kind in ("train", "stability"):
        same = (list(map(timeless, records(tmp_path / name, kind))) for name in ("given up", "never"))
        assert next(same) == next(same)
    assert final_state(tmp_path / "given up") == final_state(tmp_path / "never")
    with np.load(tmp_path / "given up" / "loads.npz") as loads:
        assert (loads["pruned_at"] == -1).all()


def test_the_dry_run_softens_a_plan_before_anything_is_cut(config, tmp_path, monkeypatch):
    monkeypatch.setattr(controller, "make_plan", harmful_plan)
    summary = train(with_laep(config, dry_run_tolerance=TOLERANCE), tmp_path)
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
    assert_same_run(tmp_path, undone)


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
