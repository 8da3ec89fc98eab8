"""Checkpoints: a thin front of Orbax's `CheckpointManager`. One atomic directory a step, three items in it.

`state`: every leaf of the training state under its dotted path (zarr3 in OCDBT, uncompressed, one
chunk a layer and, for expert matrices, an expert: what `cut_restore` reads in part). `history`: small
NumPy arrays. `meta`: JSON, required; a step whose `meta` does not read does not count.

Saving is asynchronous. What Orbax leaves open is settled in `wait`: everything is fsynced, a failed
save raises, and only then older steps go. The directory belongs to one run and lies on a local or
mounted file system.
"""

import io
import json
import logging
import os
import shutil
import uuid
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from jax.tree_util import tree_flatten_with_path, tree_unflatten

from laep_jax.errors import UserError
from laep_jax.files import parse_arrays, read_json
from laep_jax.hosts import is_alone, refused_together, texts_of_all
from laep_jax.sharding import expert_axis, leaf_name
from laep_jax.training.cut_restore import open_leaves, read_leaves
from laep_jax.training.surgery import Kept, Runs, cut_leaves, leaf_key

META_FILE = "meta.json"
REPLACED = ".replaced"  # a step making way for a new save of the same step
TRASH = ".trash"  # a step being removed
Described = dict[str, tuple[tuple[int, ...], np.dtype]]  # shape and dtype by leaf key

log = logging.getLogger(__name__)


