"""The run that `python -m tests.fault_injection kill` kills: tiny, with two prunes.

    python -m tests.fault_injection.worker SPEC

SPEC is a JSON object with the fields of `Spec`. The run writes what it goes through to a log of its own, ends
itself by a signal in the middle of it, and when it comes to its end prints nothing but leaves the hash of its state.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import jax

from laep_jax.config import Config
from laep_jax.distributed import connect, exit_without_barrier, num_processes
from laep_jax.sharding import make_cpu_devices
from laep_jax.training.prune.compile_ahead import is_compiling
from laep_jax.training.start import train
from tests.support.tiny_run import end_of_run, tiny_config

RUN = "run"  # the event that begins with the run
PRUNE = ("decide", "compile", "apply", "restore", "finish")  # stages of a run, see `laep_jax.training.watch`
NUM_STEPS = 28


def make_config(cache_dir: str, prune_via: str = "checkpoint") -> Config:
    """A prune after step 6, and a second one once enough steps of the pruned model are recorded."""
    return tiny_config(
        cache_dir,
        model={"num_experts": 16},
        laep={
            "max_moved": 1.0,
            "max_regret": 1.0,
            "max_excess": 1e9,
            "stable_windows": 1,
            "min_step": 0,
            "max_prunes": 2,
            "prune_at_step": 4,
            "prune_delay": 2,
            "prune_via": prune_via,
        },
        train={"num_steps": NUM_STEPS, "eval_every": 9, "checkpoint_every": 5, "keep_checkpoints": 2},
    )


@dataclasses.dataclass(frozen=True)
class Spec:
    """What a worker does.

    log: where it writes a JSON line for every event. hash_file: where the hash goes. event: None to leave it alone,
    else process `victim` sends itself `signal`, `delay` seconds after the event has begun for the `occurrence`-th time.
    """

    run_dir: str
    cache_dir: str
    log: str
    hash_file: str
    event: str | None = None
    occurrence: int = 1
    delay: float = 0.0
    signal: int = 9
    victim: int = 0
    prune_via: str = "checkpoint"


class Events:
    """Notes when stages begin and end, and strikes in the one that is named."""

    def __init__(self, spec: Spec):
        self._spec, self._begun = spec, Counter()
        self._file = open(spec.log, "a", buffering=1)  # noqa: SIM115, open until the process ends

    def note(self, name: str, **fields) -> None:
        self._file.write(json.dumps({"name": name, "time": time.time()} | fields) + "\n")

    @contextlib.contextmanager
    def watch(self, name: str, step: int) -> Iterator[None]:
        self._begun[name] += 1
        self.note(name, begins=True, step=step)
        spec = self._spec
        if (name, self._begun[name], jax.process_index()) == (spec.event, spec.occurrence, spec.victim):
            timer = threading.Timer(spec.delay, self._strike)
            timer.daemon = True
            timer.start()
        yield
        self.note(name, begins=False)

    def _strike(self) -> None:
        self.note("struck")
        os.kill(os.getpid(), self._spec.signal)


def hash_of_run(run_dir: str) -> str:
    """SHA-256 of all that the end of a run consists of."""
    sha = hashlib.sha256()
    for name, content in sorted(end_of_run(run_dir).items()):
        sha.update(name.encode() + content)
    return sha.hexdigest()


def main(spec: Spec) -> None:
    processes = num_processes()
    make_cpu_devices(8 // processes, processes=processes)
    with exit_without_barrier(is_compiling):
        connect()
        events = Events(spec)
        with events.watch(RUN, 0):
            train(make_config(spec.cache_dir, spec.prune_via), spec.run_dir, watch=events.watch)
        if processes == 1:
            Path(spec.hash_file).write_text(hash_of_run(spec.run_dir))


if __name__ == "__main__":
    main(Spec(**json.loads(sys.argv[1])))
