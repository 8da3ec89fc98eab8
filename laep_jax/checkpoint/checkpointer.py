"""Checkpoints of one run: a directory a step, there as a whole, on disk and as it was saved, or it does not count.

`state`: every leaf of the training state under its dotted path, written by Orbax (zarr3 in OCDBT,
uncompressed, one chunk a layer or, of expert matrices, an expert: what `partial_read` reads in part).
`history.npz`: small arrays of numbers. `fingerprints.npz`: of the state, made on the devices when it was saved.
`meta.json`: what the run says of itself, the leaves, the number of experts of each layer, and the hashes of both .npz
files; it has its own.
`manifest.json`: every file.

A save goes on in the background: Orbax writes the state, process 0 the rest, brings all of it to disk
and gives the directory its name. What is read is compared with the hashes and the fingerprints; Orbax
has none. The directory belongs to one run and lies on a local or mounted file system.
"""

import contextlib
import hashlib
import io
import json
import logging
import os
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from jax.tree_util import tree_flatten_with_path, tree_unflatten

from laep_jax.checkpoint import manifest
from laep_jax.checkpoint.manifest import DamagedError
from laep_jax.checkpoint.partial_read import Leaf, make_reader, open_leaves, read_leaves
from laep_jax.checkpoint.steps import DAMAGED, SAVING, StepDirectory
from laep_jax.distributed import allgather_strings, is_local_error, raise_on_all_processes
from laep_jax.errors import UserError
from laep_jax.files import MAX_ARRAY, parse_arrays
from laep_jax.sharding import is_of_experts, is_stacked, leaf_name
from laep_jax.state import fingerprint
from laep_jax.state.surgery import Kept, kept_rows, leaf_key

META_FILE, HISTORY_FILE, FINGERPRINTS_FILE = "meta.json", "history.npz", "fingerprints.npz"
FAILURES = 2  # failed saves in a row that end the run
Described = dict[str, str]  # dtype and shape by leaf key

log = logging.getLogger(__name__)


class SaveError(UserError):
    """A checkpoint could not be saved: on every process, whichever it went wrong on."""