class Checkpoints:
    """The checkpoints of one run; a context manager that waits for the save in progress on any exit.

    Only one of several processes that leaves alone, by an error of its own, does not wait: the others
    do not come.

    directory: made if missing. keep: complete steps to keep, at least 1. Every process of a run makes
    one and calls the same methods in the same order.
    """

    def __init__(self, directory: str | os.PathLike[str], *, keep: int):
        assert keep >= 1, keep
        logging.getLogger("absl").addFilter(_not_orbax_chatter)
        self.directory = Path(directory).absolute()
        self._keep = keep
        arrays = {"use_ocdbt": True, "use_zarr3": True, "use_compression": False}
        self._manager = ocp.CheckpointManager(
            self.directory,
            item_handlers={
                "state": ocp.PyTreeCheckpointHandler(**arrays),
                "history": ocp.PyTreeCheckpointHandler(**arrays),
                "meta": ocp.JsonCheckpointHandler(filename=META_FILE),
            },
            options=ocp.CheckpointManagerOptions(cleanup_tmp_directories=True),
        )
        self._unsynced: int | None = None
        self._require_shared()
        self._settle()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind, error: BaseException | None, traceback) -> None:
        if not is_alone(error):
            self.close()

    def close(self) -> None:
        """Waits for the save in progress, then lets go of Orbax's threads."""
        try:
            self.wait()
        finally:
            self._manager.close()

    def save(self, step: int, state, history: dict[str, np.ndarray], meta: dict[str, Any]) -> None:
        """Starts saving; `state` may be donated or deleted, the rest changed, as soon as this returns.

        Replaces a step that exists; the old one stays until the new one is complete. Waits for the
        save before and raises what went wrong in it. meta: read back as JSON makes it (tuples become
        lists, keys strings).
        """
        meta = json.loads(json.dumps(meta))  # a copy, and the place where what JSON refuses is reported
        self.wait()
        if jax.process_index() == 0 and self._path(step).exists():
            os.replace(self._path(step), self._path(step, REPLACED))
        multihost_utils.sync_global_devices(f"replace step {step}")
        leaves = tree_flatten_with_path(state)[0]
        items = ocp.args.Composite(
            state=ocp.args.PyTreeSave(
                {leaf_key(path): leaf for path, leaf in leaves},
                save_args={leaf_key(path): ocp.SaveArgs(shard_axes=_chunked_axes(path, leaf)) for path, leaf in leaves},
            ),
            history=ocp.args.PyTreeSave({"npz": _to_npz(history)}),
            meta=ocp.args.JsonSave(meta),
        )
        self._manager.reload()
        self._manager.save(step, args=items, force=True)  # without force an older step is silently skipped
        self._unsynced = step

    def wait(self) -> None:
        """Returns when the save in progress is complete and on disk; raises what went wrong in it."""
        try:
            self._manager.wait_until_finished()
            if self._unsynced is not None and jax.process_index() == 0:
                _fsync(self._path(self._unsynced))
        finally:
            self._unsynced = None
            self._settle()

    def latest(self) -> int | None:
        """The newest complete step as process 0 finds it, None without one.

        A step counts when its `meta` item reads: an empty directory or half of a step does not.
        """
        found = self._latest() if jax.process_index() == 0 else None
        step = int(multihost_utils.broadcast_one_to_all(np.int32(-1 if found is None else found)))
        return None if step < 0 else step

    def _latest(self) -> int | None:
        for step in reversed(self._found_steps()):
            if self._is_complete(step):
                return step
            log.warning("checkpoint %s is incomplete; passed over", self._path(step))
        return None

    def read_meta(self, step: int) -> dict[str, Any]:
        """The `meta` item; `UserError` where the step is missing, incomplete or damaged there."""
        name = f"checkpoint {self._path(step)} is incomplete: its meta item"
        return read_json(self._path(step) / "meta" / META_FILE, name)

    def read_history(self, step: int) -> dict[str, np.ndarray]:
        items = self._manager.restore(step, args=ocp.args.Composite(history=ocp.args.PyTreeRestore()))
        file = io.BytesIO(items["history"]["npz"].tobytes())
        return parse_arrays(file, f"history of checkpoint {self._path(step)}")

    def restore(self, step: int, abstract_state):
        """The state of a step, with the tree and the shardings of `abstract_state`, on any mesh.

        abstract_state: a tree of `jax.ShapeDtypeStruct` with shardings. `UserError` naming the leaf
        where tree, shapes or dtypes differ from what is stored.
        """
        leaves, structure = tree_flatten_with_path(abstract_state)
        abstract = {leaf_key(path): leaf for path, leaf in leaves}
        self._check(step, {key: (leaf.shape, np.dtype(leaf.dtype)) for key, leaf in abstract.items()})
        args = {
            key: ocp.ArrayRestoreArgs(sharding=leaf.sharding, global_shape=leaf.shape, dtype=leaf.dtype)
            for key, leaf in abstract.items()
        }
        items = ocp.args.Composite(state=ocp.args.PyTreeRestore(abstract, restore_args=args))
        state = self._manager.restore(step, args=items)["state"]
        return tree_unflatten(structure, [state[key] for key in abstract])

    def restore_cut(self, step: int, abstract_state, kept: Kept, old_runs: Runs):
        """The state of a step cut by a plan, read from disk no further than it survives.

        abstract_state: of the cut model. kept: per layer the old slots in new order. old_runs:
        `ModelConfig.runs` of the model as it was saved. Equal to `restore` followed by
        `surgery.cut_state`. `UserError` as in `restore`.
        """
        cuts = list(cut_leaves(abstract_state, old_runs, kept))
        expected: Described = {}
        for cut in cuts:
            shapes = [cut.old_shape(old_runs, piece) for piece in cut.pieces] or [cut.target.shape]
            expected |= {
                key: (shape, np.dtype(cut.target.dtype)) for key, shape in zip(cut.sources, shapes, strict=True)
            }
        self._check(step, expected)
        stored = open_leaves(self._path(step) / "state", expected)
        return tree_unflatten(jax.tree.structure(abstract_state), read_leaves(cuts, stored))

    def _require_shared(self) -> None:
        """`UserError` unless every process finds what process 0 puts here: Orbax would wait for it for ever."""
        marker = self.directory / f".{texts_of_all(uuid.uuid4().hex)[0]}"
        if jax.process_index() == 0:
            marker.touch()
        multihost_utils.sync_global_devices("marker")
        with refused_together():
            if not marker.exists():
                raise UserError(f"{self.directory} must be on a file system that all processes share")
        if jax.process_index() == 0:
            marker.unlink()

    def _path(self, step: int, suffix: str = "") -> Path:
        return self.directory / f"{step}{suffix}"

    def _check(self, step: int, expected: Described) -> None:
        """Compares tree, shapes and dtypes with the stored ones; Orbax would cast a dtype in silence."""
        self.read_meta(step)
        tree = self._manager.item_metadata(step)["state"].tree
        stored: Described = {key: (tuple(leaf.shape), np.dtype(leaf.dtype)) for key, leaf in tree.items()}
        wrong = [key for key in dict.fromkeys([*expected, *stored]) if stored.get(key) != expected.get(key)]
        if wrong:
            more = f" ({len(wrong) - 1} more leaves differ)" if len(wrong) > 1 else ""
            raise UserError(
                f"checkpoint {self._path(step)} does not fit: {wrong[0]} is stored as"
                f" {_describe(stored.get(wrong[0]))}, expected {_describe(expected.get(wrong[0]))}{more}"
            )

    def _found_steps(self) -> list[int]:
        return sorted(int(path.name) for path in self.directory.iterdir() if path.name.isdecimal() and path.is_dir())

    def _is_complete(self, step: int) -> bool:
        try:
            self.read_meta(step)
        except UserError:
            return False
        return True

    def _settle(self) -> None:
        """Ends every replacement, the right way round, and removes what is no longer kept."""
        if jax.process_index() == 0:
            for path in self.directory.glob(f"*{TRASH}"):
                shutil.rmtree(path)
            for path in self.directory.glob(f"*{REPLACED}"):
                step = int(path.name.removesuffix(REPLACED))
                if self._is_complete(step):
                    self._remove(path)
                else:
                    self._remove(self._path(step))
                    os.replace(path, self._path(step))
            complete = [step for step in self._found_steps() if self._is_complete(step)]
            for step in complete[: -self._keep]:
                self._remove(self._path(step))
        multihost_utils.sync_global_devices("checkpoints settled")

    def _remove(self, path: Path) -> None:
        """Renamed first: a step is there as a whole or not at all."""
        if path.exists():
            trash = path.with_name(path.name + TRASH)
            os.replace(path, trash)
            shutil.rmtree(trash)


