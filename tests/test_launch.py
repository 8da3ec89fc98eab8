"""The launcher with programs that need no JAX: what it passes on, whom it ends, whose exit code it returns."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from laep_jax import launch
from laep_jax.errors import UserError

ROOT = Path(__file__).parents[1]


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(launch, "GRACE", 0.5)


def program(tmp_path: Path, body: str) -> list[str]:
    """A program that notes its pid and then does `body`, with `index` and `number` at hand."""
    script = tmp_path / "program.py"
    head = (
        "import os, pathlib, signal, sys, time\n"
        "index, number = int(os.environ['JAX_PROCESS_ID']), int(os.environ['JAX_NUM_PROCESSES'])\n"
        f"here = pathlib.Path({str(tmp_path)!r})\n"
        "(here / f'{index}.part').write_text(str(os.getpid()))\n"
        "(here / f'{index}.part').rename(here / f'{index}.pid')\n"
        "def everybody():\n"
        "    while len(list(here.glob('*.pid'))) < number: time.sleep(0.02)\n"
    )
    script.write_text(head + body)
    return [sys.executable, str(script)]


def assert_all_gone(tmp_path: Path, number: int) -> None:
    pids = [int((tmp_path / f"{index}.pid").read_text()) for index in range(number)]
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_every_process_knows_its_place_and_only_the_first_is_heard(tmp_path, capfd, monkeypatch):
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    body = "print(index, number, os.environ['JAX_COORDINATOR_ADDRESS'], os.environ['JAX_PLATFORMS'], sys.argv[1:])\n"
    body += "(here / f'{index}.place').write_text(os.environ['JAX_COORDINATOR_ADDRESS'])\n"
    assert launch.launch([*program(tmp_path, body), "--workdir=x"], 3) == 0
    [line] = capfd.readouterr().out.splitlines()
    [address] = {(tmp_path / f"{index}.place").read_text() for index in range(3)}
    assert line == f"0 3 {address} cpu ['--workdir=x']"
    assert address.startswith("127.0.0.1:")


def test_one_that_fails_ends_all_and_is_heard(tmp_path, capfd, impatient):
    body = "everybody()\nif index == 1: sys.exit('a fault\\nin two lines')\ntime.sleep(600)\n"
    start = time.monotonic()
    assert launch.launch(program(tmp_path, body), 3) == 1
    assert time.monotonic() - start < 60
    assert_all_gone(tmp_path, 3)
    said = capfd.readouterr().err.splitlines()
    assert said == ["[process 1] a fault", "[process 1] in two lines", "[process 1] exit code 1"]


def test_a_signal_to_one_ends_all(tmp_path, impatient):
    body = "everybody()\nif index == 2: os.kill(os.getpid(), signal.SIGKILL)\ntime.sleep(600)\n"
    assert launch.launch(program(tmp_path, body), 3) == 128 + signal.SIGKILL
    assert_all_gone(tmp_path, 3)


def test_a_refusal_of_all_is_told_once(tmp_path, capfd):
    body = "everybody()\nprint('error: no such thing', file=sys.stderr)\nsys.exit(2)\n"
    assert launch.launch(program(tmp_path, body), 3) == 2
    assert capfd.readouterr().err == "error: no such thing\n"


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_to_the_launcher_ends_all(tmp_path, sent, code):
    command = program(tmp_path, "everybody()\n(here / 'ready').touch()\ntime.sleep(600)\n")
    start = "import signal, sys\nfrom laep_jax import launch\nlaunch.sys.executable, *arguments = sys.argv[1:]\n"
    start += (
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # ignored where the tests run in the background
    )
    start += "launch.GRACE = 0.5\nsys.exit(launch.main(arguments))\n"
    fake = tmp_path / "python"  # in the place of `python -m laep_jax train`
    fake.write_text(f"#!/bin/sh\nexec {' '.join(command)}\n")
    fake.chmod(0o755)
    launcher = subprocess.Popen([sys.executable, "-c", start, str(fake), "--num-processes", "2"], cwd=ROOT)
    while not (tmp_path / "ready").exists():
        assert launcher.poll() is None
        time.sleep(0.05)
    launcher.send_signal(sent)
    assert launcher.wait(timeout=60) == code
    assert_all_gone(tmp_path, 2)


def test_no_processes_are_refused():
    with pytest.raises(UserError, match=r"--num-processes=0 must be at least 1"):
        launch.main(["--num-processes", "0"])
