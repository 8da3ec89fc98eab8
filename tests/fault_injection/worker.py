"""The run that `python -m tests.fault_injection kill` kills: tiny, with two prunes.

    python -m tests.fault_injection.worker SPEC

SPEC is a JSON object with the fields of `Spec`. The run writes what it goes through to a log of its own, ends
itself by a signal in the middle of it, and when it comes to its end prints nothing but leaves the hash of its state.
"""

import dataclasses
import hashlib
import json
import os
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import jax

from laep_jax.checkpoint.checkpointer import Checkpoints
from laep_jax.config import Config
from laep_jax.distributed import connect, leaving_at_once, num_processes
from laep_jax.sharding import make_cpu_devices
from laep_jax.training import loop
from laep_jax.training.prune import smaller_model
from laep_jax.training.prune.compile_ahead import is_compiling
from laep_jax.training.start import train
from laep_jax.training.trainer import Trainer
from tests.support.tiny_run import end_of_run, tiny_config

RUN = "run"  # the event that begins with the run
# Of a prune, in its order: calls of a function, or only those that have an argument.
EVENTS: dict[str, tuple[Any, *tuple[str, ...]]] = {
    "plan": (loop, "decide"),
    "compile": (smaller_model, "compile_steps"),
    "save": (loop, "apply"),
    "restore": (Checkpoints, "restore_cut"),
    "first evaluation": (Trainer, "evaluate", "after_prune"),
}
NUM_STEPS = 28


def make_config(cache_dir: str) -> Config:
    """A prune after step 6, and a second one once enough steps of the pruned model are recorded."""
    return tiny_config(
        cache_dir,
        model={"num_experts": 16},
        laep={
            "rank_correlation": -1.0,
            "overlap": 0.0,
            "stable_windows": 1,
            "min_step": 0,
            "max_prunes": 2,
            "prune_at_step": 4,
            "cut_delay": 2,
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


class Events:
    """Notes the beginnings and ends of events and strikes at the one that is named."""

    def __init__(self, spec: Spec):
        self._spec, self._begun = spec, Counter()
        self._file = open(spec.log, "a", buffering=1)  # noqa: SIM115, open until the process ends

    def note(self, name: str, **fields) -> None:
        self._file.write(json.dumps({"name": name, "time": time.time()} | fields) + "\n")

    def begin(self, name: str) -> None:
        self._begun[name] += 1
        self.note(name, begins=True)
        spec = self._spec
        hit = (name, self._begun[name], jax.process_index()) == (spec.event, spec.occurrence, spec.victim)
        if hit:
            timer = threading.Timer(spec.delay, self._strike)
            timer.daemon = True
            timer.start()

    def _strike(self) -> None:
        self.note("struck")
        os.kill(os.getpid(), self._spec.signal)

    def watch(self, name: str, owner, method: str, *having: str) -> None:
        """Makes a function an event; having: only those calls that have this argument."""
        original = getattr(owner, method)

        def watched(*args, **kwargs):
            if not all(argument in args for argument in having):
                return original(*args, **kwargs)
            self.begin(name)
            result = original(*args, **kwargs)
            self.note(name, begins=False)
            return result

        setattr(owner, method, watched)

    def watch_saves(self) -> None:
        """Notes every step that is complete on disk, and the step that a run goes on from."""
        save, wait, begin = Checkpoints.save, Checkpoints.wait, Trainer.__init__
        saving: list[int] = []

        def noted_save(checkpoints, step, *args):
            save(checkpoints, step, *args)
            saving.append(step)

        def noted_wait(checkpoints):
            wait(checkpoints)
            while saving:
                self.note("saved", step=saving.pop())

        def noted_begin(run, *args):
            begin(run, *args)
            self.note("resumed", step=run.run_state.step)

        for owner, name, noted in (
            (Checkpoints, "save", noted_save),
            (Checkpoints, "wait", noted_wait),
            (Trainer, "__init__", noted_begin),
        ):
            setattr(owner, name, noted)


def hash_of_run(run_dir: Path) -> str:
    """SHA-256 of all that the end of a run consists of."""
    sha = hashlib.sha256()
    for name, content in sorted(end_of_run(run_dir).items()):
        sha.update(name.encode() + content)
    return sha.hexdigest()


def main(spec: Spec) -> None:
    processes = num_processes()
    make_cpu_devices(8 // processes, processes=processes)
    with leaving_at_once(is_compiling):
        connect()
        events = Events(spec)
        for name, place in EVENTS.items():
            events.watch(name, *place)
        events.watch_saves()
        events.begin(RUN)
        train(make_config(spec.cache_dir), spec.run_dir)
        events.note(RUN, begins=False)
        if processes == 1:
            Path(spec.hash_file).write_text(hash_of_run(Path(spec.run_dir)))


if __name__ == "__main__":
    main(Spec(**json.loads(sys.argv[1])))
