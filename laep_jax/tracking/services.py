"""Weights & Biases and Trackio: the services of `TrainConfig.trackers`, each an extra.

They get the numbers that TensorBoard gets, by the same tags, and the settings as their config. RUN/trackers.json keeps
the id that the run has at each, so that a resumed run continues there.
"""

import importlib
import os
import re
import secrets
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from laep_jax.errors import UserError, require
from laep_jax.files import read_json
from laep_jax.tracking.tracker import scalars

FILE = "trackers.json"
PROJECT = "laep_jax"
LOGIN_SECONDS = 60  # for a person who is asked for a key
FINISH_SECONDS = 60  # until W&B must have sent the rest; later `wandb sync` sends it


def require_services(names: Sequence[str]) -> None:
    """`UserError` naming the extra of a package that is missing."""
    for name in names:
        try:
            importlib.import_module(name)
        except ImportError as error:
            rule = f"needs the package {name}: pip install 'laep_jax[{name}]', or {name}"
            raise UserError(f"TrainConfig.trackers={name!r} {rule}") from error
        except Exception as error:  # as of a protobuf that does not fit
            rule = f"does not import: {type(error).__name__}: {error}"
            raise UserError(f"TrainConfig.trackers={name!r} {rule}") from error


def new_id() -> str:
    return secrets.token_hex(4)


def read_ids(path: Path) -> dict[str, str]:
    """The ids in a trackers.json, by service; none without the file. `UserError` where it does not read."""
    ids = read_json(path, str(path)) if path.exists() else {}
    for name, id in ids.items():  # which becomes part of a path
        valid = isinstance(id, str) and re.fullmatch("[0-9a-f]{8}", id)
        require(bool(valid), f"{name} in {path}", id, "must be 8 hexadecimal digits")
    return ids


class Service:
    """A run at one service. A failure takes the service out of the run: one line, and training continues.

    open_run: called at once; returns a run with `log(numbers, step=)` and `finish()`, as those of both services are,
    and the first step that is to be logged to it: what a resumed run does again is there already.
    """

    def __init__(self, name: str, open_run: Callable[[], tuple[Any, int]], report: Callable[[str], None]):
        self._name, self._report = name, report
        self._run, self._first_step = None, 0
        self._attempt(lambda: self._open(open_run))

    def log(self, step: int, record: dict[str, Any]) -> None:
        """Logs the numbers of a record, unless the service has its step."""
        numbers = scalars(record)
        if numbers and step >= self._first_step:
            self._attempt(lambda: self._run and self._run.log(numbers, step=step))

    def close(self) -> None:
        """Ends the run there, once everything is sent."""
        self._attempt(lambda: self._run and self._run.finish())

    def _open(self, open_run: Callable[[], tuple[Any, int]]) -> None:
        self._run, self._first_step = open_run()

    def _attempt(self, do: Callable[[], object]) -> None:
        try:
            do()
        except Exception as error:  # whatever a service raises
            self._run = None
            reason = next(iter(str(error).splitlines()), "") or type(error).__name__
            self._report(f"{self._name} fails: {reason}; the run continues without it")


def open_service(
    name: str, run_dir: Path, run_name: str, id: str, config: dict[str, Any], report: Callable[[str], None]
) -> Service:
    """The run `id` at a service, new or continued. run_name: shown there. config: the settings."""
    return Service(name, lambda: _OPEN[name](run_dir, run_name, id, config), report)


def _open_wandb(run_dir: Path, run_name: str, id: str, config: dict[str, Any]) -> tuple[Any, int]:
    """W&B takes a step once, and knows the next one; offline every start has a file of its own, with all its steps."""
    os.environ.setdefault("WANDB_LOGIN_TIMEOUT", str(LOGIN_SECONDS))
    wandb = importlib.import_module("wandb")
    run = wandb.init(
        project=None if os.environ.get("WANDB_PROJECT") else PROJECT,
        name=run_name,
        id=id,
        dir=run_dir,
        config=config,
        resume="allow",
        # A run directory holds no links; the progress line, which is redrawn in place, stays out of W&B's logs.
        settings=wandb.Settings(symlink=False, console="off", quiet=True, finish_timeout=FINISH_SECONDS),
    )
    return run, run.step


def _open_trackio(run_dir: Path, run_name: str, id: str, config: dict[str, Any]) -> tuple[Any, int]:
    """Trackio keeps all runs in one folder or Space, by name. Its last step may lack records, so it is logged again."""
    trackio = importlib.import_module("trackio")
    run = trackio.init(project=PROJECT, name=f"{run_name}-{id}", config=config, resume="allow", embed=False)
    return run, run._next_step - 1  # there is no public name for it


_OPEN = {"wandb": _open_wandb, "trackio": _open_trackio}
