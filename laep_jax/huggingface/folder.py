"""A Hugging Face folder as the parameters of a model, read tensor by tensor into their shardings.

Files are mapped into memory, so a process reads what its devices hold and keeps one shard of one parameter at a time.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import tree_map_with_path

from laep_jax.config import Config, ModelConfig
from laep_jax.errors import UserError, require, short
from laep_jax.files import read_json
from laep_jax.huggingface.architectures import ARCHITECTURES, ERNIE, model_settings
from laep_jax.huggingface.places import BIAS, Place, places
from laep_jax.importers.families import NEVER
from laep_jax.importers.safetensors_file import Tensor, read_shards, read_tensors
from laep_jax.state.surgery import leaf_key

DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(jnp.bfloat16)}
BUFFERS = ("rotary_emb.inv_freq",)  # that older versions wrote
Box = Sequence[tuple[int, int]]  # [start, stop) of each dimension


class Folder:
    """config.json and the weights of one. `UserError` where it is not there, or not one of ARCHITECTURES.

    settings: `ModelConfig` fields. tokenizer: of `DataConfig.tokenizer`, though it may not be there.
    """

    def __init__(self, path: Path):
        self.where = str(path)
        self._config = read_json(path / "config.json", str(path / "config.json"))
        self.settings = model_settings(self._config, self.where)
        self.kind = self._config["model_type"]
        self._tensors = {
            name: tensor
            for file, header in read_shards(path).items()
            for name, tensor in read_tensors(path / file, header).items()
        }
        for name, tensor in self._tensors.items():
            field, rule = f"{self.where}: {name}", f"must be one of {', '.join(DTYPES)}"
            require(tensor.dtype in DTYPES, field, tensor.dtype, rule)
            size = math.prod(tensor.shape) * DTYPES[tensor.dtype].itemsize
            require(tensor.data.size == size, field, tensor.data.size, f"must have {size} bytes")
        if self.kind == ERNIE:
            self.settings["num_experts"] = self._that_can_be_chosen()
        self.tokenizer, self.description = str(path / "tokenizer.json"), f"{self.where} ({self.kind})"

    def require_fits(self, config: Config) -> None:
        """`UserError` naming a tensor that is missing, of another shape, or that no parameter takes."""
        wanted = {place.name: place for place in self._places(config.model)}
        for name, place in wanted.items():
            require(name in self._tensors, self.where, name, "is not among its tensors")
            tensor = self._tensors[name]
            require(
                tensor.shape == place.shape, f"{self.where}: {name}", tensor.shape, f"must have shape {place.shape}"
            )
        known = {*wanted, *(["lm_head.weight"] if config.model.tie_embeddings else [])}
        extra = [name for name in self._tensors if name not in known and not name.endswith(BUFFERS)]
        if extra:
            raise UserError(f"{self.where} has tensors that are no parameters of this model: {short(extra)}")

    def read(self, model: ModelConfig, abstract) -> Any:
        """Arrays like `abstract`, a tree of `jax.ShapeDtypeStruct` with shardings, of "params" and "router_bias"."""
        by_leaf: dict[str, list[Place]] = {}
        for place in self._places(model):
            by_leaf.setdefault(place.leaf or "", []).append(place)

        def read_leaf(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.Array:
            of_leaf, is_bias = by_leaf.get(leaf_key(path), []), leaf_key(path) == BIAS
            assert leaf.sharding is not None
            assert of_leaf or is_bias, f"no tensor of {self.where} is {leaf_key(path)}"
            return jax.make_array_from_callback(
                leaf.shape, leaf.sharding, lambda index: self._shard(of_leaf, leaf, index or ())
            )

        return tree_map_with_path(read_leaf, abstract)

    def _places(self, model: ModelConfig) -> list[Place]:
        return list(places(model, self.kind, has_bias=bool(self._config.get("router_bias"))))

    def _shard(self, of_leaf: Sequence[Place], leaf: jax.ShapeDtypeStruct, index: tuple[slice, ...]) -> np.ndarray:
        """What a device holds of a leaf; zeros where no tensor is, as of a bias that this model does not have."""
        wanted = [part.indices(size)[:2] for part, size in zip(index, leaf.shape, strict=True)]
        shard = np.zeros([stop - start for start, stop in wanted], leaf.dtype)
        for place in of_leaf:
            box = _box(place, leaf.shape)
            both = [(max(a, c), min(b, d)) for (a, b), (c, d) in zip(box, wanted, strict=True)]
            if all(start < stop for start, stop in both):
                tensor = place.back(_numbers(self._tensors[place.name]))
                tensor = tensor[None] if isinstance(place.rows, int) else tensor
                shard[_relative(both, wanted)] = tensor[_relative(both, box)]
        return shard

    def _that_can_be_chosen(self) -> tuple[int, ...]:
        """Of ERNIE's experts in each layer; the others, with a bias of `NEVER`, fill it at its end."""
        of, counts = ARCHITECTURES[self.kind], []
        for layer in range(self.settings["num_layers"]):
            name = f"model.layers.{layer}.{of.bias}"
            require(name in self._tensors, self.where, name, "is not among its tensors")
            never = _numbers(self._tensors[name]).reshape(-1) <= NEVER
            counts.append(int(np.sum(~never)))
            require(not never[: counts[-1]].any(), f"{self.where}: {name}", NEVER, "is not at the end only")
        return tuple(counts)


def _box(place: Place, shape: tuple[int, ...]) -> Box:
    """What a tensor is of a leaf."""
    box = [(0, size) for size in shape]
    if isinstance(place.rows, int):
        box[0] = (place.rows, place.rows + 1)
    elif place.rows is not None:
        box[0] = (place.rows.start, place.rows.stop)
    if place.columns is not None:
        box[-1] = (place.columns.start, place.columns.stop)
    return box


def _relative(inner: Box, outer: Box) -> tuple[slice, ...]:
    return tuple(slice(a - c, b - c) for (a, b), (c, _) in zip(inner, outer, strict=True))


def _numbers(tensor: Tensor) -> np.ndarray:
    return tensor.data.view(DTYPES[tensor.dtype]).reshape(tensor.shape)