def _not_orbax_chatter(record: logging.LogRecord) -> bool:
    """Drops the dozens of INFO lines Orbax writes about a save; its warnings and errors stay."""
    return record.levelno >= logging.WARNING or "orbax" not in Path(record.pathname).parts


def _chunked_axes(path: tuple, leaf: jax.Array) -> tuple[int, ...]:
    """Dimensions stored one index a chunk: the layers of a run, and the experts of its matrices."""
    if not any(key == jax.tree_util.DictKey("runs") for key in path):
        return ()
    return (0, 1) if leaf.ndim > 2 and expert_axis(leaf_name(path), leaf.ndim) == 1 else (0,)


def _to_npz(arrays: dict[str, np.ndarray]) -> np.ndarray:
    """The bytes of an .npz file: Orbax refuses arrays without elements, and a history starts as one."""
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **arrays)
    return np.frombuffer(buffer.getvalue(), np.uint8)


def _describe(leaf: tuple[tuple[int, ...], np.dtype] | None) -> str:
    return "nothing" if leaf is None else f"{leaf[1]}{list(leaf[0])}"


def _fsync(step_directory: Path) -> None:
    """Puts a step on disk. TensorStore syncs its data, but Orbax neither its JSON files nor the renames."""
    paths = [Path(root, name) for root, _, files in os.walk(step_directory) for name in (*files, ".")]
    for path in (*paths, step_directory.parent):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
