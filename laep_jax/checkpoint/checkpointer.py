"""Checkpoints of one run: steps that are there as a whole, durable and as they were saved, or do not count.

`steps` says how a step is made to count, on disk and in a bucket. In its folder are:
`state`: every leaf of the training state under its dotted path, written by Orbax (`arrays`).
`history.npz`: small arrays of numbers. `fingerprints.npz`: of the state, made on the devices when it was saved.
`meta.json`: what the run says of itself, the leaves, the number of experts of each layer, and the hashes of both .npz
files; it has its own.

A save goes on in the background: Orbax writes the state, process 0 the rest and at the end the manifest. What is read
is compared with the hashes and the fingerprints; Orbax has none.
"""

import contextlib
import hashlib
import io
import json
import logging
import os
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.tree_util import tree_flatten_with_path, tree_unflatten

from laep_jax.checkpoint import manifest
from laep_jax.checkpoint.arrays import (
    Leaf,
    describe,
    describe_leaves,
    items_to_save,
    make_reader,
    make_writer,
    open_leaves,
    read_leaves,
    unreadable,
)
from laep_jax.checkpoint.lock import TakenOverError
from laep_jax.checkpoint.manifest import DamagedError
from laep_jax.checkpoint.steps import DAMAGED, Steps, draw_folder
from laep_jax.distributed import allgather_strings, is_local_error, raise_on_all_processes
from laep_jax.errors import FAILED, UnavailableError, UserError
from laep_jax.files import MAX_ARRAY, parse_arrays, to_npz
from laep_jax.sharding import is_of_experts, leaf_name
from laep_jax.state import fingerprint
from laep_jax.state.surgery import Kept, kept_rows, leaf_key
from laep_jax.storage import open_storage

META_FILE, HISTORY_FILE, FINGERPRINTS_FILE = "meta.json", "history.npz", "fingerprints.npz"
SLOW = 60  # seconds of waiting for a save after which that is reported
FAILURES = 2  # failed saves in a row that end the run
Described = dict[str, str]  # dtype and shape by leaf key

log = logging.getLogger(__name__)


class SaveError(UserError):
    """A checkpoint could not be saved: on every process, whichever it went wrong on."""

    exit_code = FAILED


