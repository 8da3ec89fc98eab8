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


def test_of_those_that_fail_later_one_line_is_shown_before_the_one_that_matters(tmp_path, capfd):
    body = "everybody()\nfailed = here / 'failed'\n"
    body += "if index == 1: failed.touch(); sys.exit('the fault')\n"
    body += "while not failed.exists(): time.sleep(0.02)\n"
    body += "time.sleep(0.5)\nsys.exit('a traceback\\nconnection reset')\n"
    assert launch.launch(program(tmp_path, body), 2) == 1
    said = capfd.readouterr().err.splitlines()
    assert said == ["[process 0] connection reset", "[process 1] the fault", "[process 1] exit code 1"]


def test_a_signal_to_one_ends_all(tmp_path, impatient):
    body = "everybody()\nif index == 2: os.kill(os.getpid(), signal.SIGKILL)\ntime.sleep(600)\n"
    assert launch.launch(program(tmp_path, body), 3) == 128 + signal.SIGKILL
    assert_all_gone(tmp_path, 3)


def test_a_refusal_of_all_is_told_once(tmp_path, capfd):
    body = "everybody()\nprint('error: no such thing', file=sys.stderr)\nsys.exit(2)\n"
    assert launch.launch(program(tmp_path, body), 3) == 2
    assert capfd.readouterr().err == "error: no such thing\n"


@pytest.mark.parametrize(("code", "starts"), [(3, 3), (-9, 3), (2, 1), (75, 1), (130, 1), (0, 1)])
def test_after_a_crash_all_are_started_again_so_many_times(tmp_path, capfd, code, starts):
    body = "everybody()\n(here / f'{index}.starts').open('a').write('x')\n"
    body += f"os.kill(os.getpid(), {-code})\n" if code < 0 else f"sys.exit({code})\n"
    code = 128 - code if code < 0 else code
    assert launch.launch(program(tmp_path, body), 2, restarts=2) == code
    assert [(tmp_path / f"{index}.starts").read_text() for index in range(2)] == ["x" * starts] * 2
    told = [line for line in capfd.readouterr().err.splitlines() if "restart" in line]
    assert [line.split(" ended ")[1] for line in told] == [
        f"with code {code}: restart {restart} of 2" for restart in range(1, starts)
    ]


@pytest.fixture
def launcher(tmp_path):
    """A function: a launcher, as a process, of two programs of that body, which make `ready` when they are."""

    def start(body: str) -> subprocess.Popen:
        code = "import signal, sys\nfrom laep_jax import launch\n"
        code += "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # ignored behind a shell's &
        code += f"launch.GRACE = 0.5\nsys.exit(launch.launch({program(tmp_path, body)}, 2, restarts=1))\n"
        process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
        started.append(process)
        while len(list(tmp_path.glob("*.ready"))) < 2:
            assert process.poll() is None
            time.sleep(0.05)
        return process

    started: list[subprocess.Popen] = []
    yield start
    for process in started:
        process.kill()
        process.wait()


SAVING = """
told = []
signal.signal(signal.SIGTERM, lambda *_: told.append(1))
(here / f'{index}.ready').touch()
everybody()
while not told: time.sleep(0.02)
(here / f'{index}.saving').touch()
time.sleep(SECONDS + index)
sys.exit(75)
"""


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_launcher_is_passed_on_and_all_are_waited_for(tmp_path, launcher, sent):
    process = launcher(SAVING.replace("SECONDS", "0.2"))  # one of them for longer than GRACE
    process.send_signal(sent)
    assert process.wait(timeout=60) == 75
    assert_all_gone(tmp_path, 2)


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_second_signal_to_the_launcher_ends_all(tmp_path, launcher, sent, code):
    process = launcher(SAVING.replace("SECONDS", "600"))
    process.send_signal(sent)
    while len(list(tmp_path.glob("*.saving"))) < 2:
        time.sleep(0.05)
    process.send_signal(sent)
    assert process.wait(timeout=60) == code
    assert_all_gone(tmp_path, 2)


def test_a_signal_before_there_is_anything_to_save_is_a_stop_too(tmp_path, launcher):
    process = launcher("(here / f'{index}.ready').touch()\ntime.sleep(600)\n")
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 75
    assert_all_gone(tmp_path, 2)


@pytest.mark.skipif(sys.platform != "linux", reason="Linux tells a process of its parent's end")
def test_processes_whose_launcher_was_killed_stop(tmp_path, launcher):
    launcher(SAVING.replace("SECONDS", "0")).kill()
    deadline = time.monotonic() + 60
    while len(list(tmp_path.glob("*.saving"))) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num-processes", "0"], "--num-processes=0 must be at least 1"),
        (["--num-processes", "2", "--restarts", "-1"], "--restarts=-1 must not be negative"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        launch.main(arguments)


def test_the_arguments_reach_the_processes(tmp_path, monkeypatch):
    fake = tmp_path / "python"  # in the place of `python -m laep_jax train`
    fake.write_text(f"#!/bin/sh\necho x >> {tmp_path}/starts\n[ \"$*\" = '-m laep_jax train --workdir=x' ] && exit 3\n")
    fake.chmod(0o755)
    monkeypatch.setattr(launch.sys, "platform", "elsewhere")
    monkeypatch.setattr(launch.sys, "executable", str(fake))
    assert launch.main(["--num-processes", "1", "--restarts", "2", "--", "--workdir=x"]) == 3
    assert (tmp_path / "starts").read_text() == "x\n" * 3
