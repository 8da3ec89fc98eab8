"""`python -m tests.fault_injection damage`: damage to the newest checkpoint of a tiny run, as by disks and people.

Each of its files in turn has one bit flipped, is cut in half, emptied, deleted; then bits of the state's files are
flipped at random. Every time the damage must be found and named when the checkpoint is read, and the one before must
still be there to go on from. Harmless is a bit that nothing reads, so that the state is what was saved.
"""

import argparse
import os
import random
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np
import tensorstore as ts

from laep_jax.checkpoint.checkpointer import Checkpoints
from laep_jax.checkpoint.manifest import DamagedError, make_manifest
from laep_jax.checkpoint.steps import Steps
from laep_jax.config import Config
from laep_jax.errors import require
from laep_jax.files import MAX_ARRAY
from laep_jax.sharding import make_cpu_devices, make_mesh
from laep_jax.state.tree import TrainState, abstract_state
from laep_jax.storage import Disk, Storage
from laep_jax.training.start import train
from tests.fault_injection.worker import make_config
from tests.support.tiny_run import change

OLDER, NEWEST = 3, 5  # the steps that the run saves
RANDOM = "random bit flipped"


def flip_bit(content: bytes, bit: int | None = None) -> bytes:
    """Changes one bit, by default the one in the middle."""
    changed = bytearray(content)
    byte, bit = divmod(4 * len(content) if bit is None else bit, 8)
    changed[byte] ^= 1 << bit
    return bytes(changed)


DAMAGES: dict[str, Callable[[bytes], bytes | None]] = {
    "one bit flipped": flip_bit,
    "cut in half": lambda content: content[: len(content) // 2],
    "emptied": lambda content: b"",
    "deleted": lambda content: None,
}


def damage_file(storage: Storage, name: str, damage: Callable[[bytes], bytes | None]) -> None:
    """Replaces what a file holds, or removes it."""
    changed = damage(storage.read(name, MAX_ARRAY))
    if changed is None:
        storage.remove(name)
    else:
        storage.write(name, changed)


def open_stored(state: str | os.PathLike[str], key: str) -> ts.TensorStore:
    """A leaf as Orbax stores it, to be read or changed. state: a folder or an address, without a slash at its end."""
    base = str(state) if "://" in str(state) else f"file://{state}"
    kvstore = {"driver": "ocdbt", "base": f"{base}/", "path": f"{key}/"}
    return ts.open({"driver": "zarr3", "kvstore": kvstore}, open=True, read=True, write=True).result()


def change_stored(storage: Storage, step: int, key: str, index: tuple[int, ...]) -> None:
    """Changes the last bit of one float32 of a checkpoint's state; the manifest knows nothing of it.

    storage: of checkpoints. key: of the leaf, `params.experts.down_NFD`.
    """
    folder = folder_of(storage, step)
    array = open_stored(storage.path(f"{folder}/state"), key)
    value = np.asarray(array[index].read().result(), np.float32)
    array[index].write((value.view(np.uint32) ^ 1).view(np.float32)).result()
    manifest = make_manifest(storage, str(step), folder.partition("/")[2])
    storage.write(f"{step}/manifest.json", manifest.encode())


def folder_of(storage: Storage, step: int) -> str:
    """Where the files of a step are."""
    return f"{step}/{Steps(storage, keep=1).folder(step)}"


def run(arguments: Sequence[str]) -> dict:
    """How many damages there were, how many were `undetected` or unnamed, and how often the step before was lost."""
    parser = argparse.ArgumentParser(prog="python -m tests.fault_injection damage", description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--flips", type=int, default=100, metavar="N", help="random bits of the state (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the bits (%(default)s)")
    options = parser.parse_args(arguments)
    require(options.flips >= 0, "--flips", options.flips, "must not be negative")
    make_cpu_devices(8)
    with tempfile.TemporaryDirectory() as folder:
        config = _config(f"{folder}/tokens")
        train(config, f"{folder}/run")
        trial = Trial(Path(folder), abstract_state(config, make_mesh(config.mesh)))
        counts = Counter(dict.fromkeys((*DAMAGES, RANDOM, "harmless", "undetected", "unnamed", "lost saves"), 0))
        for name in trial.files:
            for kind, damage in DAMAGES.items():
                counts.update(trial.outcome(name, damage, kind))
        rng = random.Random(options.seed)
        states = [name for name in trial.files if "/state/" in name]
        for name in rng.choices(states, [trial.files[name] for name in states], k=options.flips):
            bit = rng.randrange(8 * trial.files[name])
            counts.update(trial.outcome(name, lambda content, bit=bit: flip_bit(content, bit), RANDOM))
    return dict(counts)


def _config(cache_dir: str) -> Config:
    """Not pruned, and wide enough for files that are known by the fingerprints of what is in them."""
    return change(
        make_config(cache_dir),
        model={"hidden_size": 64, "ffn_size": 64},
        laep={"max_prunes": 0},
        train={"num_steps": NEWEST, "checkpoint_every": OLDER},
    ).resolve(8)


class Trial:
    """The checkpoints of a run, damaged in copies. files: of the newest step, with their sizes."""

    def __init__(self, folder: Path, abstract: TrainState):
        self._checkpoints, self._copy, self._abstract = folder / "run" / "checkpoints", folder / "copy", abstract
        with Checkpoints(self._checkpoints, keep=9) as checkpoints:
            self._saved = jax.device_get(checkpoints.restore(NEWEST, abstract))
        step = self._checkpoints / str(NEWEST)
        self.files = {p.relative_to(step).as_posix(): p.stat().st_size for p in sorted(step.rglob("*")) if p.is_file()}

    def outcome(self, name: str, damage: Callable[[bytes], bytes | None], kind: str) -> Counter[str]:
        """What became of one damage to the file of that name."""
        shutil.copytree(self._checkpoints, self._copy)
        damage_file(Disk(self._copy), f"{NEWEST}/{name}", damage)
        told: list[str] = []
        restored = step = None
        with Checkpoints(self._copy, keep=9, report=told.append) as checkpoints:
            while (step := checkpoints.newest_valid()) is not None:
                try:
                    checkpoints.read_history(step)
                    restored = jax.device_get(checkpoints.restore(step, self._abstract))
                    break
                except DamagedError as error:
                    checkpoints.put_aside(error)
        shutil.rmtree(self._copy)
        if name == "manifest.json" and kind == "deleted":  # a step without one is none, and nothing is said
            return Counter({kind: 1, "lost saves": step != OLDER})
        if not told:
            same = all(map(np.array_equal, jax.tree.leaves(restored), jax.tree.leaves(self._saved)))
            return Counter({kind: 1, "harmless": same, "undetected": not same})
        named = len(told) == 1 and (name in told[0] or " of layer " in told[0] or " is damaged: " in told[0])
        if not named:
            print(f"{kind}: {name}: {told}", file=sys.stderr)
        return Counter({kind: 1, "unnamed": not named, "lost saves": step != OLDER})


def table(result: dict) -> str:
    """The figures for people."""
    return "\n".join(f"{name:<20}{number:>6}" for name, number in result.items())