class Checkpoints:
    """The checkpoints of one run; a context manager that waits for the save in progress on any exit.

    Only one of several processes that leaves alone, by an error of its own, does not wait: the others
    do not come.

    directory: made if missing. keep: complete steps to keep, at least 1. report: shows a line of text on what went
    wrong and was dealt with. Every process of a run makes one and calls the same methods in the same order.
    """

    def __init__(self, directory: str | os.PathLike[str], *, keep: int, report: Callable[[str], None] = log.warning):
        assert keep >= 1, keep
        logging.getLogger("absl").addFilter(_not_orbax_chatter)
        self.directory = Path(directory).absolute()
        self.directory.mkdir(parents=True, exist_ok=True)
        self._steps = StepDirectory(self.directory, keep=keep)
        self._report = report
        self._orbax = ocp.AsyncCheckpointer(
            ocp.PyTreeCheckpointHandler(use_ocdbt=True, use_zarr3=True, use_compression=False)
        )
        self._reader = make_reader()
        self._thread = ThreadPoolExecutor(1, "completing a checkpoint")
        self._saving: tuple[int, Future[None]] | None = None
        self._saved = fingerprint.Fingerprinted({}, ())
        self._failures = 0
        self._require_shared()
        self._settle()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind, error: BaseException | None, traceback) -> None:
        if not is_local_error(error):
            self.close()

    def close(self) -> None:
        """Waits for the save in progress, then lets go of the threads."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()
            self._orbax.close()
            self._reader.close()

    def save(
        self,
        step: int,
        state,
        history: dict[str, np.ndarray],
        meta: dict[str, Any],
        num_experts: Sequence[int] = (),
        *,
        now: bool = False,
    ) -> None:
        """Starts saving; `state` may be donated or deleted, the rest changed, as soon as this returns.

        Replaces a step that exists; the old one stays until the new one is complete. Waits for the save before;
        reports where that failed, and raises `SaveError` where it was not the first in a row. meta: read back as JSON
        makes it (tuples become lists, keys strings). num_experts: of each layer, where the state has experts. now:
        waits for this save as well, and tries once more where that fails.
        """
        self._wait_patiently()
        of_state = fingerprint.fingerprints(state)
        files = {HISTORY_FILE: _to_npz(history), FINGERPRINTS_FILE: _to_npz(fingerprint.to_arrays(of_state))}
        leaves = tree_flatten_with_path(state)[0]
        header = {
            "meta": json.loads(json.dumps(meta)),  # as it will be read
            "leaves": {leaf_key(path): _describe(leaf.shape, leaf.dtype) for path, leaf in leaves},
            "num_experts": list(num_experts),
            "sha256": {name: hashlib.sha256(content).hexdigest() for name, content in files.items()},
        }
        files[META_FILE] = manifest.sealed(header).encode()
        self._saved = fingerprint.Fingerprinted(of_state, num_experts)
        items = ocp.args.PyTreeSave(
            {leaf_key(path): leaf for path, leaf in leaves},
            save_args={leaf_key(path): ocp.SaveArgs(shard_axes=_chunked_axes(path, leaf)) for path, leaf in leaves},
        )
        self._start(step, items, files, header["leaves"])
        while now and not self._wait_patiently():
            self._start(step, items, files, header["leaves"])

    def _start(self, step: int, items: ocp.args.PyTreeSave, files: dict[str, bytes], described: Described) -> None:
        multihost_utils.sync_global_devices(f"save step {step}")
        try:
            self._orbax.save(self._steps.step(step, SAVING) / "state", args=items)
            self._saving = step, self._thread.submit(self._complete, step, files, described)
        except Exception as error:  # a disk may be full already here
            self._saving = step, Future()
            self._saving[1].set_exception(error)

    def wait(self) -> None:
        """Returns when the save in progress is complete and on disk; `SaveError` where it failed, on all processes."""
        if self._saving is None:
            return
        (step, future), self._saving = self._saving, None
        error = future.exception()
        log.debug("the save of step %s has ended", step, exc_info=error)
        texts = allgather_strings(f"{type(error).__name__}: {error}".splitlines()[0] if error else "")
        self._settle()
        if jax.process_index() == 0:
            self._steps.retain()
        failures = [text for text in texts if text]
        self._failures = self._failures + 1 if failures else 0
        if failures:
            raise SaveError(f"checkpoint {self._steps.step(step)} could not be saved: {failures[0]}")

    def newest_valid(self) -> int | None:
        """The newest complete step as process 0 finds it, None without one; newer ones that do not count are put aside.

        A step counts when its files are as its manifest says; what is in the large ones only reading them shows.
        `UserError` where none remains of those there were: that is no reason to train from the beginning.
        """
        step = _of_first(lambda: self._steps.latest(self._put_aside))
        if step is None and _of_first(self._steps.only_damaged):
            raise UserError(
                f"no checkpoint in {self.directory} validates; those there were are now *{DAMAGED}: repair one and"
                " give it its name back, or use another workdir"
            )
        return step

    def put_aside(self, error: DamagedError) -> None:
        """Renames the step that was found damaged, where it is still there; later ones stay."""
        assert error.step is not None
        if jax.process_index() == 0 and error.step in self._steps.found():
            self._put_aside(error.step, str(error))
        multihost_utils.sync_global_devices(f"put step {error.step} aside")

    def _put_aside(self, step: int, damage: str) -> None:
        path = self._steps.put_aside(step)
        self._report(f"{damage}; it is now {path.name}, and the run resumes from an older one")

    def read_meta(self, step: int) -> dict[str, Any]:
        """What the run said of itself; `DamagedError` where the step is missing or does not read."""
        return self._read_header(step)["meta"]

    def read_history(self, step: int) -> dict[str, np.ndarray]:
        """`DamagedError` where it is not what was saved."""
        return self._read_arrays(step, HISTORY_FILE)

    def restore(self, step: int, abstract_state):
        """The state of a step, with the tree and the shardings of `abstract_state`, on any mesh.

        abstract_state: a tree of `jax.ShapeDtypeStruct` with shardings. `UserError` naming the leaf where tree, shapes
        or dtypes differ from what is stored; `DamagedError` where the values are not those that were saved.
        """
        return self._restore(step, abstract_state, None)

    def restore_pruned(self, step: int, abstract_state, kept: Kept):
        """The state of a step, pruned by a plan, read from disk no further than it survives.

        abstract_state: of the pruned model. kept: per layer the old experts in new order. Equal to `restore` followed
        by `surgery.prune_state`, and checked as there. Errors as in `restore`; `UserError` also where `kept` does not
        fit the model as it was saved.
        """
        return self._restore(step, abstract_state, kept)

    def verify(self, step: int, state, kept: Kept | None = None) -> None:
        """`DamagedError`, naming leaf, layer and expert, unless `state` is what was saved. kept: what a plan keeps."""
        want = fingerprint.from_arrays(self._read_arrays(step, FINGERPRINTS_FILE))
        place = fingerprint.Fingerprinted(want, self._num_experts(step)).first_difference(state, kept)
        if place:
            with self._validating(step):
                raise DamagedError(f"checkpoint {self._steps.step(step)} is damaged: {place} is not what was saved")

    def verify_pruned(self, state, kept: Kept) -> None:
        """`RuntimeError` unless `state` is what `save` was last given, pruned in memory; it may not be on disk yet."""
        place = self._saved.first_difference(state, kept)
        if place:
            raise RuntimeError(f"the state was not pruned as planned: {place} is not what it was")

    def _num_experts(self, step: int) -> list[int]:
        return self._read_header(step)["num_experts"]

    def _restore(self, step: int, abstract_state, kept: Kept | None):
        num_experts = self._num_experts(step)
        rows_N = None if kept is None else kept_rows(num_experts, kept)
        leaves, expected = [], Described()
        for path, target in tree_flatten_with_path(abstract_state)[0]:
            rows = rows_N if is_of_experts(leaf_name(path)) else None
            shape = target.shape if rows is None else (sum(num_experts), *target.shape[1:])
            leaves.append(Leaf(leaf_key(path), target, rows))
            expected[leaf_key(path)] = _describe(shape, target.dtype)
        self._check_fits(step, expected)
        with self._validating(step):
            try:
                arrays = read_leaves(self._reader, self._steps.step(step) / "state", leaves)
            except (ValueError, OSError) as error:  # of TensorStore and Orbax, for damaged files
                reason = str(error).splitlines()[0]
                raise DamagedError(f"checkpoint {self._steps.step(step)} is damaged: {reason}") from error
        state = tree_unflatten(jax.tree.structure(abstract_state), arrays)
        self.verify(step, state, kept)
        return state

    def _check_fits(self, step: int, expected: Described) -> None:
        """Compares tree, shapes and dtypes with the stored ones."""
        stored: Described = self._read_header(step)["leaves"]
        wrong = [key for key in dict.fromkeys([*expected, *stored]) if stored.get(key) != expected.get(key)]
        if wrong:
            more = f" ({len(wrong) - 1} more leaves differ)" if len(wrong) > 1 else ""
            raise UserError(
                f"checkpoint {self._steps.step(step)} does not fit: {wrong[0]} is stored as"
                f" {stored.get(wrong[0], 'nothing')}, expected {expected.get(wrong[0], 'nothing')}{more}"
            )

    def _read_header(self, step: int) -> dict[str, Any]:
        with self._validating(step):
            return manifest.read_sealed(self._steps.step(step) / META_FILE)

    def _read_arrays(self, step: int, name: str) -> dict[str, np.ndarray]:
        path, digest = self._steps.step(step) / name, self._read_header(step)["sha256"][name]
        with self._validating(step):
            content = manifest.read_file(path, MAX_ARRAY, digest)
        return parse_arrays(io.BytesIO(content), str(path))  # it has its hash: of another version at worst, not damaged

    @contextlib.contextmanager
    def _validating(self, step: int) -> Iterator[None]:
        """What one process finds damaged is damaged for all."""
        try:
            with raise_on_all_processes(DamagedError):
                yield
        except DamagedError as error:
            error.step = step
            raise

    def _complete(self, step: int, files: dict[str, bytes], leaves: Described) -> None:
        """The end of a save, in a thread: nothing counts before all of it is on disk and every leaf opens."""
        self._orbax.wait_until_finished()
        if jax.process_index() != 0:
            return
        for key, stored in open_leaves(self._reader, self._steps.step(step, SAVING) / "state", leaves).items():
            found = _describe(stored.shape, stored.dtype.numpy_dtype)
            if found != leaves[key]:
                raise ValueError(f"{key} is stored as {found}, not as {leaves[key]}")
        for name, content in files.items():
            (self._steps.step(step, SAVING) / name).write_bytes(content)
        self._steps.complete(step)

    def _wait_patiently(self) -> bool:
        """Whether there is no failed save to wait for; reports a first one, raises a second one in a row."""
        try:
            self.wait()
        except SaveError as error:
            if self._failures >= FAILURES:
                raise
            self._report(str(error))
            return False
        return True

    def _require_shared(self) -> None:
        """`UserError` unless every process finds what process 0 puts here: Orbax would wait for it for ever."""
        marker = self.directory / f".{allgather_strings(uuid.uuid4().hex)[0]}"
        if jax.process_index() == 0:
            marker.touch()
        multihost_utils.sync_global_devices("marker")
        with raise_on_all_processes():
            if not marker.exists():
                raise UserError(f"{self.directory} must be on a file system that all processes share")
        if jax.process_index() == 0:
            marker.unlink()

    def _settle(self) -> None:
        if jax.process_index() == 0:
            self._steps.settle()
        multihost_utils.sync_global_devices("checkpoints settled")


def _of_first(find: Callable[[], Any]) -> Any:
    """What process 0 finds, as JSON makes it: a shared file system need not show every process the same at once."""
    return json.loads(allgather_strings(json.dumps(find() if jax.process_index() == 0 else None))[0])


def _not_orbax_chatter(record: logging.LogRecord) -> bool:
    """Drops the dozens of INFO lines Orbax writes about a save; its warnings and errors stay."""
    return record.levelno >= logging.WARNING or "orbax" not in Path(record.pathname).parts


def _chunked_axes(path: tuple, leaf: jax.Array) -> tuple[int, ...]:
    """Dimensions stored one index a chunk: layers, and the experts of matrices."""
    name = leaf_name(path)
    return (0,) if is_stacked(name, leaf.ndim) or (is_of_experts(name) and leaf.ndim > 2) else ()


def _to_npz(arrays: dict[str, np.ndarray]) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **arrays)
    return buffer.getvalue()


def _describe(shape: Sequence[int], dtype: Any) -> str:
    return f"{np.dtype(dtype)}{list(shape)}"
