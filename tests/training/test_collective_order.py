"""No collective lies free beside a loop that holds collectives: emulated devices would begin either first, and hang.

XLA's CPU devices keep the order of the collectives of one computation, but not of one there and one in a loop of it.
"""

import dataclasses
import itertools
import re

import jax
import numpy as np
import pytest

from laep_jax.config import Config, DataConfig, MeshConfig, ModelConfig, TrainConfig
from laep_jax.preflight.hlo import COLLECTIVES, Operation, parse
from laep_jax.sharding import make_mesh, replicated
from laep_jax.state.tree import abstract_layout, abstract_state
from laep_jax.training.sample import make_sampler
from laep_jax.training.step import abstract_batch, make_eval_step, make_train_step

CONFIG = Config(
    model=ModelConfig(
        vocab_size=128, num_layers=4, hidden_size=16, num_heads=4, head_dim=4, ffn_size=8, num_experts=(8, 8, 4, 4)
    ),
    mesh=MeshConfig(fsdp=2, expert=4),
    data=DataConfig(batch_size=16, sequence_length=12),
)
LOOPS = ("while", "call", "conditional")


def _holds_collectives(operation: Operation, computations: dict[str, list[Operation]]) -> bool:
    called = [operation.attribute(name) for name in ("body", "to_apply")] if operation.opcode in LOOPS else []
    inside = itertools.chain.from_iterable(computations.get(name or "", []) for name in called)
    return operation.opcode in COLLECTIVES or any(_holds_collectives(other, computations) for other in inside)


def free_collectives(text: str) -> list[tuple[str, str]]:
    """Pairs of a loop with collectives and of what has some too, of which neither needs the other."""
    computations, found = parse(text)[1], []
    for operations in computations.values():
        needs: dict[str, set[str]] = {}
        for operation in operations:
            direct = [name for name in re.findall(r"%([\w.-]+)", operation.rest) if name in needs]
            needs[operation.name] = set(direct).union(*(needs[name] for name in direct))
        speaking = [operation for operation in operations if _holds_collectives(operation, computations)]
        for a, b in itertools.combinations(speaking, 2):
            if {a.opcode, b.opcode} & {*LOOPS} and a.name not in needs[b.name] and b.name not in needs[a.name]:
                found.append((a.name, b.name))
    return found


@pytest.mark.parametrize("kind", ["train", "accumulation", "eval", "sample"])
def test_the_layers_wait_for_every_collective_beside_them(kind):
    config = dataclasses.replace(CONFIG, train=TrainConfig(grad_accumulation=2 if kind == "accumulation" else 1))
    mesh = make_mesh(config.mesh)
    state, batch = abstract_state(config, mesh), abstract_batch(config, mesh, validation=kind == "eval")
    layout = abstract_layout(config, mesh)
    if kind == "eval":
        program = make_eval_step(config, mesh, 3).lower(layout, state.params, state.router_bias, batch)
    elif kind == "sample":
        prompt = jax.ShapeDtypeStruct((5,), np.int32, sharding=replicated(mesh))
        program = make_sampler(config, mesh).lower(layout, state.params, state.router_bias, prompt)
    else:
        program = make_train_step(config, mesh).lower(state, layout, batch)
    text = program.compile().as_text()
    assert text
    assert " while(" in text
    assert free_collectives(text) == []
