"""Weights & Biases and Trackio: the services of `TrainConfig.trackers`, each an extra.

They get the numbers that TensorBoard gets, by the same tags, and the settings as their config. RUN/trackers.json keeps
under which id a service has the run, so that a resumed run continues there, and the last step that it had then: what
a resumed run trains again is not logged there again.
"""

import importlib
import os
import re
import secrets
from collections.abc import Callable, Container, Sequence
from pathlib import Path
from typing import Any

from laep_jax.errors import UserError, require, require_type
from laep_jax.files import read_json
from laep_jax.tracking.tracker import identity, scalars

FILE = "trackers.json"
PROJECT = "laep_jax"
FINISH_SECONDS = 60  # until W&B may have sent the rest; `wandb sync` sends what is then left

Identities = dict[str, dict[str, Any]]  # of the run, by service: `id` and `step`


def require_services(names: Sequence[str]) -> None:
    """`UserError` naming the extra of a package that is missing."""
    for name in names:
        try:
            importlib.import_module(name)
        except ImportError as error:
            rule = f"needs the package {name}: pip install 'laep_jax[{name}]', or {name}"
            raise UserError(f"TrainConfig.trackers={name!r} {rule}") from error


def read_identities(run_dir: Path) -> Identities:
    """What trackers.json holds; `UserError` where it does not read."""
    path = run_dir / FILE
    if not path.exists():
        return {}
    known = read_json(path, str(path))
    require_type(str(path), known, dict[str, dict[str, str | int]])
    for kept in known.values():  # the id becomes part of a path
        valid = re.fullmatch("[0-9a-f]{8}", str(kept.get("id"))) and type(kept.get("step")) is int
        require(bool(valid), str(path), kept, "must hold an id of 8 hexadecimal digits and a step")
    return known


class Service:
    """A run at one service. A failure takes the service out of the run: one line, and training continues.

    id: of the run there. open_run: called at once; what it returns has `log(numbers, step=)` and `finish()`, as the
    runs of both services do. last_step: up to which the service has every record. logged: identities of further ones.
    """

    def __init__(
        self,
        name: str,
        id: str,
        open_run: Callable[[], Any],
        report: Callable[[str], None],
        *,
        last_step: int = 0,
        logged: Container[tuple] = (),
    ):
        self.name, self.id, self._report = name, id, report
        self._last_step, self._logged = last_step, logged
        self._run: Any = None
        self._attempt(lambda: setattr(self, "_run", open_run()))

    @property
    def is_open(self) -> bool:
        return self._run is not None

    def log(self, step: int, record: dict[str, Any]) -> None:
        """Logs the numbers of a record that the service does not have yet."""
        numbers = scalars(record)
        if self._run and numbers and step > self._last_step and identity(step, record) not in self._logged:
            self._attempt(lambda: self._run.log(numbers, step=step))

    def close(self) -> None:
        """Ends the run there, once everything is sent."""
        if self._run:
            self._attempt(self._run.finish)

    def _attempt(self, do: Callable[[], object]) -> None:
        try:
            do()
        except Exception as error:  # whatever a service raises
            self._run = None
            reason = next(iter(str(error).splitlines()), "") or type(error).__name__
            self._report(f"{self.name} fails: {reason}; the run continues without it")


def open_service(
    name: str,
    run_dir: Path,
    run_name: str,
    config: dict[str, Any],
    known: Identities,
    logged: Container[tuple],
    report: Callable[[str], None],
) -> Service:
    """The run at a service: the one that trackers.json names, or a new one, which gets every record from now on.

    run_name: shown there. config: the settings. known: what trackers.json holds. logged: the identities of the records
    that metrics.jsonl has had, and that a resumed run writes again.
    """
    kept = known.get(name)
    id = kept["id"] if kept else secrets.token_hex(4)
    return Service(
        name,
        id,
        lambda: _OPEN[name](run_dir, run_name, id, config),
        report,
        last_step=kept["step"] if kept else 0,
        logged=logged if kept else (),
    )


def _open_wandb(run_dir: Path, run_name: str, id: str, config: dict[str, Any]) -> Any:
    wandb = importlib.import_module("wandb")
    return wandb.init(
        project=os.environ.get("WANDB_PROJECT", PROJECT),
        name=run_name,
        id=id,
        dir=run_dir,
        config=config,
        resume="allow",
        # A run directory holds no links; the progress line, which is redrawn in place, stays out of W&B's logs.
        settings=wandb.Settings(symlink=False, console="off", quiet=True, finish_timeout=FINISH_SECONDS),
    )


def _open_trackio(run_dir: Path, run_name: str, id: str, config: dict[str, Any]) -> Any:
    """A run there is known by its name, in the folder that Trackio has for all runs, or in a Space."""
    trackio = importlib.import_module("trackio")
    return trackio.init(project=PROJECT, name=f"{run_name}-{id}", config=config, resume="allow", embed=False)


_OPEN = {"wandb": _open_wandb, "trackio": _open_trackio}
