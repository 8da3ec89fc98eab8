"""A bucket that refuses, answers slowly or loses the connection while a checkpoint goes up."""

import os
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import jax
import pytest

from laep_jax.checkpoint.checkpointer import Checkpoints
from laep_jax.storage import open_storage
from tests.support import emulator as storage_emulator
from tests.support.tiny_run import complete_steps

SAVES = """
    import sys
    import jax, numpy as np
    from laep_jax.checkpoint import checkpointer
    from laep_jax.checkpoint.checkpointer import Checkpoints
    checkpointer.SLOW = 0.5
    def state(value):
        leaves = {f"scale_{i}_D": jax.numpy.full(2**12, value, np.float32) for i in range(8)}
        return {"params": leaves}
    def value_at(checkpoints, step):
        device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), state(0))
        return {float(x[0]) for x in jax.tree.leaves(checkpoints.restore(step, abstract))}
    with Checkpoints(sys.argv[1], keep=3, report=print) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, state(step), {}, {})
            checkpoints._wait_patiently()
        newest = checkpoints.newest_valid()
        print("newest", newest, value_at(checkpoints, newest))
    """


class Trouble:
    """What goes wrong while step 2 is saved. seconds: of the outage."""

    def __init__(self, kind: str, writes: int = 0, seconds: float = 4.0):
        self._kind, self._writes, self._seconds = kind, writes, seconds
        self._begun = float("inf")
        self._lock = threading.Lock()
        self.requests = 0

    def __call__(self, method: str, path: str) -> int | None:
        is_write = method in ("POST", "PUT", "DELETE") and "checkpoints/2/" in path
        with self._lock:
            if is_write and self._begun == float("inf"):
                self._writes -= 1
                if self._writes < 0:
                    self._begun = time.monotonic()
            lasts = 0 <= time.monotonic() - self._begun < self._seconds
            self.requests += lasts
        if self._kind == "slow" and is_write:
            time.sleep(0.3)
        elif self._kind == "lost" and lasts:
            return 0
        elif self._kind == "busy" and lasts:
            return 503
        elif self._kind == "quota" and lasts:
            return 429
        elif self._kind == "refused" and is_write and self._begun < float("inf"):
            return 403
        return None


def saves(emulator: str, trouble: Trouble) -> tuple[str, list[int]]:
    """What a process that saves three steps prints, and the steps that are there then."""
    address = f"{storage_emulator.new_folder()}/checkpoints"
    with storage_emulator.troubled(emulator, trouble) as spoilt:
        environment = {
            **os.environ,
            **storage_emulator.environment(spoilt),
            "JAX_PLATFORMS": "cpu",
            "PYTHONPATH": str(Path(__file__).parents[2]),
        }
        command = [sys.executable, "-c", textwrap.dedent(SAVES), address]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return result.stdout, complete_steps(open_storage(address))


@pytest.mark.parametrize("writes", [0, *(pytest.param(writes, marks=pytest.mark.slow) for writes in (2, 9)), 5])
def test_a_save_that_is_refused_half_way_is_reported_and_the_next_one_counts(emulator, writes):
    printed, steps = saves(emulator, Trouble("refused", writes))
    assert "checkpoints/2 could not be saved: " in printed
    assert "newest 3 {3.0}" in printed
    assert steps == [1, 3]


@pytest.mark.parametrize(
    "kind", ["lost", "slow", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("busy", "quota"))]
)
def test_a_bucket_that_fails_for_seconds_or_is_slow_is_waited_for(emulator, kind):
    trouble = Trouble(kind, writes=3)
    printed, steps = saves(emulator, trouble)
    assert trouble.requests > 3
    assert "checkpoints/2 is still being saved; the run waits for it" in printed
    assert "could not be saved" not in printed
    assert "newest 3 {3.0}" in printed
    assert steps == [1, 2, 3]


READS = """
    import sys
    import jax, numpy as np
    from laep_jax.checkpoint.checkpointer import Checkpoints
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    state = {"params": {"scale_D": jax.ShapeDtypeStruct((8,), np.float32, sharding=device)}}
    with Checkpoints(sys.argv[1], keep=3) as checkpoints:
        try:
            step = checkpoints.newest_valid()
            print(step, float(checkpoints.restore(step, state)["params"]["scale_D"][0]))
        except Exception as error:
            print(type(error).__name__, error)
    """


@pytest.mark.parametrize(
    ("refused", "status"),
    [("prefix=", 403), ("prefix=", 401), ("_METADATA", 403), ("manifest.ocdbt", 403), ("fingerprints.npz", 401)],
)
def test_what_is_refused_is_neither_damaged_nor_missing(emulator, refused, status):
    """A listing, or a file that Orbax, TensorStore or this package reads."""
    address = f"{storage_emulator.new_folder()}/checkpoints"
    with Checkpoints(address, keep=3) as checkpoints:
        for step in (1, 2):
            state = {"params": {"scale_D": jax.numpy.full(8, float(step))}}
            checkpoints.save(step, state, {}, {}, now=True)
    asked = []

    def trouble(method: str, path: str) -> int | None:
        if method == "GET" and refused in path and (refused != "prefix=" or asked or "checkpoints" in path):
            asked.append(path)
            if refused != "prefix=" or len(asked) > 2:  # those that find whether the processes share it
                return status
        return None

    with storage_emulator.troubled(emulator, trouble) as spoilt:
        environment = os.environ | storage_emulator.environment(spoilt) | {"JAX_PLATFORMS": "cpu"}
        command = [sys.executable, "-c", textwrap.dedent(READS), address]
        root = str(Path(__file__).parents[2])
        result = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, timeout=300)
    assert result.stdout.startswith("UnavailableError "), result.stdout + result.stderr
    assert asked
    with Checkpoints(address, keep=3) as checkpoints:
        assert checkpoints.newest_valid() == 2
    assert complete_steps(open_storage(address)) == [1, 2]
