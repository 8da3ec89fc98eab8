"""What a training run carries from step to step.

Axes as in `laep_jax.sharding`. What all layers have alike is stacked over them, under the key "layers"; the experts of
all layers are in one array a parameter, under "experts", layer after layer. Optimizer moments repeat those paths.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import optax

from laep_jax.config import Config
from laep_jax.laep.layout import Layout, make_layout, num_slots
from laep_jax.laep.slots import SlotMap, in_order
from laep_jax.model.transformer import init_params
from laep_jax.sharding import Mesh, replicated, tree_shardings
from laep_jax.state.optimizer import make_optimizer


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["step", "params", "opt_state", "router_bias"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class TrainState:
    """`step`: optimizer steps done (int32), those skipped left out. `router_bias`: {"bias_N": float32}.

    The bias is added to the router's scores when experts are chosen, not when they are weighted: zero
    by default, moved by the loss-free balancing, minus infinity to mask an expert.
    """

    step: jax.Array
    params: dict
    opt_state: optax.OptState
    router_bias: dict


def new_state(config: Config) -> TrainState:
    """A fresh state; a pure function of the config, to be traced or jitted."""
    params = init_params(config.model, config.aux_loss, jax.random.key(config.train.seed))
    bias_N = jnp.zeros(sum(config.model.experts_per_layer))
    return TrainState(jnp.int32(0), params, make_optimizer(config).init(params), {"bias_N": bias_N})


def abstract_state(config: Config, mesh: Mesh) -> TrainState:
    """Shapes, dtypes and shardings of the state; allocates nothing."""
    shapes = jax.eval_shape(functools.partial(new_state, config))
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        tree_shardings(shapes, mesh),
    )


def init_state(config: Config, mesh: Mesh) -> TrainState:
    """A fresh state, made shard by shard on its devices."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(config, mesh))
    return jax.jit(functools.partial(new_state, config), out_shardings=shardings)()


def state_of(params: dict, router_bias: dict, config: Config, mesh: Mesh) -> TrainState:
    """A state at step 0 that takes over parameters and bias, which have their shardings."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(config, mesh).opt_state)
    opt_state = jax.jit(make_optimizer(config).init, out_shardings=shardings)(params)
    return TrainState(jax.device_put(jnp.int32(0), replicated(mesh)), params, opt_state, router_bias)


def initial_maps(config: Config) -> tuple[SlotMap, ...]:
    """Of a model whose loads are not known. config: resolved."""
    assert config.mesh.expert is not None
    return tuple(in_order(count, config.mesh.expert) for count in config.model.experts_per_layer)


def fits(maps: Sequence[SlotMap], config: Config) -> bool:
    """Whether maps, made for another mesh or for other replica slots perhaps, are some for the model of a config."""
    assert config.mesh.expert is not None
    slots = num_slots(config.model.experts_per_layer, config.mesh.expert, config.laep.replica_slots)
    return all(len(each.slots_PS) == config.mesh.expert and each.slots_PS.shape[1] <= slots for each in maps)


def layout_of(maps: Sequence[SlotMap], config: Config) -> Layout:
    """Of the model of a config."""
    return make_layout(maps, config.model.experts_per_layer, config.laep.replica_slots)


def initial_layout(config: Config) -> Layout:
    """That of `initial_maps`."""
    return layout_of(initial_maps(config), config)


def abstract_layout(config: Config, mesh: Mesh) -> Layout:
    """Shapes, dtypes and shardings of the layouts of a model; allocates nothing on devices."""
    layout = initial_layout(config)
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=replicated(mesh)), layout)
