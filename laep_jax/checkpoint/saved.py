"""One checkpoint of a run, read leaf by leaf on one machine, for programs that do not train.

A run is read where it is, on a disk or in a bucket; every part that is read is compared with its fingerprint.
"""

import io
import re

import jax.numpy as jnp
import numpy as np

from laep_jax.checkpoint import manifest
from laep_jax.checkpoint.arrays import make_reader, open_leaves
from laep_jax.checkpoint.checkpointer import FINGERPRINTS_FILE, META_FILE
from laep_jax.checkpoint.lock import CHECKPOINTS
from laep_jax.checkpoint.manifest import DamagedError
from laep_jax.checkpoint.steps import Steps
from laep_jax.config import Config
from laep_jax.errors import UserError
from laep_jax.files import MAX_ARRAY, parse_arrays
from laep_jax.state import fingerprint
from laep_jax.storage import open_storage


class Saved:
    """A run's newest valid checkpoint, or the one of `RUN/checkpoints/STEP`.

    config: of its model. meta: what the run said of itself. `UserError` where there is none.
    """

    def __init__(self, run_or_checkpoint: str):
        match = re.fullmatch(rf"(.+)/{CHECKPOINTS}/(\d+)/?", run_or_checkpoint)
        self.run = match[1] if match else run_or_checkpoint
        storage = open_storage(f"{self.run}/{CHECKPOINTS}")
        steps = Steps(storage, keep=1)
        step = int(match[2]) if match else steps.latest(lambda step, damage: None)
        if step is None:
            raise UserError(f"run {self.run} has no complete checkpoint")
        self.step, self.where = step, storage.path(str(step))
        folder = f"{step}/{steps.folder(step)}"
        header = manifest.read_sealed(storage, f"{folder}/{META_FILE}")
        self.meta, self.num_experts = header["meta"], tuple(header["num_experts"])
        self.config = Config.from_dict(self.meta["config"]).with_num_experts(self.num_experts)
        content = manifest.read_file(
            storage, f"{folder}/{FINGERPRINTS_FILE}", MAX_ARRAY, header["sha256"][FINGERPRINTS_FILE]
        )
        self._sums = fingerprint.from_arrays(parse_arrays(io.BytesIO(content), self.where))
        self._reader = make_reader()
        self._stored = open_leaves(self._reader, storage.path(f"{folder}/state"), header["leaves"])

    def read(self, key: str, rows: slice | None = None) -> np.ndarray:
        """A leaf, or these rows of it: layers of one that is stacked, experts of all layers side by side.

        `DamagedError` where it is not what was saved.
        """
        stored, want = self._stored[key], self._sums[key]
        try:
            array = np.asarray((stored if rows is None else stored[rows]).read().result())
        except ValueError as error:
            raise DamagedError(f"checkpoint {self.where} is damaged: {str(error).splitlines()[0]}") from error
        got = fingerprint.fingerprints({key: jnp.asarray(array)})[key]
        if not np.array_equal(got, want if rows is None else want[rows]):
            raise DamagedError(f"checkpoint {self.where} is damaged: {key} is not what was saved")
        return array

    def shape(self, key: str) -> tuple[int, ...]:
        """Of a leaf."""
        return tuple(self._stored[key].shape)

    def rows(self, layer: int) -> slice:
        """Of the experts of a layer."""
        first = sum(self.num_experts[:layer])
        return slice(first, first + self.num_experts[layer])
