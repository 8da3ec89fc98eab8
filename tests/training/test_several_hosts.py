"""Whole runs in several real processes, as several hosts would do them, against one process with all devices."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from laep_jax.config import Config, LaepConfig
from laep_jax.gin_config import operative_config
from laep_jax.laep.plan import chosen_plan
from laep_jax.laep.recorded_loads import read_loads
from laep_jax.laep.rule import PruneRule
from laep_jax.storage import Disk, open_storage
from laep_jax.training.start import train
from tests.support.emulator import new_folder
from tests.support.tiny_run import differences, records, steps_on_disk, timeless, tiny_config
from tests.training.restoring import restored

ROOT = Path(__file__).parents[2]
PLANNED, BETWEEN, PRUNED, SAVED, NUM_STEPS = 4, 5, 6, 10, 12
STEPS = (PRUNED, NUM_STEPS)  # before the prune and after it
# Losses are float32 means over 512 tokens, and devices of several processes add in another order: a few
# units in the last place (6e-8 each) a step, growing slowly. Another batch differs a hundred times more.
NOISE = 1e-5
PATIENCE = 900  # seconds; other work may share the cores


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("shared")


@pytest.fixture(scope="module")
def config(shared) -> Config:
    """As one process takes it; the others read it from `shared`."""
    config = tiny_config(
        str(shared / "tokens"),
        laep={
            "alpha": (1.2, 0.0),  # cuts the first layer only: one run of two layers becomes two runs
            "prune_at_step": PLANNED,
            "prune_delay": PRUNED - PLANNED,
        },
        train={"num_steps": NUM_STEPS, "checkpoint_every": BETWEEN, "keep_checkpoints": 4, "sample_every": PRUNED},
    )
    (shared / "config.gin").write_text(operative_config(config))
    return config


@pytest.fixture(scope="module")
def environment(emulator) -> dict[str, str]:
    """Of every process that is started."""
    kept = {name: value for name, value in os.environ.items() if name != "PJRT_NPROC"}
    return kept | {"PYTHONPATH": str(ROOT), "COLUMNS": "150"}


@pytest.fixture(scope="module")
def launched(shared, config, environment):
    """Starts a training in several processes; trouble: see `tests.training.host`."""

    def launch(
        workdir: Path | str, processes: int, *more: str, trouble: str = "", restarts: int = 0
    ) -> subprocess.CompletedProcess:
        arguments = [f"--workdir={workdir}", f"--gin_file={shared}/config.gin", *more]
        program = ["-m", "laep_jax", "launch", f"--num-processes={processes}", "--"]
        if trouble:
            Path(workdir).mkdir(exist_ok=True)
            command = [sys.executable, "-m", "tests.training.host", trouble, str(workdir), *arguments]
            program = [
                "-c",
                f"import sys\nfrom laep_jax.launch import launch\nsys.exit(launch({command}, {processes}, {restarts}))",
            ]
            arguments = []
        result = subprocess.run(
            [sys.executable, *program, *arguments],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        )
        lines = result.stderr.splitlines(keepends=True)  # with an older JAX grain regrets a profiler
        result.stderr = "".join(line for line in lines if "Grain multiprocess" not in line)
        return result

    return launch


@pytest.fixture(scope="module")
def one(shared, config) -> Path:
    """The run of one process with eight devices."""
    train(config, shared / "one")
    return shared / "one"


@pytest.fixture(scope="module")
def address(emulator) -> str:
    return f"{new_folder()}/x"


@pytest.fixture(scope="module")
def two(shared, launched, address) -> Path:
    """The run of two processes with four devices each, in a bucket, and copied from there."""
    result = launched(address, 2)
    assert result.returncode == 0, result.stderr
    assert "8 cpu devices in 2 processes: data 1, fsdp 2, expert 4" in result.stdout
    assert result.stdout.count("validation loss at the end") == 1
    assert "Gloo" not in result.stdout
    assert "[process" not in result.stderr
    bucket, copy = open_storage(address), Disk(shared / "two")
    for name, size in bucket.files("").items():
        copy.write(name, bucket.read(name, size))
    return shared / "two"


def losses(workdir: Path) -> dict[int, float]:
    return {record["step"]: record["loss"] for record in records(workdir, "train")}


def assert_same_training(got: Path, want: Path) -> None:
    assert list(losses(got)) == list(losses(want)) == list(range(1, NUM_STEPS + 1))  # every step once
    np.testing.assert_allclose(list(losses(got).values()), list(losses(want).values()), rtol=NOISE)
    validation = [[(r["step"], r["when"]) for r in records(workdir, "eval")] for workdir in (got, want)]
    assert validation[0] == validation[1]
    validation = [[r["validation_loss"] for r in records(workdir, "eval")] for workdir in (got, want)]
    np.testing.assert_allclose(*validation, rtol=NOISE)
    domains = [records(workdir, "eval")[-1]["validation_loss_by_domain"] for workdir in (got, want)]
    assert list(domains[0]) == list(domains[1])
    np.testing.assert_allclose(*(list(side.values()) for side in domains), rtol=NOISE)
    assert records(got, "validation") == records(want, "validation")
    assert [record["step"] for record in records(got, "sample")] == [PRUNED, NUM_STEPS]
    assert records(got, "sample") == records(want, "sample")
    [cut], [other] = records(got, "prune"), records(want, "prune")
    for name in ("step", "experts_before", "experts_after", "lineage", "parameters_after"):
        assert cut[name] == other[name], name
    moved = np.abs(read_loads(got).tokens_NLE - read_loads(want).tokens_NLE).sum(axis=(1, 2))
    assert moved.max() <= 4, moved  # a token next to a tie may choose another expert


def rewind(run: Path, step: int, to: Path) -> Path:
    """A copy of a run as an interruption would have left it behind the checkpoint of `step`."""
    shutil.copytree(run, to)
    for checkpoint in (to / "checkpoints").iterdir():
        if int(checkpoint.name) > step:
            shutil.rmtree(checkpoint)
    (to / "summary.json").unlink()
    return to


def test_two_processes_train_as_one_does(one, two):
    assert_same_training(two, one)
    [cut] = records(two, "prune")
    assert cut["experts_before"] == [8, 8]
    assert cut["experts_after"] == [4, 8]
    values = np.array(list(losses(one).values()))
    assert np.abs(np.diff(values)).min() > 10 * NOISE * values.max()  # so a batch out of its place would show


def test_two_processes_leave_what_one_leaves(one, two):
    def files(workdir: Path) -> set[str]:
        paths = [path.relative_to(workdir) for path in workdir.rglob("*") if "checkpoints" not in path.parts]
        return {str(path) for path in paths if "tfevents" not in path.name}

    assert files(two) == files(one)
    assert len(list((two / "tensorboard").iterdir())) == 1
    assert steps_on_disk(two) == [BETWEEN, PRUNED, SAVED, NUM_STEPS]


@pytest.mark.parametrize("step", [BETWEEN, PRUNED, SAVED], ids=["before the prune", "at the prune", "after the prune"])
def test_one_process_goes_on_from_a_checkpoint_of_two(two, tmp_path, config, step):
    workdir = rewind(two, step, tmp_path / "x")
    train(config, workdir)
    assert_same_training(workdir, two)


def test_two_processes_go_on_from_a_checkpoint_of_one_and_what_one_finds_damaged_both_put_aside(
    one, tmp_path, launched
):
    workdir = rewind(one, SAVED, tmp_path / "x")
    result = launched(workdir, 2, trouble="bad_sector")
    assert result.returncode == 0, result.stderr
    line = (
        rf"process 1: checkpoint {workdir}/checkpoints/10/\w+/state is damaged: DATA_LOSS: a bad sector; step 10 is put"
    )
    assert re.search(line, result.stdout)
    assert "resuming from step 6, with a plan to apply" in result.stdout
    assert_same_training(workdir, one)


def test_two_processes_resume_in_a_bucket(two, address, launched):
    bucket = open_storage(address)
    for name in (f"checkpoints/{SAVED}", f"checkpoints/{NUM_STEPS}", "summary.json"):  # as after a kill
        bucket.remove(name)
    bucket.write(f"checkpoints/{SAVED}/0123abcd/state/d/x", b"begun")
    result = launched(address, 2)
    assert result.returncode == 0, result.stderr
    assert "resuming from step 6, with a plan to apply" in result.stdout
    assert not differences(address, two)
    assert "0123abcd" not in bucket.entries(f"checkpoints/{SAVED}")


@pytest.mark.slow
def test_four_processes_go_on_from_a_checkpoint_of_two(two, tmp_path, launched):
    workdir = rewind(two, PRUNED, tmp_path / "x")
    result = launched(workdir, 4)
    assert result.returncode == 0, result.stderr
    assert "resuming from step 6, with a plan to apply" in result.stdout
    assert_same_training(workdir, two)


@pytest.mark.slow
def test_four_processes_train_as_one_does(one, tmp_path, launched):
    result = launched(tmp_path / "x", 4)
    assert result.returncode == 0, result.stderr
    assert_same_training(tmp_path / "x", one)


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_the_state_is_the_same_bytes_in_one_process_and_in_several(one, two, tmp_path, environment, processes):
    """What one process and what two saved, restored by several, saved by these and restored by one again."""
    tasks = [(run.name, str(run / "checkpoints"), str(tmp_path / run.name)) for run in (one, two)]
    command = [sys.executable, "-m", "tests.training.restoring", json.dumps(STEPS), json.dumps(tasks)]
    start = f"import sys\nfrom laep_jax.launch import launch\nsys.exit(launch({command}, {processes}))"
    result = subprocess.run([sys.executable, "-c", start], cwd=ROOT, env=environment, timeout=PATIENCE, check=False)
    assert result.returncode == 0
    for name, source, target in tasks:
        want = restored(STEPS, source, str(tmp_path / f"{name} again"))
        assert len(want) > 40
        assert json.loads(Path(target, "found.json").read_text()) == want
        assert restored(STEPS, target, str(tmp_path / f"{name} at last")) == want


def codes(workdir: Path) -> list[str]:
    return [path.read_text() for path in sorted(workdir.glob("*.code"))]


def assert_all_gone(workdir: Path) -> None:
    pids = [int(path.read_text()) for path in workdir.glob("*.pid")]
    assert len(pids) == 2
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_processes_with_different_plans_stop(tmp_path, launched):
    rule = PruneRule.from_settings(LaepConfig(placement="greedy"), 2, top_k=2, expert_parallel=4)
    plans = [chosen_plan([np.arange(8.0)] * 2, pruned, rule) for pruned in ([[0, 1, 2, 3], []], [[0, 1, 2, 4], []])]
    files = [tmp_path / "0.json", tmp_path / "1.json"]
    for file, plan in zip(files, plans, strict=True):
        file.write_text(plan.to_json())
    result = launched(tmp_path / "x", 2, trouble=",".join(["own_setting", "LaepConfig.plan", *map(str, files)]))
    assert result.returncode == 2
    [line] = [line for line in result.stderr.splitlines() if "error" in line]
    hashes = "; ".join(f"{plan.sha256()} on {index}" for index, plan in enumerate(plans))
    assert line == f"error: the plan after step {PLANNED} differs between the processes: {hashes}"
    assert codes(tmp_path / "x") == ["2", "2"]
    assert [path.name for path in (tmp_path / "x" / "checkpoints").iterdir()] == []
    assert_all_gone(tmp_path / "x")


def test_a_process_that_fails_takes_the_others_along(tmp_path, launched):
    result = launched(tmp_path / "x", 2, trouble="full_disk")
    assert time.time() - float((tmp_path / "x" / "failed").read_text()) < 30  # 5 s of grace on a busy machine
    assert result.returncode != 0
    assert "[process 1] OSError: no space left" in result.stderr
    assert_all_gone(tmp_path / "x")


def assert_the_same_bits(got: Path, want: Path) -> None:
    for kind in ("train", "eval", "prune"):
        told = [list(map(timeless, records(workdir, kind))) for workdir in (got, want)]
        assert told[0] == told[1]
    np.testing.assert_array_equal(read_loads(got).tokens_NLE, read_loads(want).tokens_NLE)


@pytest.mark.parametrize(
    ("heartbeat", "timeout", "code", "sent"),
    [(60, 6.0, 1, "SIGTERM"), pytest.param(30, None, 134, "SIGINT", marks=pytest.mark.slow)],
    ids=["step timeout, SIGTERM", "heartbeat, SIGINT"],
)
def test_a_frozen_process_and_a_signal_to_one_leave_nothing_behind(
    two, tmp_path, launched, heartbeat, timeout, code, sent
):
    trouble = f"freeze,{heartbeat},{PRUNED + 1},{PRUNED + 1},{sent}"
    limit = f"--gin.TrainConfig.step_timeout={timeout}"
    stopped = launched(tmp_path / "x", 2, limit, trouble=trouble, restarts=1)
    assert stopped.returncode == 75, stopped.stderr
    assert f"process 0 ended with code {code}: restart 1 of 1" in stopped.stderr
    assert ("Timeout (" in stopped.stderr) == (timeout is not None)
    assert f"resuming from step {PRUNED}" in stopped.stdout
    assert codes(tmp_path / "x") == ["75", "75"]
    [step] = re.findall(r"stopped and saved after step (\d+); ", stopped.stderr)
    assert PRUNED + 1 < int(step) < NUM_STEPS
    assert int(step) in steps_on_disk(tmp_path / "x")
    result = launched(tmp_path / "x", 2)
    assert result.returncode == 0, result.stderr
    assert f"resuming from step {step}" in result.stdout
    assert_the_same_bits(tmp_path / "x", two)


@pytest.mark.parametrize(
    ("trouble", "message"),
    [
        (
            "no_corpus",
            "process 1: DataConfig.path='nowhere' is neither a file, a folder with files nor a glob of files",
        ),
        ("own_setting,TrainConfig.seed,0,1", "TrainConfig.seed differs between the processes: 0 on 0; 1 on 1"),
        ("own_folder", "process 1: x1/checkpoints must be on a file system that all processes share"),
    ],
    ids=["corpus", "settings", "run directory"],
)
def test_what_fits_one_process_only_all_refuse(tmp_path, launched, trouble, message):
    result = launched(tmp_path / "x", 2, trouble=trouble)
    assert result.returncode == 2
    assert result.stderr.replace(f"{tmp_path}/", "") == f"error: {message}\n"
    assert codes(tmp_path / "x") == ["2", "2"]
    assert_all_gone(tmp_path / "x")
    assert not list(tmp_path.rglob("metrics.jsonl"))


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--gin.MeshConfig.cpu_devices=7", "MeshConfig.cpu_devices=7 is not divisible by 2 processes"),
        ("--gin.MeshConfig.expert=3", "does not divide 8 devices"),
    ],
    ids=["before connecting", "after connecting"],
)
def test_bad_settings_are_told_once(tmp_path, launched, argument, message):
    result = launched(tmp_path / "x", 2, argument)
    assert result.returncode == 2
    assert result.stdout == ""
    assert message in result.stderr
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "x").exists()