class Checkpoints:
    """The checkpoints of one run; a context manager that waits for the save in progress on any exit.

    Only one of several processes that leaves alone, by an error of its own, does not wait: the others
    do not come.

    directory: a folder, or the address of one in a bucket. keep: complete steps to keep, at least 1. report: shows a
    line of text on what went wrong and was dealt with. publish: called on process 0, in a thread, before a step counts;
    what it raises makes the save fail, and `TakenOverError` ends the run. Every process of a run makes one and calls
    the same methods in the same order.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        keep: int,
        report: Callable[[str], None] = log.warning,
        publish: Callable[[], None] = lambda: None,
    ):
        assert keep >= 1, keep
        self._storage = open_storage(directory)
        self.directory = self._storage.root
        self._steps = Steps(self._storage, keep=keep)
        self._report, self._publish = report, publish
        self._orbax, self._reader = make_writer(), make_reader()
        self._thread = futures.ThreadPoolExecutor(1, "completing a checkpoint")
        self._saving: tuple[int, str, futures.Future[None]] | None = None
        self._saved = fingerprint.Fingerprinted({}, ())
        self._failures = 0
        self._require_shared()

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

    def settle(self) -> None:
        """Removes what interrupted saves have left; for a run that is going to train."""
        _of_first(lambda: (self._publish(), self._steps.settle()))

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
        files = {HISTORY_FILE: to_npz(history), FINGERPRINTS_FILE: to_npz(fingerprint.to_arrays(of_state))}
        header = {
            "meta": json.loads(json.dumps(meta)),  # as it will be read
            "leaves": describe_leaves(state),
            "num_experts": list(num_experts),
            "sha256": {name: hashlib.sha256(content).hexdigest() for name, content in files.items()},
        }
        files[META_FILE] = manifest.sealed(header).encode()
        self._saved = fingerprint.Fingerprinted(of_state, num_experts)
        rest = items_to_save(state), files, header["leaves"]
        self._start(step, *rest)
        while now and not self._wait_patiently():
            self._start(step, *rest)

    def _start(self, step: int, items: ocp.args.PyTreeSave, files: dict[str, bytes], described: Described) -> None:
        folder = allgather_strings(draw_folder())[0]
        try:
            self._orbax.save(self._storage.path(f"{step}/{folder}/state"), args=items)
            future = self._thread.submit(self._complete, step, folder, files, described)
        except Exception as error:  # a disk may be full already here
            future = futures.Future()
            future.set_exception(error)
        self._saving = step, folder, future

    def wait(self) -> None:
        """Returns when the save in progress is complete and durable; `SaveError` where it failed, on all processes."""
        if self._saving is None:
            return
        (step, folder, future), self._saving = self._saving, None
        if not futures.wait([future], timeout=SLOW).done:
            self._report(f"checkpoint {self._storage.path(str(step))} is still being saved; the run waits for it")
        error = future.exception()
        texts = allgather_strings(f"{type(error).__name__}: {error}".splitlines()[0] if error else "")
        failures = [text for text in texts if text]
        self._failures = self._failures + 1 if failures else 0
        if not failures:
            return
        with contextlib.suppress(Exception):  # what else went wrong it would say of the next save
            self._orbax.close()
        self._orbax = make_writer()
        kind, _, reason = failures[0].partition(": ")
        if kind == TakenOverError.__name__:
            raise TakenOverError(reason)
        if jax.process_index() == 0 and kind != UnavailableError.__name__:  # its manifest might arrive still
            with contextlib.suppress(UnavailableError, OSError):  # then the next start does it
                self._steps.discard(step, folder)
        raise SaveError(f"checkpoint {self._storage.path(str(step))} could not be saved: {failures[0]}")

    def newest_valid(self) -> int | None:
        """The newest complete step as process 0 finds it, None without one; newer ones that do not count are put aside.

        A step counts when its files are as its manifest says; what is in the large ones only reading them shows.
        `UserError` where none remains of those there were: that is no reason to train from the beginning.
        """
        step = _of_first(lambda: self._steps.latest(self._put_aside))
        if step is None and _of_first(self._steps.only_damaged):
            raise UserError(
                f"no checkpoint in {self.directory} validates; the manifests of those there were are now"
                f" {DAMAGED}: repair one and give its manifest its name back, or use another workdir"
            )
        return step

    def put_aside(self, error: DamagedError) -> None:
        """Lets the step that was found damaged not count, where it still does; later ones stay."""
        assert error.step is not None
        step, damage = error.step, str(error)
        _of_first(lambda: self._put_aside(step, damage) if step in self._steps.found() else None)

    def _put_aside(self, step: int, damage: str) -> None:
        self._publish()
        self._steps.put_aside(step)
        self._report(f"{damage}; step {step} is put aside ({DAMAGED}), and the run resumes from an older one")

    def read_meta(self, step: int) -> dict[str, Any]:
        """What the run said of itself; `DamagedError` where the step is missing or does not read."""
        return self._open(step)[1]["meta"]

    def read_history(self, step: int) -> dict[str, np.ndarray]:
        """`DamagedError` where it is not what was saved."""
        return self._read_arrays(step, *self._open(step), HISTORY_FILE)

    def restore(self, step: int, abstract_state):
        """The state of a step, with the tree and the shardings of `abstract_state`, on any mesh.

        abstract_state: a tree of `jax.ShapeDtypeStruct` with shardings. `UserError` naming the leaf where tree, shapes
        or dtypes differ from what is stored; `DamagedError` where the values are not those that were saved.
        """
        return self._restore(step, abstract_state, None)

    def restore_pruned(self, step: int, abstract_state, kept: Kept):
        """The state of a step, pruned by a plan, read no further than it survives.

        abstract_state: of the pruned model. kept: per layer the old experts in new order. Equal to `restore` followed
        by `surgery.prune_state`, and checked as there. Errors as in `restore`; `UserError` also where `kept` does not
        fit the model as it was saved.
        """
        return self._restore(step, abstract_state, kept)

    def verify(self, step: int, state, kept: Kept | None = None) -> None:
        """`DamagedError`, naming leaf, layer and expert, unless `state` is what was saved. kept: what a plan keeps."""
        folder, header = self._open(step)
        want = fingerprint.from_arrays(self._read_arrays(step, folder, header, FINGERPRINTS_FILE))
        place = fingerprint.Fingerprinted(want, header["num_experts"]).first_difference(state, kept)
        if place:
            with self._validating(step):
                raise DamagedError(f"checkpoint {self._storage.path(folder)} is damaged: {place} is not what was saved")

    def verify_pruned(self, state, kept: Kept) -> None:
        """`RuntimeError` unless `state` is what `save` was last given, pruned in memory; it may not be on disk yet."""
        place = self._saved.first_difference(state, kept)
        if place:
            raise RuntimeError(f"the state was not pruned as planned: {place} is not what it was")

    def _restore(self, step: int, abstract_state, kept: Kept | None):
        folder, header = self._open(step)
        num_experts = header["num_experts"]
        rows_N = None if kept is None else kept_rows(num_experts, kept)
        leaves, expected = [], Described()
        for path, target in tree_flatten_with_path(abstract_state)[0]:
            rows = rows_N if is_of_experts(leaf_name(path)) else None
            shape = target.shape if rows is None else (sum(num_experts), *target.shape[1:])
            leaves.append(Leaf(leaf_key(path), target, rows))
            expected[leaf_key(path)] = describe(shape, target.dtype)
        self._check_fits(step, expected, header["leaves"])
        where = self._storage.path(f"{folder}/state")
        with self._validating(step):
            try:
                arrays = read_leaves(self._reader, where, leaves)
            except Exception as error:
                raise unreadable(where, error) from error
        state = tree_unflatten(jax.tree.structure(abstract_state), arrays)
        self.verify(step, state, kept)
        return state

    def _check_fits(self, step: int, expected: Described, stored: Described) -> None:
        """Compares tree, shapes and dtypes with the stored ones."""
        wrong = [key for key in dict.fromkeys([*expected, *stored]) if stored.get(key) != expected.get(key)]
        if wrong:
            more = f" ({len(wrong) - 1} more leaves differ)" if len(wrong) > 1 else ""
            raise UserError(
                f"checkpoint {self._storage.path(str(step))} does not fit: {wrong[0]} is stored as"
                f" {stored.get(wrong[0], 'nothing')}, expected {expected.get(wrong[0], 'nothing')}{more}"
            )

    def _open(self, step: int) -> tuple[str, dict[str, Any]]:
        """The folder of a step, the same on every process, and what meta.json says."""
        try:
            folder = f"{step}/{_of_first(lambda: self._steps.folder(step))}"
        except DamagedError as error:
            error.step = step
            raise
        with self._validating(step):
            return folder, manifest.read_sealed(self._storage, f"{folder}/{META_FILE}")

    def _read_arrays(self, step: int, folder: str, header: dict[str, Any], name: str) -> dict[str, np.ndarray]:
        with self._validating(step):
            content = manifest.read_file(self._storage, f"{folder}/{name}", MAX_ARRAY, header["sha256"][name])
        # it has its hash: of another version at worst, not damaged
        return parse_arrays(io.BytesIO(content), self._storage.path(f"{folder}/{name}"))

    @contextlib.contextmanager
    def _validating(self, step: int) -> Iterator[None]:
        """What one process finds damaged is damaged for all."""
        try:
            with raise_on_all_processes(DamagedError, UnavailableError):
                yield
        except DamagedError as error:
            error.step = step
            raise

    def _complete(self, step: int, folder: str, files: dict[str, bytes], leaves: Described) -> None:
        """The end of a save, in a thread: nothing counts before all of it is there and every leaf opens."""
        self._orbax.wait_until_finished()
        if jax.process_index() != 0:
            return
        where = f"{step}/{folder}"
        for key, stored in open_leaves(self._reader, self._storage.path(f"{where}/state"), leaves).items():
            found = describe(stored.shape, stored.dtype.numpy_dtype)
            if found != leaves[key]:
                raise ValueError(f"{key} is stored as {found}, not as {leaves[key]}")
        for name, content in files.items():
            self._storage.write(f"{where}/{name}", content)
        self._steps.complete(step, folder, [*files, "state/manifest.ocdbt"], self._publish)

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
        marker = f".{allgather_strings(uuid.uuid4().hex)[0]}"
        _of_first(lambda: self._storage.write(marker, b""))
        with raise_on_all_processes():
            if marker not in self._storage.entries():
                raise UserError(f"{self.directory} must be on a file system that all processes share")
        _of_first(lambda: self._storage.remove(marker))


def _of_first(find: Callable[[], Any]) -> Any:
    """What process 0 finds, as JSON makes it: a shared file system need not show every process the same at once."""
    with raise_on_all_processes(DamagedError, UnavailableError, UserError):
        found = find() if jax.process_index() == 0 else None
    return json.loads(allgather_strings(json.dumps(found))[0])
