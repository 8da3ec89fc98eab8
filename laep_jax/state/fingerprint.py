"""Fingerprints of a training state: two 32-bit sums for every leaf, layer and expert, made on its devices.

Every word of an array is mixed with its place, and the results are added modulo 2**32: a change of one word always
changes both sums, any other change all but never leaves both as they are. Sums of integers are the same in every order,
so a fingerprint is the same on every mesh. The place counts within the slice that the fingerprint is of (an expert's of
a layer, or a layer's), so a prune moves fingerprints as it moves experts: fingerprint(x[kept]) == fingerprint(x)[kept].

Axes: E experts of a layer, S the two sums.
"""

import functools
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.tree_util import keystr, tree_flatten_with_path

from laep_jax.sharding import Mesh, expert_axis, leaf_name, replicated
from laep_jax.state.surgery import Kept, leaf_key, run_position

WORDS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}  # by bytes of a dtype
OUTSIDE = -1  # the layer of a leaf that belongs to none
# uint32, [E, S] for a leaf with experts and [S] for one without, by the leaf (without its run) and the layer
Fingerprints = dict[tuple[str, int], np.ndarray]


def fingerprints(state) -> Fingerprints:
    """Of every leaf of a state, layer by layer, whatever the runs they are grouped into. Every process must call it."""
    paths, leaves = zip(*tree_flatten_with_path(state)[0], strict=True)
    sums = jax.device_get(compile_fingerprints(state)(leaves))
    found: Fingerprints = {}
    layers: dict[str, int] = {}
    for path, leaf, values in zip(paths, leaves, sums, strict=True):
        if not _kept_dims(path, leaf):
            found[leaf_key(path), OUTSIDE] = values
            continue
        position = run_position(path)
        name = keystr((*path[:position], *path[position + 1 :]), simple=True, separator=".")
        for of_layer in values:
            layer = layers[name] = layers.get(name, -1) + 1
            found[name, layer] = of_layer
    return found


def compile_fingerprints(state) -> jax.stages.Compiled:
    """The program for states like this one, which may be abstract; compiled once."""
    paths, leaves = zip(*tree_flatten_with_path(state)[0], strict=True)
    abstract = tuple(jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding) for leaf in leaves)
    return _compiled(abstract, tuple(map(_kept_dims, paths, leaves)))


@functools.lru_cache(maxsize=8)
def _compiled(leaves: tuple[jax.ShapeDtypeStruct, ...], kept_dims: tuple[tuple[int, ...], ...]) -> jax.stages.Compiled:
    def of_all(leaves: Sequence[jax.Array]) -> list[jax.Array]:
        return [_sums(leaf, dims) for leaf, dims in zip(leaves, kept_dims, strict=True)]

    mesh = leaves[0].sharding.mesh if isinstance(leaves[0].sharding, NamedSharding) else None
    return jax.jit(of_all, out_shardings=replicated(mesh) if isinstance(mesh, Mesh) else None).lower(leaves).compile()


def _kept_dims(path: tuple, leaf: jax.Array) -> tuple[int, ...]:
    """The dimensions that a leaf's fingerprints have too: its layers, its experts."""
    if run_position(path) is None:
        return ()
    axis = expert_axis(leaf_name(path), leaf.ndim)
    return (0,) if axis is None else (0, axis)


def _sums(leaf: jax.Array, kept_dims: tuple[int, ...]) -> jax.Array:
    bits = leaf.astype(jnp.uint8) if leaf.dtype == jnp.bool_ else leaf
    words = jax.lax.bitcast_convert_type(bits, WORDS[bits.dtype.itemsize]).astype(jnp.uint32)
    place, stride = jnp.zeros(leaf.shape, jnp.uint32), 1
    dims = [dim for dim in range(leaf.ndim) if dim not in kept_dims]
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


def pruned_fingerprints(of_old: Fingerprints, kept: Kept) -> Fingerprints:
    """What the fingerprints of a pruned state must be. kept: per layer the old slots in new order."""
    return {(leaf, i): v_ES[list(kept[i])] if v_ES.ndim == 2 else v_ES for (leaf, i), v_ES in of_old.items()}


def first_difference(got: Fingerprints, want: Fingerprints, kept: Kept | None = None) -> str | None:
    """Names leaf, layer and expert where two differ first, None where they do not. kept: experts go by their old slots.

    >>> want = {("moe.down_EFD", 3): np.array([[5, 7], [1, 6]], np.uint32)}
    >>> first_difference({("moe.down_EFD", 3): np.array([[5, 7], [2, 9]], np.uint32)}, want)
    'moe.down_EFD of layer 3, expert 1'
    """
    assert got.keys() == want.keys(), got.keys() ^ want.keys()
    places = []
    for (leaf, layer), values in want.items():
        wrong = np.flatnonzero(np.any(got[leaf, layer] != values, axis=-1))
        name = leaf if layer == OUTSIDE else f"{leaf} of layer {layer}"
        if values.ndim == 1:
            places += [name] * len(wrong)
        else:
            places += [f"{name}, expert {kept[layer][slot] if kept else slot}" for slot in wrong.tolist()]
    more = f" ({len(places) - 1} more places)" if len(places) > 1 else ""
    return places[0] + more if places else None


def to_arrays(of_state: Fingerprints) -> dict[str, np.ndarray]:
    """As arrays of numbers for an .npz file; the names as lines of UTF-8."""
    return {
        "leaf": np.frombuffer("\n".join(leaf for leaf, _ in of_state).encode(), np.uint8),
        "layer": np.array([layer for _, layer in of_state], np.int32),
        "experts": np.array([len(values) if values.ndim == 2 else 0 for values in of_state.values()], np.int32),
        "sums": np.concatenate([values.reshape(-1, 2) for values in of_state.values()]),
    }


def from_arrays(arrays: Mapping[str, np.ndarray]) -> Fingerprints:
    """What `to_arrays` was given."""
    experts = arrays["experts"]
    parts = np.split(arrays["sums"], np.cumsum(np.maximum(experts, 1))[:-1])
    names = zip(arrays["leaf"].tobytes().decode().split("\n"), arrays["layer"].tolist(), strict=True)
    return {name: part if n else part[0] for name, n, part in zip(names, experts, parts, strict=True)}
