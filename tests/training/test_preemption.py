"""What tells a run to stop, and the end of a step that hangs; whole runs that stop are in test_loop.py."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from laep_jax.config import TrainConfig
from laep_jax.errors import UserError
from laep_jax.gin_config import operative_config
from laep_jax.training.preemption import PreemptionGuard
from tests.support.tiny_run import tiny_config

ROOT = Path(__file__).parents[2]
SIGNALS = (signal.SIGINT, signal.SIGTERM)


@pytest.fixture
def default_handlers():
    """Tests in the background of a shell find SIGINT ignored."""
    found = [signal.signal(number, signal.default_int_handler) for number in SIGNALS]
    yield
    for number, handler in zip(SIGNALS, found, strict=True):
        signal.signal(number, handler)


def send(number: int) -> None:
    os.kill(os.getpid(), number)
    time.sleep(0)  # Python's handler runs between two instructions


def test_a_signal_is_told_at_the_next_step_and_afterwards_nothing_is_left(default_handlers):
    for number in SIGNALS:
        with PreemptionGuard(None) as now:
            assert not now.asked(1)
            send(number)
            assert now.asked(2)
        assert [signal.getsignal(n) for n in SIGNALS] == [signal.default_int_handler] * 2


def test_the_second_interrupt_stops_at_once_and_no_number_of_terms_does(default_handlers):
    with PreemptionGuard(None) as now:
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
            send(number)
            assert now.asked(1)
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)


def test_an_ignored_signal_stays_ignored(default_handlers):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with PreemptionGuard(None) as now:
        send(signal.SIGINT)
        assert not now.asked(1)


def test_beside_the_main_thread_no_signal_is_caught(default_handlers):
    def body() -> None:
        with PreemptionGuard(None) as now:
            found.extend(signal.getsignal(number) for number in SIGNALS)
            found.append(now.asked(1))

    found: list = []
    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert found == [signal.default_int_handler, signal.default_int_handler, False]


UNHURRIED = """
import time
from laep_jax.training import preemption
preemption.HEAD_START = 0.2
with preemption.PreemptionGuard(1.0) as now:
    now.begin_step()
    now.end_step()
    time.sleep(1.5)
    for _ in range(15):  # together longer than one may take
        now.begin_step()
        time.sleep(0.1)
time.sleep(1.5)
"""


def test_what_is_no_step_takes_its_time():
    """In a process of its own, which a stall would end."""
    result = subprocess.run([sys.executable, "-c", UNHURRIED], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert (result.returncode, result.stderr) == (0, "")


HOLDING = """
import ctypes
from laep_jax.training import preemption
preemption.HEAD_START = 0.5
with preemption.PreemptionGuard(0.5) as now:
    now.begin_step()
    ctypes.PyDLL(None).sleep(600)
"""


def test_a_step_that_holds_pythons_lock_ends_with_its_stacks():
    result = subprocess.run([sys.executable, "-c", HOLDING], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 1
    assert "Timeout (0:00:01)!\n" in result.stderr
    assert 'File "<string>", line 7 in <module>' in result.stderr


@pytest.mark.parametrize("seconds", [0.5, float("inf"), 1e9, "soon"])
def test_a_time_that_cannot_be_is_refused(seconds):
    with pytest.raises(UserError, match=r"TrainConfig\.step_timeout="):
        TrainConfig(step_timeout=seconds)
    assert TrainConfig(step_timeout=None).step_timeout is None


def test_only_a_step_may_not_take_long_and_one_that_hangs_is_ended(tmp_path):
    config = tiny_config(
        str(tmp_path / "tokens"),
        laep={"window": 3, "prune_at_step": 3, "prune_delay": 0},
        train={"num_steps": 9, "eval_every": 50, "checkpoint_every": 50, "step_timeout": 2.0},
    )
    (tmp_path / "config.gin").write_text(operative_config(config))
    arguments = [str(tmp_path / "hangs"), f"--gin_file={tmp_path}/config.gin", f"--workdir={tmp_path}/x"]
    command = [sys.executable, "-m", "tests.training.slow_run", *arguments]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    ended = time.time()
    assert result.returncode == 1, result.stderr
    assert "step 3: a pause of" in result.stdout  # after a compilation, an evaluation, a save and a restore
    assert ended - float((tmp_path / "hangs").read_text()) < 20
    said, stacks = result.stderr.split("Timeout (0:00:02.500000)!\n")
    assert "a step takes longer than TrainConfig.step_timeout=2 s" in said
    assert "slow_run.py" in stacks
    assert "laep_jax/training/loop.py" in stacks
