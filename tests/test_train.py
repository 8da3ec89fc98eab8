"""The programs as a person starts them: train.py from a shell, a second start, and what is refused."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from laep_jax.__main__ import dispatch
from laep_jax.commands import program
from laep_jax.errors import run_main
from laep_jax.training import command
from tests.support.tiny_run import records

ROOT = Path(__file__).parents[1]
SMALL = {
    "ModelConfig.num_layers": 2,
    "ModelConfig.hidden_size": 32,
    "ModelConfig.ffn_size": 16,
    "ModelConfig.num_experts": 8,
    "ModelConfig.router_init": 1.0,
    "DataConfig.sequence_length": 32,
    "DataConfig.batch_size": 16,
    "LaepConfig.alpha": 0.9,
    "LaepConfig.beta": 0.4,
    "LaepConfig.window": 4,
    "LaepConfig.prune_at_step": 5,
    "LaepConfig.prune_delay": 2,
    "TrainConfig.eval_batches": 2,
    "TrainConfig.log_every": 4,
    "TrainConfig.num_steps": 12,
}


def start(
    *arguments: str, program: tuple[str, ...] = ("train.py",), optimized: bool = False
) -> subprocess.CompletedProcess:
    """optimized: compiled with XLA's own settings instead of those of the tests."""
    of_tests = ("PJRT_NPROC", *("XLA_FLAGS", "JAX_DISABLE_MOST_OPTIMIZATIONS") * optimized)
    environment = {name: value for name, value in os.environ.items() if name not in of_tests}
    result = subprocess.run(
        [sys.executable, *program, *arguments],
        cwd=ROOT,
        env={**environment, "COLUMNS": "150"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    lines = result.stderr.splitlines(keepends=True)  # with an older JAX grain regrets a profiler on being imported
    result.stderr = "".join(line for line in lines if not line.startswith("WARNING:absl:Grain multiprocess"))
    return result


def overrides(tmp_path: Path, **changes) -> list[str]:
    cache = {"DataConfig.cache_dir": str(tmp_path / "cache")}
    return [f"--gin.{name}={value}" for name, value in (SMALL | cache | changes).items()]


def losses(workdir: Path) -> list[float]:
    return [record["loss"] for record in records(workdir, "train")]


def test_the_tiny_run_from_a_shell_and_a_second_start_on_fewer_devices(tmp_path):
    workdir = tmp_path / "x"
    arguments = ["--gin_file=configs/tiny.gin", f"--workdir={workdir}"]
    first = start(*arguments, *overrides(tmp_path), optimized=True)
    assert first.returncode == 0, first.stderr
    for text in (
        "Python 3",
        "8 cpu devices",
        "step  4/12",
        "without the experts to prune",
        "parameters",
        "experts per layer",
        "step time",
    ):
        assert text in first.stdout
    assert first.stderr == ""
    assert len(losses(workdir)) == 12
    assert sum(json.loads((workdir / "summary.json").read_text())["experts_after"]) < 16
    assert "LaepConfig.alpha = 0.9" in (workdir / "operative.gin").read_text()

    longer = {"TrainConfig.num_steps": 14, "MeshConfig.cpu_devices": 4, "MeshConfig.expert": 2}
    second = start(*arguments, *overrides(tmp_path, **longer))
    assert second.returncode == 0, second.stderr
    assert "resuming from step 12" in second.stdout
    assert "4 cpu devices: data 1, fsdp 2, expert 2" in second.stdout
    assert len(losses(workdir)) == 14

    report = start("report", str(workdir), program=("-m", "laep_jax"))
    assert report.returncode == 0, report.stderr
    assert {path.name for path in (workdir / "figures").iterdir()} == {
        "tokens_per_expert.png",
        "cumulative_load.png",
        "domains.png",
        "device_loads.png",
        "load_heatmap.png",
        "loss.png",
        "stability.png",
    }


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--gin.LaepConfig.alpah=0.2", "LaepConfig has no field 'alpah'; did you mean alpha?"),
        ("--gin.LaepConfig.alpha=abc", "LaepConfig.alpha='abc' must be one of inf, hybrid"),
        ("--gin.MeshConfig.expert=3", "does not divide 8 devices"),
        ("--gin.ModelConfig.top_k=99", "is below top_k=99"),
        ("--gin.MeshConfig.expert=64", "does not divide 8 devices"),
        ("--gin_file=nowhere.gin", "--gin_file='nowhere.gin' cannot be read: No such file"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, capsys, monkeypatch, argument, message):
    arguments = [argument, f"--workdir={tmp_path / 'x'}", f"--gin.DataConfig.cache_dir={tmp_path / 'cache'}"]
    assert run_main(command.main, arguments) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert message in told.err
    assert told.err.startswith("error: ")
    assert told.err.count("\n") == 1
    assert not (tmp_path / "x").exists()
    if "nowhere" in argument:
        monkeypatch.setenv("JAX_ENABLE_X64", "maybe")
        malformed = start()
        assert (malformed.returncode, malformed.stdout, malformed.stderr.count("\n")) == (2, "", 1)
        assert "JAX_ENABLE_X64" in malformed.stderr
        monkeypatch.delenv("JAX_ENABLE_X64")
        result = start(*arguments)
        assert (result.returncode, result.stdout, result.stderr) == (2, "", told.err)


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_closed_pipe_ends_quietly(unbuffered):
    command = f"{sys.executable} -m laep_jax describe --gin_file=configs/tiny.gin | head -c 1"
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    result = subprocess.run(["bash", "-c", command], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (len(result.stdout), result.stderr) == (1, "")


def test_the_tools_are_listed_and_an_unknown_one_is_refused(capsys):
    listed = start("--help", program=("-m", "laep_jax"))
    assert listed.returncode == 0
    for name in ("train", "launch", "plan", "settings", "describe", "report", "train-tokenizer"):
        assert name in listed.stdout
        with pytest.raises(SystemExit) as helped:
            dispatch([name, "--help"])
        assert helped.value.code == 0
        assert f"usage: {program(name)} " in capsys.readouterr().out
    unknown = start("pln", program=("-m", "laep_jax"))
    assert unknown.returncode == 2
    assert unknown.stderr.startswith("error: there is no command 'pln'; did you mean plan?")
