import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from laep_jax.checkpoint.lock import exclusive, require_room, require_savable, require_writable
from laep_jax.checkpoint.steps import SAVING, StepDirectory, require_checkpoints
from laep_jax.errors import UserError

HOLDER = """
import pathlib, sys, time
from laep_jax.checkpoint.lock import exclusive
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
        require_writable(tmp_path)


@pytest.mark.parametrize("name", ["moe[e8]", "a*/x", "a?", "back\\slash"])
def test_a_path_that_orbax_reads_as_a_pattern_is_refused(tmp_path, name):
    require_savable(tmp_path / "x{1}^!$, ü")
    with pytest.raises(UserError, match="which Orbax reads as a pattern; use another workdir"):
        require_savable(tmp_path / name)


def test_records_without_their_checkpoints_are_not_wiped(tmp_path):
    """A run killed before its first checkpoint starts again; one whose checkpoints were moved away does not."""
    require_checkpoints(tmp_path / "new")
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "metrics.jsonl").touch()
    require_checkpoints(tmp_path)
    steps = StepDirectory(tmp_path / "checkpoints", keep=1)
    steps.step(3, SAVING).mkdir()
    steps.complete(3)
    require_checkpoints(tmp_path)
    (tmp_path / "checkpoints").rename(tmp_path / "moved")
    for _ in range(2):
        with pytest.raises(UserError, match=r"its checkpoints are missing from .*/checkpoints: put them back"):
            require_checkpoints(tmp_path)
        (tmp_path / "checkpoints").mkdir(exist_ok=True)
