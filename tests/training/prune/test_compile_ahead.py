"""The prune's steps compiled beside the training: really beside it, once, and what happens when it goes wrong."""

import contextlib
import logging
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest

from laep_jax.checkpoint.checkpointer import Checkpoints
from laep_jax.config import Config
from laep_jax.gin_config import operative_config
from laep_jax.training.prune import compile_ahead
from laep_jax.training.start import train
from tests.support.tiny_run import change, records, tiny_config
from tests.support.watching import before

ROOT = Path(__file__).parents[3]
PLAN_STEP, PRUNE_STEP, NUM_STEPS = 4, 7, 9


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Config:
    return tiny_config(
        str(tmp_path_factory.mktemp("tokens")),
        laep={"prune_at_step": PLAN_STEP, "prune_delay": PRUNE_STEP - PLAN_STEP},
        train={"num_steps": NUM_STEPS, "eval_every": 3, "checkpoint_every": 50},
    )


def losses(run_dir: Path) -> list[float]:
    return [record["loss"] for record in records(run_dir, "train")]


@pytest.fixture
def compilations(caplog):
    """A function: (program, thread) of every compilation of a train or eval step so far."""
    jax.config.update("jax_log_compiles", True)
    caplog.set_level(logging.WARNING)

    def found() -> list[tuple[str, str]]:
        finished = [record for record in caplog.records if "Finished XLA compilation of" in record.getMessage()]
        steps = [
            (name, record.threadName)
            for record in finished
            for name in ("train_step", "eval_step")
            if f"({name})" in record.getMessage()
        ]
        return sorted(steps)

    yield found
    jax.config.update("jax_log_compiles", False)


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("run")
    train(config, run_dir)
    return run_dir


def test_each_step_is_compiled_once_the_smaller_models_in_the_thread(config, tmp_path, compilations):
    train(config, tmp_path)
    main = threading.main_thread().name
    assert records(tmp_path, "prune")
    assert compilations() == [
        (step, thread) for step in ("eval_step", "train_step") for thread in (main, compile_ahead.THREAD)
    ]
    seconds = {record["step"]: record["step_seconds"] for record in records(tmp_path, "train")}
    assert [step for step, value in seconds.items() if value is None] == [1]  # the only one with a compilation in it


def test_training_continues_while_the_compilation_takes_its_time(whole, config, tmp_path):
    waited_for = threading.Event()

    @contextlib.contextmanager
    def watch(stage: str, step: int) -> Iterator[None]:
        if stage == "restore":
            waited_for.set()
        if stage == "compile":
            assert waited_for.wait(timeout=120), "the run waits for the compilation before the step of the prune"
            time.sleep(2)
        yield

    train(config, tmp_path, watch=watch)
    assert losses(tmp_path) == losses(whole)
    [prune] = records(tmp_path, "prune")
    assert (prune["plan_step"], prune["step"]) == (PLAN_STEP, PRUNE_STEP)
    assert prune["seconds"]["compile"] > 0.1  # the remaining compile time


def test_an_error_in_the_thread_ends_the_run_at_the_prune_and_nothing_is_lost(whole, config, tmp_path):
    def fail() -> None:
        raise RuntimeError("RESOURCE_EXHAUSTED: too large")

    with pytest.raises(RuntimeError, match="too large"):
        train(config, tmp_path, watch=before("compile", PRUNE_STEP, fail))
    assert len(losses(tmp_path)) == PRUNE_STEP
    train(config, tmp_path)
    assert losses(tmp_path) == losses(whole)


def test_without_delay_the_prune_follows_its_plan_at_once(config, tmp_path):
    train(change(config, laep={"prune_delay": 0}), tmp_path)
    [prune] = records(tmp_path, "prune")
    assert (prune["plan_step"], prune["step"]) == (PLAN_STEP, PLAN_STEP)
    with Checkpoints(tmp_path / "checkpoints", keep=9) as checkpoints:
        assert checkpoints.read_meta(PLAN_STEP)["pending"]["due"] == PLAN_STEP


@pytest.mark.parametrize("num_steps", [6, PRUNE_STEP])
def test_a_plan_whose_step_the_run_does_not_reach_is_dropped_before_anything_is_compiled(
    config, tmp_path, capsys, num_steps
):
    compiled: list[None] = []
    watch = before("compile", PRUNE_STEP, lambda: compiled.append(None))
    summary = train(change(config, train={"num_steps": num_steps}), tmp_path, watch=watch)
    assert not compiled
    assert (
        f"the run ends before step {PRUNE_STEP}, where the plan of step {PLAN_STEP} was due"
        in capsys.readouterr().out.replace("\n", " ")
    )
    assert summary["prune_steps"] == []
    assert not records(tmp_path, "prune")


def test_a_second_prune_measures_loads_with_the_step_compiled_ahead(config, tmp_path):
    laep = {
        "max_prunes": 2,
        "prune_delay": 1,
        "max_moved": 1.0,
        "max_regret": 1.0,
        "max_excess": 1e9,
        "stable_windows": 1,
        "guard_tolerance": None,
        "min_step": 1,
        "window": 3,
        "prune_at_step": 3,
        "rounding": "prune",
    }
    train(change(config, model={"num_experts": 16}, laep=laep, train={"num_steps": 16}), tmp_path)
    assert len(records(tmp_path, "prune")) == 2


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [("interrupt", 130, "interrupted"), ("disk", 1, "OSError: no space left")],
)
def test_leaving_does_not_wait_for_the_compilation(config, tmp_path, error, code, message):
    (tmp_path / "config.gin").write_text(operative_config(config))
    arguments = [error, f"--gin_file={tmp_path}/config.gin", f"--workdir={tmp_path}/x"]
    command = [sys.executable, "-m", "tests.training.prune.leaving", *arguments]
    start = time.time()
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == code, result.stderr
    assert message in result.stderr
    assert time.time() - start < 200  # the compilation would take 600 s
    assert len(losses(tmp_path / "x")) == 5
