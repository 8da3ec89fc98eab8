"""Parameters that a new run begins with instead of random ones: of another run, or of a Hugging Face folder.

Everything else begins anew: step, optimizer moments, schedule, data, loads.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from laep_jax.checkpoint.lock import CHECKPOINTS
from laep_jax.checkpoint.manifest import DamagedError
from laep_jax.checkpoint.saved import Saved, peek
from laep_jax.config import Config, ModelConfig
from laep_jax.errors import UserError, require
from laep_jax.fields import settings_of
from laep_jax.files import read_json
from laep_jax.huggingface.folder import Folder
from laep_jax.paths import is_bucket, require_path
from laep_jax.sharding import Mesh
from laep_jax.state.tree import TrainState, abstract_state, state_of
from laep_jax.storage import open_storage

NAME = "--init-from"
ARCHITECTURE = tuple(  # fields that parameters have the shape and the meaning of
    name for name, setting in settings_of(ModelConfig).items() if setting.fixed and name not in ("router_init", "dtype")
)


class Source(Protocol):
    """settings: the fields of ARCHITECTURE. tokenizer: of `DataConfig.tokenizer`, where it should be.

    description: where the parameters are, and what they are of.
    """

    settings: dict[str, Any]
    tokenizer: str
    description: str

    def require_fits(self, config: Config) -> None:
        """`UserError` where the parameters are not those of such a model, or the tokenizer is not theirs any more."""

    def read(self, model: ModelConfig, abstract: dict) -> Any:
        """The "params" and "router_bias", like `abstract`. Every process must call it."""


class _Run:
    """A checkpoint of another run."""

    def __init__(self, run_or_checkpoint: str):
        with _refusing_damage():
            self._saved = Saved(run_or_checkpoint)
        self.settings = _architecture(self._saved.config.model)
        self.tokenizer = self._saved.config.data.tokenizer
        self.description = f"step {self._saved.step} of {self._saved.run}"

    def require_fits(self, config: Config) -> None:
        if config.data.tokenizer == self.tokenizer:
            self._saved.tokenizer(None)

    def read(self, model: ModelConfig, abstract: dict) -> Any:
        with _refusing_damage():
            return self._saved.restore(abstract)


@contextlib.contextmanager
def _refusing_damage() -> Iterator[None]:
    """A `DamagedError` would put a step of the new run aside."""
    try:
        yield
    except DamagedError as error:
        raise UserError(str(error)) from error


def _architecture(model: ModelConfig) -> dict[str, Any]:
    return {name: getattr(model, name) for name in ARCHITECTURE}


def open_source(init_from: str) -> Source:
    """A run, by its directory, address or checkpoint, or a Hugging Face folder. `UserError` where it is neither."""
    require_path(NAME, init_from, bucket=True)
    path = Path(init_from)
    if not is_bucket(init_from):
        require(path.is_dir(), NAME, init_from, "is no folder; a model of the hub has to be downloaded first")
        config = path / "config.json"
        if config.exists() and "model_type" in read_json(config, str(config)):
            return Folder(path)
        is_run = (path / CHECKPOINTS).is_dir() or path.parent.name == CHECKPOINTS
        require(is_run, NAME, init_from, "is neither a run nor a Hugging Face folder, which has a config.json")
    return _Run(init_from)


def defaults(init_from: str, run_dir: str) -> dict[str, dict[str, Any]]:
    """The settings by class that a run takes over where it has none of its own; of a run that is resumed, its own."""
    try:
        _, meta, _ = peek(open_storage(run_dir))
    except DamagedError:  # which only a start puts aside
        meta = None
    if meta:
        config = Config.from_dict(meta["config"])
        return {"ModelConfig": _architecture(config.model), "DataConfig": {"tokenizer": config.data.tokenizer}}
    source = open_source(init_from)
    return {"ModelConfig": source.settings, "DataConfig": {"tokenizer": source.tokenizer}}


def require_same_model(source: Source, config: Config) -> None:
    """`UserError` naming the first setting or tensor that does not fit."""
    theirs = ModelConfig(**source.settings)
    for name in ARCHITECTURE:
        want, value = getattr(theirs, name), getattr(config.model, name)
        require(value == want, f"ModelConfig.{name}", value, f"is not the {want} of {source.description}")
    source.require_fits(config)


def read_state(source: Source, config: Config, mesh: Mesh) -> TrainState:
    """A state at step 0 with the parameters and the router's bias of a source."""
    abstract = abstract_state(config, mesh)
    read = source.read(config.model, {"params": abstract.params, "router_bias": abstract.router_bias})
    return state_of(read["params"], read["router_bias"], config, mesh)
