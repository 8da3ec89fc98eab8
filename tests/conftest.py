"""Eight emulated CPU devices, strict rank promotion; warnings are errors (pyproject.toml). Damage for parsers.

Compiling takes most of the time. Programs are kept for the session, since the same tiny model is trained again and
again, also by processes that tests start; XLA optimizes little, so that a train step compiles in a quarter of the time;
and a process traces a step once for all its runs with the same settings, so what a trace reads may not be patched.
tests/test_train.py trains with XLA's own settings.
"""

import copy
import functools
import importlib.metadata
import os
import tempfile
from collections.abc import Callable
from typing import Any

programs = tempfile.TemporaryDirectory(prefix="programs-")
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", programs.name)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
if tuple(map(int, importlib.metadata.version("jaxlib").split(".")[:2])) < (0, 11):  # where XLA has this flag
    os.environ["XLA_FLAGS"] = "--xla_cpu_use_fusion_emitters=false"

import jax  # noqa: E402
import pytest  # noqa: E402
from hypothesis import HealthCheck, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from laep_jax.errors import MAX_MESSAGE, UserError  # noqa: E402
from laep_jax.sharding import make_cpu_devices  # noqa: E402
from laep_jax.training import sample, step  # noqa: E402
from tests.support import emulator as storage_emulator  # noqa: E402
from tests.support.states import States  # noqa: E402

for module, name in ((step, "make_train_step"), (step, "make_eval_step"), (sample, "make_sampler")):
    setattr(module, name, functools.lru_cache(maxsize=8)(getattr(module, name)))  # before another module imports it
make_cpu_devices(8)
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="session")
def states() -> type[States]:
    return States


@pytest.fixture(scope="session")
def emulator():
    """An emulator of Cloud Storage, which this process and those it starts use from then on."""
    with storage_emulator.running() as address, storage_emulator.in_environment(address):
        yield address


NODES = [
    None,
    True,
    -1,
    0,
    1,
    2**31,
    2**63,
    10**400,
    0.5,
    -1e308,
    1e308,
    "",
    "x",
    "inf",
    "../../x",
    "\0",
    [],
    {},
    [[0]],
    [[[]]],
]


class Fuzz:
    """Runs a check on drawn inputs, each a valid file damaged or something else altogether."""

    def __init__(self, examples: int):
        self._examples = examples

    def __call__(self, check: Callable[[st.DataObject], None]) -> None:
        @settings(max_examples=self._examples, deadline=None, suppress_health_check=list(HealthCheck))  # busy machines
        @given(st.data())
        def run(data):
            check(data)

        run()

    @staticmethod
    def bytes(valid: bytes):
        """Any bytes, or the valid ones with up to four pieces replaced."""
        place = st.integers(0, len(valid))
        piece = st.one_of(st.binary(max_size=8), st.sampled_from([b"\0" * 8, b"\xff" * 8, b"9" * 5000, b"[" * 3000]))
        edits = st.lists(st.tuples(place, st.integers(0, 16), piece), min_size=1, max_size=4)

        def apply(edits) -> bytes:
            data = valid
            for start, length, new in edits:
                data = data[:start] + new + data[start + length :]
            return data

        return st.one_of(st.binary(max_size=64), edits.map(apply), edits.map(apply), edits.map(apply))

    @staticmethod
    def json(draw, valid: Any) -> Any:
        """The valid value with one node, or two, gone or replaced."""
        value = copy.deepcopy(valid)
        for _ in range(draw(st.integers(1, 2))):
            node = value
            while isinstance(node, (dict, list)) and node:
                key = draw(st.sampled_from(sorted(node) if isinstance(node, dict) else range(len(node))))
                if not isinstance(node[key], (dict, list)) or not node[key] or draw(st.booleans()):
                    if draw(st.integers(0, 4)):
                        node[key] = copy.deepcopy(draw(st.sampled_from(NODES)))
                    else:
                        del node[key]
                    break
                node = node[key]
        return value

    @staticmethod
    def reads(read: Callable[[], Any]) -> Any:
        """What is read, None where it is refused; any other exception fails."""
        try:
            return read()
        except UserError as error:
            message = str(error)
        assert message.isprintable()
        assert len(message) <= 2 * MAX_MESSAGE
        return None


@pytest.fixture(
    params=[pytest.param(50, id="short"), pytest.param(3000, id="long", marks=pytest.mark.slow)], scope="session"
)
def fuzz(request) -> Fuzz:
    return Fuzz(request.param)
