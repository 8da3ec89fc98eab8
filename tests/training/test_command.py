"""The train command where it is not told everything; whole runs are in tests/test_train.py."""

import pytest

from laep_jax.errors import UserError
from laep_jax.training import command


def test_an_installation_without_configs_asks_for_one(monkeypatch, tmp_path):
    monkeypatch.setattr(command, "DEFAULT_CONFIG", tmp_path / "tiny.gin")
    with pytest.raises(UserError, match="--gin_file is needed"):
        command.main([])


def test_emulated_devices_divide_by_the_processes(monkeypatch):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "127.0.0.1:99")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "3")
    with pytest.raises(UserError, match=r"MeshConfig\.cpu_devices=8 is not divisible by 3 processes"):
        command.main([])


def test_a_bucket_is_no_folder():
    with pytest.raises(UserError, match=r"--workdir='gs://bucket/run' must be a mounted folder"):
        command.main(["--workdir=gs://bucket/run"])
