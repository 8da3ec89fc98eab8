"""One checkpoint of a run, read on one machine, for programs that do not train, or not yet. Nothing is changed.

A run is read where it is, on a disk or in a bucket; every part that is read is compared with its fingerprint.
"""

import functools
import io
import re
from typing import Any

import jax.numpy as jnp
import numpy as np

from laep_jax.checkpoint.arrays import make_reader, open_leaves, unreadable
from laep_jax.checkpoint.checkpointer import FINGERPRINTS_FILE, META_FILE
from laep_jax.checkpoint.lock import CHECKPOINTS
from laep_jax.checkpoint.manifest import DamagedError, read_file, read_sealed
from laep_jax.checkpoint.steps import Steps
from laep_jax.config import Config
from laep_jax.errors import UserError
from laep_jax.files import MAX_ARRAY, parse_arrays
from laep_jax.paths import require_path
from laep_jax.state import fingerprint
from laep_jax.storage import Storage, open_storage


def peek(run: Storage) -> tuple[int | None, dict[str, Any] | None, list[str]]:
    """The newest valid step of a run, what it says of the run, and what is wrong with newer ones.

    None without a step. `UserError` where none remains of those there were.
    """
    storage, damaged = open_storage(run.path(CHECKPOINTS)), list[str]()
    steps = Steps(storage, keep=1)
    step = steps.latest(lambda _, damage: damaged.append(damage))
    if step is None and (damaged or steps.only_damaged()):
        raise UserError(damaged[0] if damaged else f"no checkpoint in {storage.root} validates")
    header = read_sealed(storage, f"{step}/{steps.folder(step)}/{META_FILE}") if step else None
    return step, header and header["meta"], damaged


class Saved:
    """A run's newest valid checkpoint, or the one of `RUN/checkpoints/STEP`.

    config: of its model. meta: what the run said of itself. `UserError` where there is none.
    """

    def __init__(self, run_or_checkpoint: str):
        require_path("RUN", run_or_checkpoint, bucket=True)
        match = re.fullmatch(rf"(?:(.+)/)?{CHECKPOINTS}/(\d+)/?", run_or_checkpoint)
        self.run = (match[1] or ".") if match else run_or_checkpoint.rstrip("/")
        storage = open_storage(f"{self.run}/{CHECKPOINTS}")
        steps = Steps(storage, keep=1)
        step = int(match[2]) if match else steps.latest(lambda step, damage: None)
        if step is None:
            raise UserError(f"run {self.run} has no complete checkpoint")
        self.step, self.where = step, storage.path(str(step))
        folder = f"{step}/{steps.folder(step)}"
        header = read_sealed(storage, f"{folder}/{META_FILE}")
        self.meta, self.num_experts = header["meta"], tuple(header["num_experts"])
        self.config = Config.from_dict(self.meta["config"]).with_num_experts(self.num_experts)
        content = read_file(storage, f"{folder}/{FINGERPRINTS_FILE}", MAX_ARRAY, header["sha256"][FINGERPRINTS_FILE])
        self._sums = fingerprint.from_arrays(parse_arrays(io.BytesIO(content), self.where))
        self._reader = make_reader()
        state = storage.path(f"{folder}/state")
        try:
            self._stored = open_leaves(self._reader, state, header["leaves"])
        except Exception as error:
            raise unreadable(state, error) from error

    def read(self, key: str, rows: slice | None = None) -> np.ndarray:
        """A leaf, or these rows of it: layers of one that is stacked, experts of all layers side by side.

        `DamagedError` where it is not what was saved.
        """
        stored, want = self._stored[key], self._sums[key]
        try:
            array = np.asarray((stored if rows is None else stored[rows]).read().result())
        except ValueError as error:
            raise unreadable(self.where, error) from error
        got = fingerprint.fingerprints({key: jnp.asarray(array)})[key]
        if not np.array_equal(got, want if rows is None else want[rows]):
            raise DamagedError(f"checkpoint {self.where} is damaged: {key} is not what was saved")
        return array

    @functools.cached_property
    def has_bias(self) -> bool:
        """Whether experts are chosen with a bias that the loss-free balancing has moved."""
        return bool(np.any(self.read("router_bias.bias_N")))

    def shape(self, key: str) -> tuple[int, ...]:
        """Of a leaf."""
        return tuple(self._stored[key].shape)

    def rows(self, layer: int) -> slice:
        """Of the experts of a layer."""
        first = sum(self.num_experts[:layer])
        return slice(first, first + self.num_experts[layer])
