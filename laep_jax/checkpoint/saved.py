"""One checkpoint of a run, read on one machine, for programs that do not train, or not yet. Nothing is changed.

A run is read where it is, on a disk or in a bucket; every part that is read is compared with its fingerprint.
"""

import functools
import io
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tensorstore as ts
from jax.tree_util import tree_flatten_with_path

from laep_jax.checkpoint.arrays import Leaf, make_reader, open_leaves, read_opened, unreadable
from laep_jax.checkpoint.checkpointer import FINGERPRINTS_FILE, META_FILE
from laep_jax.checkpoint.lock import CHECKPOINTS
from laep_jax.checkpoint.manifest import DamagedError, read_file, read_sealed
from laep_jax.checkpoint.steps import Steps
from laep_jax.config import Config
from laep_jax.data.tokenizer import Tokenizer, load_tokenizer
from laep_jax.distributed import raise_on_all_processes
from laep_jax.errors import UnavailableError, UserError, require
from laep_jax.files import MAX_ARRAY, parse_arrays
from laep_jax.laep.recorded_loads import METRICS_FILE
from laep_jax.paths import require_path
from laep_jax.state import fingerprint
from laep_jax.state.surgery import leaf_key
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
            names = open_storage(self.run).entries()
            if METRICS_FILE not in names:
                raise UserError(
                    f"{self.run} is no run: it has no {METRICS_FILE}" if names else f"there is no {self.run}"
                )
            raise UserError(f"run {self.run} has no complete checkpoint")
        self.step, self.where = step, storage.path(str(step))
        folder = f"{step}/{steps.folder(step)}"
        header = read_sealed(storage, f"{folder}/{META_FILE}")
        self.meta, self.num_experts = header["meta"], tuple(header["num_experts"])
        self.config = Config.from_dict(self.meta["config"]).with_num_experts(self.num_experts)
        self._storage, self._folder, self._header = storage, folder, header

    @functools.cached_property
    def _sums(self) -> fingerprint.Fingerprints:
        sha256 = self._header["sha256"][FINGERPRINTS_FILE]
        content = read_file(self._storage, f"{self._folder}/{FINGERPRINTS_FILE}", MAX_ARRAY, sha256)
        return fingerprint.from_arrays(parse_arrays(io.BytesIO(content), self.where))

    @functools.cached_property
    def _stored(self) -> dict[str, ts.TensorStore]:
        state = self._storage.path(f"{self._folder}/state")
        try:
            return open_leaves(make_reader(), state, self._header["leaves"])
        except Exception as error:
            raise unreadable(state, error) from error

    def tokenizer(self, path: str | None) -> Tokenizer:
        """The run's tokenizer, from where the run had it, or from a file. `UserError` where it is another one."""
        field, file = ("--tokenizer", path) if path else ("DataConfig.tokenizer", self.config.data.tokenizer)
        elsewhere = "is not a file" + ("" if path else "; --tokenizer=FILE says where it is now")
        require(file == "bytes" or Path(file).is_file(), field, file, elsewhere)
        loaded, want = load_tokenizer(file), self.meta["fingerprint"].partition("/")[2]
        require(want in ("", loaded.identity), field, file, f"is not the tokenizer of {self.run}")
        return loaded

    def restore(self, abstract):
        """Arrays like `abstract`, a tree of `jax.ShapeDtypeStruct` with shardings that is a part of the saved state.

        Each process reads what its devices hold. `DamagedError` where it is not what was saved; every process must call
        it.
        """
        paths, targets = zip(*tree_flatten_with_path(abstract)[0], strict=True)
        leaves = [Leaf(leaf_key(path), target, None) for path, target in zip(paths, targets, strict=True)]
        with raise_on_all_processes(DamagedError, UnavailableError, UserError):
            try:
                arrays = read_opened(leaves, [self._stored[leaf.key] for leaf in leaves])
            except (ValueError, OSError) as error:
                raise unreadable(self.where, error) from error
        tree = jax.tree.unflatten(jax.tree.structure(abstract), arrays)
        want = fingerprint.Fingerprinted({leaf.key: self._sums[leaf.key] for leaf in leaves}, self.num_experts)
        if difference := want.first_difference(tree, None):
            raise DamagedError(f"checkpoint {self.where} is damaged: {difference} is not what was saved")
        return tree

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
