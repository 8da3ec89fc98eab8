"""The steps in a folder of checkpoints: which of them count, and what goes. Files only, for one process.

    STEP/manifest.json   names the folder and everything in it; written last, it makes the step count
    STEP/FOLDER/         written once, under a name that is drawn for each save, and never renamed
    STEP/damaged.json    the manifest of a step that did not validate, put aside

A step is saved again into another folder; its manifest is then replaced, and the old folder removed. So an interruption
at any point leaves each step as a whole, old or new, or not there; folders that no manifest names are removed by the
next start.
"""

import re
import uuid
from collections.abc import Callable, Iterable

from laep_jax.checkpoint.lock import CHECKPOINTS, LOCK_FILE
from laep_jax.checkpoint.manifest import FOLDER, DamagedError, check_files, make_manifest, read_manifest
from laep_jax.errors import UnavailableError, UserError
from laep_jax.storage import Storage

HAS_CHECKPOINTS = ".has_checkpoints"  # made beside the folder when the first step is complete
MANIFEST, DAMAGED = "manifest.json", "damaged.json"


def draw_folder() -> str:
    """A name that no other save has."""
    return uuid.uuid4().hex[:8]


class Steps:
    """The steps in a folder, by their numbers. keep: how many complete ones to keep."""

    def __init__(self, storage: Storage, *, keep: int):
        self._storage, self._keep = storage, keep

    def complete(self, step: int, folder: str, names: Iterable[str], publish: Callable[[], None]) -> None:
        """Makes a step count, with what is in a folder of it; removes the one it had, and steps that are not kept.

        names: files that must be there. publish: called before and after; it raises where the run is another's, which
        may have removed the folder, and whose steps must stay.
        """
        self._storage.sync(f"{step}/{folder}")
        manifest = make_manifest(self._storage, str(step), folder, names)
        publish()
        self._storage.write(f"{step}/{MANIFEST}", manifest.encode())
        self._storage.parent().write(HAS_CHECKPOINTS, b"")
        publish()
        if damage := self.damage(step):
            raise DamagedError(damage)
        self._remove_unnamed(step)
        complete = [other for other in self.found() if self.damage(other) is None]
        for other in complete[: -self._keep]:
            self._storage.remove(f"{other}/{MANIFEST}")
            self._remove_unnamed(other)

    def discard(self, step: int, folder: str) -> None:
        """Removes a folder of a save that failed, unless it counts nevertheless."""
        try:
            counts = self.folder(step) == folder
        except DamagedError:
            counts = False
        if not counts:
            self._storage.remove(f"{step}/{folder}")

    def folder(self, step: int) -> str:
        """Where the files of a step are; `DamagedError` where its manifest does not read."""
        return read_manifest(self._storage, f"{step}/{MANIFEST}")[0]

    def found(self) -> list[int]:
        """Every step that counts or is damaged."""
        return sorted(step for step in self._numbers() if self._has(step, MANIFEST))

    def damage(self, step: int) -> str | None:
        """What is wrong with a step's files, as far as looking at them is cheap."""
        try:
            check_files(self._storage, str(step), MANIFEST)
        except DamagedError as error:
            return str(error)
        return None

    def latest(self, passed_over: Callable[[int, str], object]) -> int | None:
        """The newest step whose files are as its manifest says; `passed_over(step, damage)` is told of later ones."""
        for step in reversed(self.found()):
            damage = self.damage(step)
            if damage is None:
                return step
            passed_over(step, damage)
        return None

    def put_aside(self, step: int) -> None:
        """Renames the manifest of a step so that it does not count any more; everything else stays."""
        self._storage.move(f"{step}/{MANIFEST}", f"{step}/{DAMAGED}")

    def only_damaged(self) -> bool:
        """Whether there were steps, and all are put aside."""
        return not self.found() and any(self._has(step, DAMAGED) for step in self._numbers())

    def settle(self) -> None:
        """Removes what interrupted saves and removals have left."""
        for step in self._numbers():
            self._remove_unnamed(step)

    def _remove_unnamed(self, step: int) -> None:
        """Removes the folders of a step that neither its manifest names nor one that was put aside.

        None where such a file does not read: a person may want to look.
        """
        entries = self._storage.entries(str(step))
        try:
            named = [
                read_manifest(self._storage, f"{step}/{name}")[0] for name in {MANIFEST, DAMAGED}.intersection(entries)
            ]
        except UnavailableError:
            raise
        except UserError:
            return
        for folder in entries:
            if folder not in named and re.fullmatch(FOLDER, folder):
                self._storage.remove(f"{step}/{folder}")

    def _has(self, step: int, name: str) -> bool:
        return name in self._storage.entries(str(step))

    def _numbers(self) -> list[int]:
        """The folders with the name of a step; other names are from outside."""
        return [int(name) for name in self._storage.entries() if name.isdecimal() and str(int(name)) == name]


def require_own(run: Storage, names: Iterable[str]) -> None:
    """`UserError` where one of the files and folders that a run replaces, `names`, is there, and no run has been.

    A Hugging Face folder, for instance, has a config.json too, and other trainers have their metrics and checkpoints.
    """
    there = run.entries()
    found = [name for name in names if name in there]
    if found and not {LOCK_FILE, HAS_CHECKPOINTS} & {*there} and not _has_steps(run):
        raise UserError(f"{run.root} holds {found[0]}, but no run that wrote it; use another workdir")


def require_checkpoints(run: Storage, has_records: bool) -> None:
    """`UserError` where a run left records but its checkpoints are gone: a new run would erase the records."""
    if has_records and HAS_CHECKPOINTS in run.entries() and not _has_steps(run):
        raise UserError(
            f"{run.root} holds the records of a run, but its checkpoints are missing from {run.path(CHECKPOINTS)}: "
            "put them back, or use another workdir"
        )


def _has_steps(run: Storage) -> bool:
    """Whether a step was ever complete, be it damaged now."""
    names = [(step, name) for step in run.entries(CHECKPOINTS) for name in run.entries(f"{CHECKPOINTS}/{step}")]
    return any(step.isdecimal() and name in (MANIFEST, DAMAGED) for step, name in names)
