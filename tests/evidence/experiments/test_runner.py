"""Experiments from end to end, tiny: rows run once, branches are exact, what is interrupted goes on."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from experiments import runner
from experiments.__main__ import main
from experiments.results import append, find, read_results
from experiments.rows import load_row
from experiments.runner import RunFailedError, Runner, branch_step
from laep_jax.errors import UserError
from laep_jax.files import read_records
from laep_jax.gin_config import load_config
from laep_jax.laep.plan import Plan
from laep_jax.training.start import train

SETTINGS = {
    "ModelConfig.num_layers": 2,
    "ModelConfig.vocab_size": 384,
    "ModelConfig.hidden_size": 16,
    "ModelConfig.num_heads": 4,
    "ModelConfig.head_dim": 4,
    "ModelConfig.ffn_size": 8,
    "ModelConfig.num_experts": 32,
    "ModelConfig.router_init": 1.0,
    "DataConfig.source": "synthetic",
    "DataConfig.path": "",  # of the rows that have one
    "DataConfig.tokenizer": "bytes",
    "DataConfig.sequence_length": 32,
    "DataConfig.batch_size": 16,
    "LaepConfig.window": 5,
    "LaepConfig.prune_at_step": 12,
    "LaepConfig.alpha": 0.9,
    "LaepConfig.beta": 0.3,
    "TrainConfig.num_steps": 50,
    "TrainConfig.eval_batches": 2,
    "TrainConfig.checkpoint_every": 10,
    "TrainConfig.keep_checkpoints": 99,
}


@pytest.fixture(scope="session")
def bindings(tmp_path_factory) -> list[str]:
    settings = SETTINGS | {"DataConfig.cache_dir": str(tmp_path_factory.mktemp("tokens"))}
    return [f"{name} = {value!r}" for name, value in settings.items()]


def in_process(gin_files, bindings, run_dir: Path, compiled: Path) -> int:
    """As `runner._train`, without a process of its own."""
    train(load_config([str(file) for file in gin_files], bindings), run_dir)
    return 0


@pytest.fixture(scope="module")
def baselines(bindings, tmp_path_factory) -> Path:
    """All rows of `baselines`, of one seed."""
    out = tmp_path_factory.mktemp("results")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "_train", in_process)
        assert (
            main(["baselines", "--seeds=1", f"--out={out}", *(f"--gin.{b}".replace(" = ", "=") for b in bindings)]) == 0
        )
    return out


def test_each_row_is_run_once_and_its_result_kept(baselines, bindings, capsys, monkeypatch):
    results = {result["row"]: result for result in read_results(baselines)}
    assert list(results) == ["base", "other_order", "alpha_hybrid", "random", "frequency", "from_start"]
    laep, base = results["alpha_hybrid"], results["base"]
    assert laep["cuts"] == [12]
    kept = {path.parent.name.split("-")[0] for path in baselines.glob("runs/*/checkpoints")}
    assert kept == {"base"}, "checkpoints of runs that nothing branches from"
    assert laep["parameters"] < base["parameters"]
    assert list(map(len, laep["order"])) == laep["num_experts"]
    assert {int(step) for step in base["loads"]} == {50}
    assert all(sum(loads) == pytest.approx(16 * 32 * 2, rel=0.1) for loads in base["loads"]["50"])
    monkeypatch.setattr(runner, "_train", lambda *_: pytest.fail("a finished row is run again"))
    assert (
        main(["baselines", "--seeds=1", f"--out={baselines}", *(f"--gin.{b}".replace(" = ", "=") for b in bindings)])
        == 0
    )
    told = capsys.readouterr().out
    assert "| as many of each layer, at random |" in told
    assert (baselines / "baselines.md").read_text() in told
    assert (baselines / "baselines.png").stat().st_size > 10_000


def test_what_is_derived_is_as_large_as_laeps_model(baselines):
    results = {result["row"]: result for result in read_results(baselines)}
    sizes = {name: result["num_experts"] for name, result in results.items()}
    assert sum(sizes["alpha_hybrid"]) < sum(sizes["base"])
    assert sizes["random"] == sizes["from_start"] == sizes["alpha_hybrid"]
    assert len(set(sizes["frequency"])) == 1
    assert abs(sum(sizes["frequency"]) - sum(sizes["alpha_hybrid"])) <= 8
    orders = [
        tuple(map(tuple, map(sorted, results[name]["order"]))) for name in ("alpha_hybrid", "random", "frequency")
    ]
    assert len(set(orders)) == 3
    before_cut = np.array(results["alpha_hybrid"]["loads"]["12"])
    for kept, loads_E in zip(results["frequency"]["order"], before_cut, strict=True):
        pruned = np.setdiff1d(np.arange(32), kept)
        assert loads_E[pruned].sum() < loads_E.sum() * len(pruned) / 32


def test_a_branch_is_the_run_itself(baselines, bindings, tmp_path):
    """Trained from the first step on, a row ends exactly as it does from its base's checkpoint."""
    row = load_row("alpha_hybrid", 1, bindings=bindings)
    train(row.config, tmp_path)
    [branched] = [r for r in read_results(baselines) if r["row"] == "alpha_hybrid"]
    assert branch_step(row) == 10
    [end] = [r for r in read_records(tmp_path / "metrics.jsonl") if r["kind"] == "eval" and r["when"] == "end"]
    assert end["validation_loss"] == branched["validation_loss"]
    [plan] = (tmp_path / "plans").glob("*.json")
    assert Plan.from_json(plan.read_text()).kept == tuple(map(tuple, branched["order"]))


