"""`python -m tests.fault_injection kill`: a tiny run with prunes, killed at random, must end the same bit for bit.

Half of the kills fall anywhere in the run, half at a random moment of a stage of a prune: its decision, its
compilation, its two phases, the restoring, the first evaluation. Every other pair of trials prunes in memory, which
must not change the end. In every third trial the run is killed again while it recovers. With two processes one of them
is killed, or stopped as a machine that hangs; then all must be gone within the heartbeat. At the end parameters,
moments, layout, load history, recorded loads and losses are hashed. A save that was complete on disk must not be lost.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from laep_jax.distributed import HEARTBEAT_TIMEOUT
from laep_jax.errors import require
from tests.fault_injection.worker import PRUNE, RUN, Spec
from tests.support import emulator
from tests.support.tiny_run import steps_on_disk

PATIENCE = 1800.0  # seconds for one run, other work beside it
LAUNCH = (
    "import json, sys; from laep_jax.launch import launch; sys.exit(launch(json.loads(sys.argv[1]), int(sys.argv[2])))"
)


@dataclasses.dataclass
class Uninterrupted:
    """The run to compare with. seconds: of each event, by occurrence."""

    hash: str
    seconds: dict[str, list[float]]


class Trial:
    """One run directory, on disk or in a bucket; `start` goes on with what is there."""

    def __init__(self, folder: Path, name: str, shared: Path, processes: int, in_bucket: bool):
        self.folder, self.processes = folder / name, processes
        self.folder.mkdir()
        run_dir = emulator.new_folder() if in_bucket else str(self.folder / "run")
        self.spec = Spec(run_dir, str(shared / "tokens"), "", str(self.folder / "hash"))
        self.environment = {name: value for name, value in os.environ.items() if name != "PJRT_NPROC"}
        self.environment["JAX_PLATFORMS"] = "cpu"
        self.environment.setdefault("JAX_COMPILATION_CACHE_DIR", str(shared / "programs"))
        self.environment.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
        self.starts = 0

    def start(self, **hit) -> tuple[int, list[dict]]:
        """Runs to the end or to the strike that `hit`, fields of `Spec`, describes: exit code and events."""
        self.starts += 1
        log = self.folder / f"{self.starts}.events"
        spec = dataclasses.replace(self.spec, log=str(log), **hit)
        worker = [sys.executable, "-m", "tests.fault_injection.worker", json.dumps(dataclasses.asdict(spec))]
        command = (
            worker if self.processes == 1 else [sys.executable, "-c", LAUNCH, json.dumps(worker), str(self.processes)]
        )
        with (self.folder / f"{self.starts}.output").open("w") as output:
            done = subprocess.run(command, env=self.environment, stdout=output, stderr=output, timeout=PATIENCE)
        return done.returncode, read_events(log)

    def newest_step(self) -> int:
        """Of the checkpoints that are complete on disk; 0 without one."""
        return max(steps_on_disk(self.spec.run_dir), default=0)

    @property
    def hash(self) -> str:
        return Path(self.spec.hash_file).read_text()


def read_events(log: Path) -> list[dict]:
    lines = log.read_text().splitlines(keepends=True) if log.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def durations(events: Sequence[dict]) -> dict[str, list[float]]:
    """Seconds of every occurrence of every event that has an end."""
    begun: dict[str, float] = {}
    seconds: dict[str, list[float]] = {}
    for event in events:
        if event.get("begins"):
            begun[event["name"]] = event["time"]
        elif event["name"] in begun:
            seconds.setdefault(event["name"], []).append(event["time"] - begun.pop(event["name"]))
    return seconds


def run(arguments: Sequence[str]) -> dict:
    """Counts of trials, kills, wrong ends and lost saves; all of the latter two must be 0."""
    parser = argparse.ArgumentParser(prog="python -m tests.fault_injection kill", description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--trials", type=int, default=50, metavar="N", help="runs that are killed (%(default)s)")
    parser.add_argument("--processes", type=int, default=1, choices=(1, 2), help="of each run (%(default)s)")
    parser.add_argument(
        "--bucket", action="store_true", help="runs in a bucket of Cloud Storage, as an emulator has it"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the moments (%(default)s)")
    options = parser.parse_args(arguments)
    require(options.trials >= 1, "--trials", options.trials, "must be at least 1")
    rng = random.Random(options.seed)
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        if options.bucket:
            stack.enter_context(emulator.in_environment(stack.enter_context(emulator.running())))
        whole = uninterrupted(Path(folder), options.processes, options.bucket)
        counts: Counter[str] = Counter()
        longest = 0.0
        for index in range(options.trials):
            trial = Trial(Path(folder), f"trial {index}", Path(folder), options.processes, options.bucket)
            in_memory = index // 2 % 2 == 0
            trial.spec = dataclasses.replace(trial.spec, prune_via="memory" if in_memory else "checkpoint")
            in_prune = index % 2 == 0
            hits = [choose_hit(rng, whole, in_prune, options.processes)]
            if index % 3 == 2:
                hits.append(choose_hit(rng, whole, False, options.processes))
            outcome, gone = survive(trial, hits, whole)
            longest = max(longest, gone)
            counts.update(outcome, trials=1)
            told = ", then ".join(f"{hit['delay']:.2f} s into {hit['event']} {hit['occurrence']}" for hit in hits)
            print(f"trial {index + 1} of {options.trials}: {told}", file=sys.stderr, flush=True)
    return dict(counts) | {"processes": options.processes, "gone_seconds": longest}


def uninterrupted(folder: Path, processes: int, in_bucket: bool) -> Uninterrupted:
    """Two runs without interruption: the first compiles, the second is timed; their ends must be the same."""
    hashes = []
    for name in ("first", "second"):
        trial = Trial(folder, name, folder, processes, in_bucket)
        code, events = trial.start()
        assert code == 0, (trial.folder / "1.output").read_text()
        hashes.append(end_hash(trial))
    assert hashes[0] == hashes[1], "two runs without interruption end differently"
    return Uninterrupted(hashes[0], durations(events))


def choose_hit(rng: random.Random, whole: Uninterrupted, in_prune: bool, processes: int) -> dict:
    """Where a run is struck: at a random moment of the whole run, or of a random event of a prune."""
    event = rng.choice(PRUNE) if in_prune else RUN
    occurrence = rng.randrange(len(whole.seconds[event]))
    return {
        "event": event,
        "occurrence": occurrence + 1,
        "delay": rng.uniform(0, whole.seconds[event][occurrence]),
        "victim": rng.randrange(processes),
        "signal": int(rng.choice([signal.SIGKILL, signal.SIGSTOP]) if processes > 1 else signal.SIGKILL),
    }


def survive(trial: Trial, hits: Sequence[dict], whole: Uninterrupted) -> tuple[Counter[str], float]:
    """What became of one trial, and how long the others outlived one that was struck."""
    counts: Counter[str] = Counter()
    gone = 0.0
    for hit in (*hits, {}):
        saved = trial.newest_step()
        code, events = trial.start(**hit)
        trained = [event["step"] for event in events if event["name"] == "step" and event.get("begins")]
        counts["lost saves"] += bool(trained and trained[0] <= saved)
        struck = [event["time"] for event in events if event["name"] == "struck"]
        if struck and code:
            gone = max(gone, time.time() - struck[0])
            counts["kills"] += 1
            counts["kills in a prune"] += hit["event"] != RUN
            counts["stops"] += hit["signal"] == signal.SIGSTOP
        else:  # it came to its end before
            assert code == 0, (trial.folder / f"{trial.starts}.output").read_text()
    counts["wrong ends"] += end_hash(trial) != whole.hash
    return counts, gone


def end_hash(trial: Trial) -> str:
    """Of a run that is at its end; of several processes, a single one looks at it."""
    if trial.processes > 1:
        trial.processes = 1
        code, _ = trial.start()
        assert code == 0, (trial.folder / f"{trial.starts}.output").read_text()
    return trial.hash


def table(result: dict) -> str:
    """The figures for people."""
    names = ("trials", "kills", "kills in a prune", "stops", "wrong ends", "lost saves")
    lines = [f"{name:<18}{result.get(name, 0):>6}" for name in names]
    if result["processes"] > 1:
        lines.append(
            f"all processes gone within {result['gone_seconds']:.0f} s; the heartbeat is {HEARTBEAT_TIMEOUT} s"
        )
    return "\n".join(lines)
