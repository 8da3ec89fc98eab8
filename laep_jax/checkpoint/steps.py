"""The steps in a directory of checkpoints: which of them count, what replaces what, what goes. Files only, one process.

Nothing is removed or replaced in place. A step is renamed first, so that after an interruption at any point it is
there as a whole or not at all, and `settle` ends what was begun.
"""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from laep_jax.checkpoint.lock import CHECKPOINTS
from laep_jax.checkpoint.manifest import DamagedError, bring_to_disk, check_files, sync, write_manifest
from laep_jax.errors import UserError
from laep_jax.tracking.run_log import METRICS_FILE

HAS_CHECKPOINTS = ".has_checkpoints"  # made beside the directory when the first step is complete
SAVING = ".saving"  # a step that is not complete yet
REPLACED = ".replaced"  # a step making way for a new save of the same step
TRASH = ".trash"  # a step being removed
DAMAGED = ".damaged"  # a step that does not validate, put aside


class StepDirectory:
    """A directory of complete steps, named by their numbers. keep: how many to keep."""

    def __init__(self, path: Path, *, keep: int):
        self.path = path
        self._keep = keep

    def step(self, step: int, suffix: str = "") -> Path:
        return self.path / f"{step}{suffix}"

    def complete(self, step: int) -> None:
        """Gives what lies under SAVING its manifest and, when all of it is on disk, the step's name."""
        part, path = self.step(step, SAVING), self.step(step)
        write_manifest(part)
        bring_to_disk(part)
        if path.exists():
            os.replace(path, self.step(step, REPLACED))
        os.replace(part, path)
        sync(self.path)
        (self.path.parent / HAS_CHECKPOINTS).touch()

    def found(self) -> list[int]:
        """Every step of which there is a directory, damaged or not."""
        return self._with_suffix("")

    def _with_suffix(self, suffix: str) -> list[int]:
        """The steps with a directory of such a name; names from outside are none of ours."""
        stems = [path.name.removesuffix(suffix) for path in self.path.glob(f"*{suffix}") if path.is_dir()]
        return sorted(int(stem) for stem in stems if stem.isdecimal() and str(int(stem)) == stem)

    def damage(self, step: int) -> str | None:
        """What is wrong with a step's files, as far as looking at them is cheap."""
        try:
            check_files(self.step(step))
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

    def put_aside(self, step: int) -> Path:
        """Renames a step so that it does not count any more; to what."""
        path = self.step(step, DAMAGED)
        while path.exists():
            path = path.with_name(path.name + "+")
        os.replace(self.step(step), path)
        sync(self.path)
        return path

    def only_damaged(self) -> bool:
        """Whether there were steps, and all are put aside."""
        return not self.found() and any(self.path.glob(f"*{DAMAGED}*"))

    def settle(self) -> None:
        """Ends every replacement, the right way round, and removes what failed."""
        for suffix in (TRASH, SAVING, SAVING + TRASH, REPLACED + TRASH, DAMAGED + TRASH):
            for step in self._with_suffix(suffix):
                shutil.rmtree(self.step(step, suffix))
        for step in self._with_suffix(REPLACED):
            path = self.step(step, REPLACED)
            if self.damage(step) is None:
                self._remove(path)
            else:
                self._remove(self.step(step))
                os.replace(path, self.step(step))

    def retain(self) -> None:
        """Removes what is no longer kept."""
        complete = [step for step in self.found() if self.damage(step) is None]
        for step in complete[: -self._keep]:
            self._remove(self.step(step))

    def _remove(self, path: Path) -> None:
        if path.exists():
            trash = path.with_name(path.name + TRASH)
            os.replace(path, trash)
            shutil.rmtree(trash)


def require_checkpoints(run_dir: Path) -> None:
    """`UserError` where a run left records but its checkpoints are gone: a new run would erase the records."""
    directory = run_dir / CHECKPOINTS
    names = [path.name for path in directory.iterdir()] if directory.is_dir() else []
    kept = any(name.isdecimal() or DAMAGED in name or name.endswith(REPLACED) for name in names)
    lost = not directory.is_dir() or ((run_dir / HAS_CHECKPOINTS).exists() and not kept)
    if lost and (run_dir / METRICS_FILE).exists():
        raise UserError(
            f"{run_dir} holds the records of a run, but its checkpoints are missing from {directory}: "
            "put them back, or use another workdir"
        )