def test_other_settings_are_another_row(baselines, bindings):
    row = load_row("alpha_hybrid", 1, bindings=[*bindings, "OptimizerConfig.learning_rate = 1e-4"])
    assert [row.name for row in Runner(baselines).missing([row])] == ["base", "alpha_hybrid"]


def test_a_base_whose_run_is_elsewhere_is_run_again(baselines, bindings, tmp_path):
    (tmp_path / "results.jsonl").write_bytes((baselines / "results.jsonl").read_bytes())
    kept, new = (load_row(name, 1, bindings=bindings) for name in ("alpha_hybrid", "alpha_0.2"))
    assert Runner(tmp_path).missing([kept]) == []
    assert [row.name for row in Runner(tmp_path).missing([new])] == ["base", "alpha_0.2"]
    assert [row.name for row in Runner(baselines).missing([new])] == ["alpha_0.2"]


@pytest.mark.parametrize(("code", "times"), [(9, 1 + runner.RESTARTS), (2, 1), (75, 1)])
def test_a_row_that_crashes_is_started_again_a_few_times(bindings, tmp_path, monkeypatch, code, times):
    runs = []
    monkeypatch.setattr(runner, "_train", lambda *_: runs.append(1) or code)
    with pytest.raises(RunFailedError, match=f"row base, seed 0: its run or its scoring ended with code {code}"):
        Runner(tmp_path).run([load_row("base", 0, bindings=bindings)])
    assert len(runs) == times
    assert read_results(tmp_path) == []


def test_a_row_is_scored_before_its_result_is_kept_and_not_trained_again_for_that(bindings, tmp_path, monkeypatch):
    trained, scores = [], {"laep_next_line": 0.5}

    def counting(*arguments) -> int:
        trained.append(arguments[2].name.split("-")[0])
        return in_process(*arguments)

    def killed(run_dir: Path) -> dict:
        raise subprocess.CalledProcessError(137, "lm_eval")

    def missing() -> None:
        raise UserError("lm_eval is not installed")

    rows = [load_row("tasks_alpha_0.4", 0, bindings=bindings)]
    monkeypatch.setattr(runner, "_train", counting)
    monkeypatch.setattr(runner, "require_lm_eval", missing)
    with pytest.raises(UserError):
        Runner(tmp_path).run(rows)
    assert not trained
    monkeypatch.setattr(runner, "require_lm_eval", lambda: None)
    monkeypatch.setattr(
        runner, "score", lambda run_dir: scores if run_dir.name.startswith("tasks-") else killed(run_dir)
    )
    with pytest.raises(
        RunFailedError, match=r"row tasks_alpha_0\.4, seed 0: its run or its scoring ended with code 137"
    ):
        Runner(tmp_path).run(rows)
    assert [result["row"] for result in read_results(tmp_path)] == ["tasks"]
    [metrics] = tmp_path.glob("runs/tasks_alpha*/metrics.jsonl")
    before = metrics.read_bytes()
    monkeypatch.setattr(runner, "score", lambda run_dir: scores)
    Runner(tmp_path).run(rows)
    assert metrics.read_bytes() == before
    assert trained == ["tasks", "tasks_alpha_0.4", "tasks_alpha_0.4"]  # the last only showed its table
    assert [(result["row"], result["scores"]) for result in read_results(tmp_path)] == [
        ("tasks", scores),
        ("tasks_alpha_0.4", scores),
    ]


def test_an_interrupted_row_goes_on(bindings, tmp_path):
    settings = [f"--gin.{binding}".replace(" = ", "=") for binding in bindings]
    command = [sys.executable, "-m", "experiments", "baselines", "--only=base", "--seeds=0"]
    command += [f"--out={tmp_path}", *settings, "--gin.TrainConfig.num_steps=150"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("runs/base-0-*/checkpoints/10")):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    told = process.communicate()[0]
    assert process.returncode == 75, told
    assert not (tmp_path / "results.jsonl").exists()
    ended = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert ended.returncode == 0, ended.stdout
    assert "resuming from step" in ended.stdout
    [result] = read_results(tmp_path)
    assert result["tokens"] == pytest.approx(150 * 16 * 32, rel=0.05)


def test_results_that_do_not_read(tmp_path):
    append(tmp_path, {"row": "base", "seed": 0, "digest": "x"})
    with (tmp_path / "results.jsonl").open("a") as file:
        file.write('{"row": "ba\n')
    with pytest.raises(UserError, match=r"results\.jsonl line 2 is not JSON"):
        read_results(tmp_path)


def test_a_stale_result_does_not_count(bindings, tmp_path):
    row = load_row("base", 0, bindings=bindings)
    append(tmp_path, {"row": "base", "seed": 0, "digest": "00000000"})
    assert find(read_results(tmp_path), row) is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["table9"], "there is no experiment 'table9'; there are phases, table1"),
        (["table1", "--only=x"], "--only='x' is no row of table1; there are base"),
        (["table1", "--gin_file=x.gin"], "--gin_file: the rows have files of their own"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(UserError, match=message):
        main(arguments)
