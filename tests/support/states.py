"""A training state of random numbers, of the real tree but without a model, and its layers one by one."""

from typing import NamedTuple

import jax
import numpy as np
import optax

from laep_jax.config import MeshConfig, ModelConfig
from laep_jax.sharding import make_mesh, tree_shardings

OF_EXPERTS = ("router_ND", "gate_up_NDG", "down_NFD", "bias_N")


class State(NamedTuple):
    step: jax.Array | jax.ShapeDtypeStruct
    params: dict
    opt_state: tuple
    router_bias: dict


def model_config(num_experts: tuple[int, ...]) -> ModelConfig:
    sizes = {"hidden_size": 32, "num_heads": 4, "head_dim": 8, "ffn_size": 16, "vocab_size": 64}
    return ModelConfig(num_experts=num_experts, num_layers=len(num_experts), **sizes)


def _shapes(model: ModelConfig) -> State:
    D, J, F, V = model.hidden_size, model.num_heads * model.head_dim, model.ffn_size, model.vocab_size

    def array(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, np.float32)

    L, N = model.num_layers, sum(model.experts_per_layer)
    layers = {
        "attention_norm": {"scale_D": array(L, D)},
        "attention": {"query_JD": array(L, J, D), "output_JD": array(L, J, D)},
    }
    experts = {"router_ND": array(N, D), "gate_up_NDG": array(N, D, 2 * F), "down_NFD": array(N, F, D)}
    params = {
        "embedding_VD": array(V, D),
        "layers": layers,
        "experts": experts,
        "final_norm": {"scale_D": array(D)},
    }
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(optax.constant_schedule(1e-3)))
    return State(
        jax.ShapeDtypeStruct((), np.int32), params, jax.eval_shape(optimizer.init, params), {"bias_N": array(N)}
    )


class States:
    """Random states and abstract states of models that differ in their expert counts."""

    config = staticmethod(model_config)

    @staticmethod
    def mesh(data: int = 1, fsdp: int = 2, expert: int = 4):
        return make_mesh(MeshConfig(data, fsdp, expert), jax.devices()[: data * fsdp * expert])

    @staticmethod
    def abstract(num_experts: tuple[int, ...], mesh) -> State:
        shapes = _shapes(model_config(num_experts))
        return jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            shapes,
            tree_shardings(shapes, mesh),
        )

    @classmethod
    def random(cls, num_experts: tuple[int, ...], mesh, seed: int = 0) -> State:
        rng = np.random.default_rng(seed)

        def leaf(abstract):
            values = rng.normal(size=abstract.shape) * 100
            return jax.device_put(np.asarray(values, abstract.dtype), abstract.sharding)

        return jax.tree.map(leaf, cls.abstract(num_experts, mesh))

    @staticmethod
    def by_layer(state, num_experts: tuple[int, ...]) -> dict[str, list[np.ndarray]]:
        """Values of every leaf: those of experts as one array a layer, others as they are."""
        layers: dict[str, list[np.ndarray]] = {}
        for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]:
            name, value = jax.tree_util.keystr(path), np.array(leaf)
            is_of_experts = any(suffix in name for suffix in OF_EXPERTS)
            layers[name] = np.split(value, np.cumsum(num_experts)[:-1]) if is_of_experts else [value]
        return layers

    @classmethod
    def pruned_by_layer(cls, state, num_experts: tuple[int, ...], kept) -> dict[str, list[np.ndarray]]:
        """What `by_layer` of the pruned state must be: plain slicing, layer by layer."""
        layers = cls.by_layer(state, num_experts)
        for name, values in layers.items():
            if any(suffix in name for suffix in OF_EXPERTS):
                layers[name] = [value[ids] for value, ids in zip(values, kept, strict=True)]
        return layers

    @staticmethod
    def assert_equal(got: dict[str, list[np.ndarray]], want: dict[str, list[np.ndarray]]) -> None:
        assert got.keys() == want.keys()
        for name in want:
            assert len(got[name]) == len(want[name]), name
            for layer, (a, b) in enumerate(zip(got[name], want[name], strict=True)):
                assert a.dtype == b.dtype, (name, layer)
                np.testing.assert_array_equal(a, b, err_msg=f"{name}, layer {layer}")

    @staticmethod
    def plan(old: tuple[int, ...], new: tuple[int, ...], seed: int = 0) -> list[list[int]]:
        """Random survivors in random order, per layer."""
        rng = np.random.default_rng(seed)
        return [rng.permutation(a)[:b].tolist() for a, b in zip(old, new, strict=True)]
