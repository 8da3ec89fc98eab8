"""When processes connect, and what one process alone makes of the rest; several are in test_several_hosts.py."""

import jax
import numpy as np
import pytest

from laep_jax import distributed
from laep_jax.errors import StoppedError, UserError, run_main

NAMES = (
    distributed.ADDRESS,
    distributed.NUMBER,
    distributed.INDEX,
    *distributed.TPU_HOSTS,
    "MEGASCALE_COORDINATOR_ADDRESS",
    "JAX_PLATFORMS",
)
HEARTBEAT = {"heartbeat_timeout_seconds": distributed.HEARTBEAT_TIMEOUT}
ALL_GIVEN = {distributed.ADDRESS: "10.0.0.1:99", distributed.NUMBER: "4", distributed.INDEX: "3"}


@pytest.fixture
def environment(monkeypatch):
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    return lambda variables: [monkeypatch.setenv(name, value) for name, value in variables.items()]


@pytest.mark.parametrize(
    ("variables", "arguments"),
    [
        ({}, None),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, None),
        ({"TPU_PROCESS_ADDRESSES": "local"}, None),
        (ALL_GIVEN, ("10.0.0.1:99", 4, 3)),
        ({distributed.ADDRESS: "10.0.0.1:99"}, ()),
        ({"TPU_WORKER_HOSTNAMES": "t-0,t-1"}, ()),
        ({"TPU_PROCESS_ADDRESSES": "t-0:8471,t-1:8471"}, ()),
        ({"MEGASCALE_COORDINATOR_ADDRESS": "t-0", "TPU_WORKER_HOSTNAMES": "t-0"}, ()),
    ],
)
def test_processes_connect_where_there_are_several(environment, monkeypatch, variables, arguments):
    calls = []
    monkeypatch.setattr(distributed, "await_coordinator", lambda address: None)
    monkeypatch.setattr(jax.distributed, "initialize", lambda *args, **kwargs: calls.append((args, kwargs)))
    environment(variables)
    distributed.connect()
    expected = HEARTBEAT | ({"cluster_detection_method": "deactivate"} if arguments else {})
    assert calls == ([] if arguments is None else [(arguments, expected)])


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        (ALL_GIVEN | {distributed.NUMBER: "two"}, "JAX_NUM_PROCESSES='two' must be a number"),
        (ALL_GIVEN | {distributed.NUMBER: "0"}, "JAX_NUM_PROCESSES=0 must be a positive number"),
        (ALL_GIVEN | {distributed.INDEX: "4"}, "JAX_PROCESS_ID=4 must be a number below JAX_NUM_PROCESSES=4"),
        ({distributed.ADDRESS: "10.0.0.1:99", distributed.NUMBER: "4"}, "JAX_PROCESS_ID='' must be a number below"),
        (ALL_GIVEN | {distributed.ADDRESS: "10.0.0.1"}, "JAX_COORDINATOR_ADDRESS='10.0.0.1' must be HOST:PORT"),
        ({distributed.NUMBER: "4"}, "JAX_NUM_PROCESSES=4 needs JAX_COORDINATOR_ADDRESS beside it"),
        ({distributed.INDEX: "1"}, "JAX_PROCESS_ID=1 needs JAX_COORDINATOR_ADDRESS beside it"),
        ({distributed.NUMBER: "0x4"}, "JAX_NUM_PROCESSES='0x4' must be a number"),
        ({distributed.ADDRESS: "10.0.0.1:99"}, "JAX_COORDINATOR_ADDRESS='10.0.0.1:99': no cluster; unset it"),
        ({"TPU_WORKER_HOSTNAMES": "t-0,t-1"}, "TPU_WORKER_HOSTNAMES='t-0,t-1': no cluster; unset it"),
    ],
)
def test_a_place_that_cannot_be_is_refused(environment, monkeypatch, variables, message):
    def initialize(**options):
        raise ValueError("no cluster\nat all")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    environment(variables)
    with pytest.raises(UserError, match=message):
        distributed.connect()


def test_hosts_that_are_not_connected_are_refused(environment, monkeypatch):
    environment({})
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    with pytest.raises(UserError, match=r"JAX_COORDINATOR_ADDRESS=None must be set: there are 4 hosts"):
        distributed.connect()


def test_platforms_that_are_not_here_and_a_coordinator_that_does_not_answer_are_a_line(
    environment, monkeypatch, capsys
):
    def no_devices():
        raise RuntimeError("Unable to initialize backend 'tpu': no driver\n(set JAX_PLATFORMS='')")

    environment({"JAX_PLATFORMS": "tpu"})
    monkeypatch.setattr(jax, "process_count", no_devices)
    message = r"^JAX_PLATFORMS='tpu' has no devices here: Unable .*: no driver$"
    with pytest.raises(UserError, match=message), distributed.exit_without_barrier(lambda: False):
        distributed.connect()

    environment(ALL_GIVEN | {distributed.ADDRESS: "127.0.0.1:1"})
    monkeypatch.setattr(distributed, "COORDINATOR_TIMEOUT", 0)
    assert run_main(lambda argv: distributed.connect() or 0, []) == 1
    assert capsys.readouterr().err.startswith("error: JAX_COORDINATOR_ADDRESS='127.0.0.1:1' does not answer: ")


def test_alone_everything_agrees():
    assert distributed.allgather_strings("äh") == ["äh"]
    distributed.require_same({"the plan": "abc", "TrainConfig.seed": 0})
    with distributed.raise_on_all_processes():
        pass
    with pytest.raises(UserError, match=r"^no$"), distributed.raise_on_all_processes():
        raise UserError("no")
    with pytest.raises(RuntimeError), distributed.exit_without_barrier(lambda: False):
        raise RuntimeError


def test_a_difference_names_every_text_and_process(monkeypatch):
    def gather(mine):
        others = mine.copy()
        others[-1] = 0
        return np.stack([mine, others, mine])

    monkeypatch.setattr(distributed.multihost_utils, "process_allgather", gather)
    monkeypatch.setattr(distributed, "allgather_strings", lambda text: [text, "b", text])
    with pytest.raises(UserError, match=r"^the plan differs between the processes: a on 0, 2; b on 1$"):
        distributed.require_same({"TrainConfig.seed": 0, "the plan": "a"})


@pytest.mark.parametrize(
    ("error", "alone"),
    [
        (None, False),
        (UserError("no"), False),
        (FloatingPointError("nan"), False),
        (StoppedError(7), False),
        (OSError(), True),
        (SystemExit(), True),
    ],
)
def test_which_errors_are_a_process_s_own(monkeypatch, error, alone):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert distributed.is_local_error(error) == alone


def test_a_stop_does_not_wait_for_a_compilation(monkeypatch, capsys):
    codes = []
    monkeypatch.setattr(distributed.os, "_exit", codes.append)
    with distributed.exit_without_barrier(lambda: True):
        raise StoppedError(7)
    assert codes == [75]
    assert capsys.readouterr().err == "stopped and saved after step 7; started again, the run resumes from there\n"
