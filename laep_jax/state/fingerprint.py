"""Fingerprints of a training state: two 32-bit sums for every layer and expert of a leaf, made on its devices.

Every word of an array is mixed with its place, and the results are added modulo 2**32: a change of one word always
changes both sums, any other change all but never leaves both as they are. Sums of integers are the same in every order,
so a fingerprint is the same on every mesh. The place counts within the slice that the fingerprint is of (an expert's or
a layer's), so a prune moves fingerprints as it moves experts: fingerprint(x[rows]) == fingerprint(x)[rows].

Axes: N experts of all layers, S the two sums.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.tree_util import tree_flatten_with_path

from laep_jax.sharding import Mesh, is_of_experts, is_stacked, leaf_name, replicated
from laep_jax.state.surgery import Kept, kept_rows, leaf_key

WORDS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}  # by bytes of a dtype
Fingerprints = dict[str, np.ndarray]  # uint32 by leaf: [layers, S], [N, S], or [S] of one that has neither


def fingerprints(state) -> Fingerprints:
    """Of every leaf of a state, layer by layer and expert by expert. Every process must call it."""
    paths, leaves = zip(*tree_flatten_with_path(state)[0], strict=True)
    sums = jax.device_get(compile_fingerprints(state)(leaves))
    return {leaf_key(path): values for path, values in zip(paths, sums, strict=True)}


class Fingerprinted(NamedTuple):
    """A state by its fingerprints. num_experts: of each layer."""

    sums: Fingerprints
    num_experts: Sequence[int]

    def first_difference(self, state, kept: Kept | None) -> str | None:
        """Where `state` is not this one, pruned by a plan that keeps `kept`: leaf, layer and expert."""
        want, experts = self.sums, [(layer, i) for layer, count in enumerate(self.num_experts) for i in range(count)]
        if kept is not None:
            rows_N = kept_rows(self.num_experts, kept)
            want, experts = pruned_fingerprints(want, rows_N), [experts[row] for row in rows_N]
        return first_difference(fingerprints(state), want, experts)


def compile_fingerprints(state) -> jax.stages.Compiled:
    """The program for states like this one, which may be abstract; compiled once."""
    paths, leaves = zip(*tree_flatten_with_path(state)[0], strict=True)
    abstract = tuple(jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding) for leaf in leaves)
    names = [(leaf_name(path), leaf.ndim) for path, leaf in zip(paths, leaves, strict=True)]
    has_slices = tuple(is_of_experts(name) or is_stacked(name, ndim) for name, ndim in names)
    return _compiled(abstract, has_slices)


@functools.lru_cache(maxsize=8)
def _compiled(leaves: tuple[jax.ShapeDtypeStruct, ...], has_slices: tuple[bool, ...]) -> jax.stages.Compiled:
    def of_all(leaves: Sequence[jax.Array]) -> list[jax.Array]:
        return [_sums(leaf, int(slices)) for leaf, slices in zip(leaves, has_slices, strict=True)]

    mesh = leaves[0].sharding.mesh if isinstance(leaves[0].sharding, NamedSharding) else None
    return jax.jit(of_all, out_shardings=replicated(mesh) if isinstance(mesh, Mesh) else None).lower(leaves).compile()


def _sums(leaf: jax.Array, first_dim: int) -> jax.Array:
    """Over the dimensions from `first_dim` on."""
    bits = leaf.astype(jnp.uint8) if leaf.dtype == jnp.bool_ else leaf
    words = jax.lax.bitcast_convert_type(bits, WORDS[bits.dtype.itemsize]).astype(jnp.uint32)
    place, stride = jnp.zeros(leaf.shape, jnp.uint32), 1
    dims = range(first_dim, leaf.ndim)
    for dim in reversed(dims):
        place += jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, dim) * jnp.uint32(stride % 2**32)
        stride *= leaf.shape[dim]
    first = _mixed(words + _mixed(place, 0x9E3779B1), 0x85EBCA77)
    second = _mixed(first ^ place, 0xC2B2AE3D)
    zero = jnp.uint32(0)  # both sums in one reduction: of two, XLA on CPU writes the words out in between
    sums = jax.lax.reduce((first, second), (zero, zero), lambda a, b: (a[0] + b[0], a[1] + b[1]), dims)
    return jnp.stack(sums, -1)


def _mixed(x: jax.Array, factor: int) -> jax.Array:
    """One to one, since the factor is odd; low bits reach the high ones and, folded back, the other way round."""
    x = (x ^ (x >> 15)) * jnp.uint32(factor)
    return x ^ (x >> 16)


def pruned_fingerprints(of_old: Fingerprints, rows_N: np.ndarray) -> Fingerprints:
    """What the fingerprints of a pruned state must be. rows_N: of `surgery.kept_rows`."""
    return {leaf: sums[rows_N] if is_of_experts(leaf) else sums for leaf, sums in of_old.items()}


def first_difference(got: Fingerprints, want: Fingerprints, experts: Sequence[tuple[int, int]] = ()) -> str | None:
    """Names leaf, layer and expert where two differ first, None where they do not.

    experts: layer and number of each row of the arrays of experts.

    >>> want = {"experts.down_NFD": np.array([[5, 7], [1, 6]], np.uint32)}
    >>> first_difference({"experts.down_NFD": np.array([[5, 7], [2, 9]], np.uint32)}, want, [(0, 0), (3, 1)])
    'experts.down_NFD of layer 3, expert 1'
    """
    assert got.keys() == want.keys(), got.keys() ^ want.keys()
    places = []
    for leaf, values in want.items():
        wrong = np.flatnonzero(np.any(got[leaf] != values, axis=-1)).tolist()
        if values.ndim == 1:
            places += [leaf] * len(wrong)
        elif is_of_experts(leaf):
            places += [f"{leaf} of layer {experts[row][0]}, expert {experts[row][1]}" for row in wrong]
        else:
            places += [f"{leaf} of layer {layer}" for layer in wrong]
    more = f" ({len(places) - 1} more places)" if len(places) > 1 else ""
    return places[0] + more if places else None


def to_arrays(of_state: Fingerprints) -> dict[str, np.ndarray]:
    """As arrays of numbers for an .npz file; the names as lines of UTF-8."""
    return {
        "leaf": np.frombuffer("\n".join(of_state).encode(), np.uint8),
        "slices": np.array([len(values) if values.ndim == 2 else 0 for values in of_state.values()], np.int32),
        "sums": np.concatenate([values.reshape(-1, 2) for values in of_state.values()]),
    }


def from_arrays(arrays: Mapping[str, np.ndarray]) -> Fingerprints:
    """What `to_arrays` was given."""
    slices, names = arrays["slices"], arrays["leaf"].tobytes().decode().split("\n")
    parts = np.split(arrays["sums"], np.cumsum(np.maximum(slices, 1))[:-1])
    return {name: part if n else part[0] for name, n, part in zip(names, slices, parts, strict=True)}
