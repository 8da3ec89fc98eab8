import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from laep_jax.errors import UserError
from laep_jax.training.exclusive import exclusive, require_room

HOLDER = """
import pathlib, sys, time
from laep_jax.training.exclusive import exclusive
with exclusive(pathlib.Path(sys.argv[1])):
    print("inside", flush=True)
    time.sleep(600)
"""


def test_a_second_run_is_told_who_is_inside_until_that_one_is_gone(tmp_path):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "run")]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == "inside\n"
            message = rf"run is in use by process {holder.pid} on {socket.gethostname()}$"
            for _ in range(2):
                with pytest.raises(UserError, match=message), exclusive(tmp_path / "run"):
                    pass
        finally:
            holder.kill()
    for _ in range(2):
        with exclusive(tmp_path / "run"):
            assert (tmp_path / "run" / "run.lock").read_text().startswith(f"process {os.getpid()} on ")


def test_room_for_two_states_is_asked_for(tmp_path, monkeypatch):
    free = shutil.disk_usage(tmp_path).free
    require_room(tmp_path, free // 3)
    with pytest.raises(UserError, match=r"GB free, and 2 checkpoints of 12,000\.00 GB must have room"):
        require_room(tmp_path, 12 * 10**12)
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_cannot_be_written_is_refused(tmp_path, monkeypatch):
    def refuse(descriptor):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(os, "fsync", refuse)  # root may write anywhere
    with pytest.raises(UserError, match=r"cannot be written: Read-only file system$"):
        require_room(tmp_path, 1)
