"""One run of an experiment: a gin file of `experiments/configs/`, a seed, and the run it branches from.

A row that prunes equals its base run up to the prune: if a file there describes the same run without one, the row
starts from that run's checkpoint, so the common steps are trained once.
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from laep_jax.config import Config
from laep_jax.errors import UserError
from laep_jax.gin_config import load_config

FOLDER = Path(__file__).parent / "configs"


@dataclasses.dataclass(frozen=True)
class Row:
    """name: of the gin file. gin_files, bindings: what makes `config`, the seed among them."""

    name: str
    gin_files: tuple[Path, ...]
    bindings: tuple[str, ...]
    config: Config

    @property
    def seed(self) -> int:
        return self.config.train.seed

    @property
    def digest(self) -> str:
        """Of every setting that a result could depend on and that is not the default; eight hexadecimal digits.

        A setting that is added later, with a default that changes nothing, leaves the results that there are.
        """
        values, defaults = self.config.to_dict(), Config().to_dict()
        del values["data"]["cache_dir"], values["train"]["log_every"]
        chosen = {
            f"{part}.{name}": value
            for part, fields in values.items()
            for name, value in fields.items()
            if value != defaults[part][name]
        }
        return hashlib.sha256(json.dumps(chosen, sort_keys=True).encode()).hexdigest()[:8]

    @property
    def prunes(self) -> bool:
        return self.config.laep.max_prunes > 0

    def named(self, name: str) -> "Row":
        """Another row, with this one's seed, scale and settings."""
        return _load_row(name, self.gin_files[1:], self.bindings)

    def branches_from(self, other: "Row") -> bool:
        """Whether the other is this run without a prune."""
        parts = [field.name for field in dataclasses.fields(Config) if field.name != "laep"]
        same = all(getattr(self.config, part) == getattr(other.config, part) for part in parts)
        return same and self.prunes and not other.prunes


def names() -> list[str]:
    """Of every row there is."""
    return sorted(path.stem for path in FOLDER.glob("*.gin"))


def load_row(name: str, seed: int, scale: str = "", bindings: Sequence[str] = ()) -> Row:
    """A row. scale: a file of the folder `scales` that is read after the row's own; bindings: gin text, over both."""
    scales = (FOLDER / "scales" / f"{scale}.gin",) * bool(scale)
    return _load_row(name, scales, (*bindings, f"TrainConfig.seed = {seed}"))


@functools.cache
def _load_row(name: str, scales: tuple[Path, ...], bindings: tuple[str, ...]) -> Row:
    files = (FOLDER / f"{name}.gin", *scales)
    for file in files:
        if not file.is_file():
            known = ", ".join(path.stem for path in sorted(file.parent.glob("*.gin")))
            raise UserError(f"there is no {file.stem!r} in {file.parent}; there are {known}")
    return Row(name, files, bindings, load_config([str(file) for file in files], bindings))


def base_of(row: Row) -> Row | None:
    """The row that this one branches from, None where it is trained from the first step on."""
    return next((other for other in map(row.named, names()) if row.branches_from(other)), None)


def has_branches(row: Row) -> bool:
    """Whether there are rows that branch from this one."""
    return any(base_of(other) == row for other in map(row.named, names()))
