import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from laep_jax.checkpoint.lock import (
    TakenOverError,
    exclusive,
    require_room,
    require_savable,
    require_writable,
)
from laep_jax.checkpoint.steps import Steps, require_checkpoints, require_own
from laep_jax.errors import UserError
from laep_jax.mirror import RECORDS
from laep_jax.storage import Disk, open_storage
from tests.support.emulator import new_folder

HOLDER = """
import sys, time
from laep_jax.checkpoint.lock import exclusive
from laep_jax.storage import Disk
with exclusive(Disk(sys.argv[1])):
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
                with pytest.raises(UserError, match=message), exclusive(Disk(tmp_path / "run")):
                    pass
        finally:
            holder.kill()
    for _ in range(2):
        with exclusive(Disk(tmp_path / "run")):
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
        require_writable(Disk(tmp_path))


@pytest.mark.parametrize("name", ["moe[e8]", "a*/x", "a?", "back\\slash"])
def test_a_path_that_orbax_reads_as_a_pattern_is_refused(tmp_path, name):
    require_savable(Disk(tmp_path / "x{1}^!$, ü"))
    with pytest.raises(UserError, match="which Orbax reads as a pattern; use another workdir"):
        require_savable(Disk(tmp_path / name))


@pytest.mark.parametrize("of_a_run", [".has_checkpoints", "run.lock", "checkpoints/3/manifest.json"])
def test_files_that_a_run_would_replace_are_refused_where_no_run_wrote_them(storage, of_a_run):
    run, names = storage.parent(), (*RECORDS, "loads")
    run.write("notes.txt", b"")
    run.write("checkpoints/1000/model.pt", b"")  # of another trainer
    require_own(run, names)
    for name in ("loads/7.npy", "metrics.jsonl", "config.json"):
        run.write(name, b"{}")
        with pytest.raises(UserError, match=r" holds .*, but no run that wrote it; use another workdir$"):
            require_own(run, names)
        run.remove(name)
    run.write("loads/7.npy", b"")
    run.write(of_a_run, b"")
    require_own(run, names)


def test_records_without_their_checkpoints_are_not_wiped(storage):
    """A run killed before its first checkpoint starts again; one whose checkpoints were moved away does not."""
    run = storage.parent()
    require_checkpoints(run, True)
    storage.write("3/01234567/x", b"")
    require_checkpoints(run, True)
    steps = Steps(storage, keep=1)
    steps.complete(3, "01234567", ["x"], lambda: None)
    require_checkpoints(run, True)
    steps.put_aside(3)
    require_checkpoints(run, True)
    storage.remove("3")
    require_checkpoints(run, False)
    with pytest.raises(UserError, match=r"its checkpoints are missing from .*/checkpoints: put them back"):
        require_checkpoints(run, True)


def test_in_a_bucket_the_newest_start_wins(emulator):
    """A lease would have to outlast the wait of a killed process, which would delay each restart."""
    run = open_storage(new_folder())
    with exclusive(run) as first:
        first()
        with exclusive(run) as second:
            second()
            message = rf"{run.root} was taken over by process {os.getpid()} on {socket.gethostname()}; this process"
            with pytest.raises(TakenOverError, match=message):
                first()
        run.remove("run.lock")  # as by somebody who takes it for a leftover
        second()
        assert run.read("run.lock", 999).startswith(f"process {os.getpid()} on ".encode())
        second()
