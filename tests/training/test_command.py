"""The train command where it is not told everything; whole runs are in tests/test_train.py."""

import jax
import pytest

import laep_jax
from laep_jax.config import Config
from laep_jax.errors import UserError
from laep_jax.gin_config import load_config, shipped
from laep_jax.switches import require_switches, set_switches
from laep_jax.training import command
from laep_jax.training.start import train


def test_emulated_devices_divide_by_the_processes(monkeypatch):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "127.0.0.1:99")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "3")
    with pytest.raises(UserError, match=r"MeshConfig\.cpu_devices=8 is not divisible by 3 processes"):
        command.main([])


@pytest.mark.parametrize(
    ("workdir", "rule"),
    [
        ("gs://bucket", "must be a path or gs://BUCKET/FOLDER"),
        ("gs://bucket//run", "must be a path or gs://BUCKET/FOLDER"),
        ("s3://bucket/run", "must be a path or gs://BUCKET/FOLDER"),
        ("file:///x", "must be a path or gs://BUCKET/FOLDER"),
        ("", "must not be empty"),
        ("runs/x\n", "must not begin or end with white space"),
        ("~nobody_of_this_name/x", "must not begin with ~"),
        ("$NOT_SET/x", "must not hold variables"),
        ("runs/\udcff", "must be valid UTF-8"),
    ],
)
def test_a_folder_of_a_wrong_name_is_not_made(workdir, rule):
    with pytest.raises(UserError, match=rf"^--workdir=.* {rule}"):
        command.main([f"--workdir={workdir}"])


def test_home_and_variables_are_replaced_in_paths_of_the_command_line(monkeypatch, tmp_path):
    """A shell leaves both as they are behind `=`, or in quotes."""
    folders = []
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(command, "train", lambda config, workdir, **_: folders.extend([workdir, config.data.cache_dir]))
    monkeypatch.setattr(command, "connect", lambda: None)
    monkeypatch.setattr(command, "make_cpu_devices", lambda number, processes: None)
    (tmp_path / "a.gin").touch()
    command.main(["--workdir=~/x", "--gin_file=~/a.gin", "--gin.DataConfig.cache_dir=$HOME/c"])
    assert folders == [f"{tmp_path}/x", f"{tmp_path}/c"]


def test_what_train_can_say_without_training(capsys, tmp_path):
    assert command.main(["--config=paper/10b", "--print-config", "--gin.TrainConfig.seed=7"]) == 0
    (tmp_path / "a.gin").write_text(capsys.readouterr().out)
    assert load_config([str(tmp_path / "a.gin")]) == load_config([str(shipped("paper/10b"))], ["TrainConfig.seed = 7"])
    with pytest.raises(SystemExit):
        command.main(["--version"])
    assert capsys.readouterr().out == f"laep_jax {laep_jax.__version__}\n"


def test_a_range_of_steps_to_profile_is_checked_before_the_run(tmp_path):
    with pytest.raises(UserError, match=r"^--profile-steps='279:281' ends after TrainConfig\.num_steps=280$"):
        command.main([f"--workdir={tmp_path}/x", "--profile-steps=279:281"])
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(("name", "value"), [("jax_enable_x64", True), ("jax_numpy_dtype_promotion", "strict")])
def test_a_switch_that_changes_types_is_refused_by_train_and_set_by_the_command(name, value, tmp_path):
    before = getattr(jax.config, name)
    try:
        jax.config.update(name, value)
        with pytest.raises(UserError, match=f"{name.upper()}={value!r} must be "):
            train(Config(), tmp_path)
        set_switches()
        require_switches()
    finally:
        jax.config.update(name, before)
