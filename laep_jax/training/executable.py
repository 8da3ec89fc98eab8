"""A compiled train step as a file: made by `preflight --save` where no TPU is, loaded by `train.py --executable`.

The file is a line of JSON, which says what the step was compiled for, and the executable as
`jax.experimental.serialize_executable` writes it. That part is a pickle: load only files that you made.
"""

import dataclasses
import importlib.metadata
import json
from pathlib import Path

import jax
from jax.experimental import serialize_executable

from laep_jax.config import Config
from laep_jax.errors import UserError, require
from laep_jax.files import parse_json, read_bytes
from laep_jax.sharding import Mesh
from laep_jax.state.tree import abstract_layout, abstract_state
from laep_jax.training.step import abstract_batch, make_train_step

MAX_BYTES = 2**33  # of a file


def requirements(config: Config, mesh: Mesh) -> dict:
    """What the machine and the run must be like for the step of a resolved config; plain JSON."""
    device = mesh.devices.flat[0]
    parts = {name: dataclasses.asdict(getattr(config, name)) for name in ("model", "mesh", "aux_loss", "optimizer")}
    shape = {name: getattr(config.data, name) for name in ("batch_size", "sequence_length")}
    length = {name: getattr(config.train, name) for name in ("num_steps", "grad_accumulation")}
    found = {
        "devices": f"{mesh.size} {device.device_kind}",
        **{f"{package} version": _version(package) for package in ("jax", "jaxlib", "libtpu")},
        **{f"{part}.{name}": value for part, fields in parts.items() for name, value in fields.items()},
        **{f"data.{name}": value for name, value in shape.items()},
        **{f"train.{name}": value for name, value in length.items()},
        "laep.replica_slots": config.laep.replica_slots,
    }
    del found["mesh.cpu_devices"]
    return json.loads(json.dumps(found))


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def save_step(file: Path, step: jax.stages.Compiled, config: Config, mesh: Mesh) -> None:
    """Writes a compiled `make_train_step(config, mesh)`. `UserError` where the file cannot be written."""
    payload = serialize_executable.serialize(step)[0]
    try:
        file.write_bytes(json.dumps(requirements(config, mesh)).encode() + b"\n" + payload)
    except OSError as error:
        raise UserError(f"--save={file} cannot be written: {error.strerror}") from error


def load_step(file: Path, config: Config, mesh: Mesh) -> jax.stages.Compiled:
    """The step that `save_step` wrote. `UserError` that names the first thing in which machine or run differ."""
    head, _, payload = read_bytes(file, f"--executable={file}", MAX_BYTES).partition(b"\n")
    then = parse_json(head, f"the first line of --executable={file}")
    require(isinstance(then, dict), "--executable", str(file), "is no file of `preflight --save`")
    for name, now in requirements(config, mesh).items():
        require(then.get(name) == now, name, now, f"does not fit --executable={file}, made for {then.get(name)}")
    arguments = (abstract_state(config, mesh), abstract_layout(config, mesh), abstract_batch(config, mesh))
    results = jax.eval_shape(make_train_step(config, mesh), *arguments)
    return serialize_executable.deserialize_and_load(
        payload,
        jax.tree.structure((arguments, {})),
        jax.tree.structure(results),
        backend=mesh.devices.flat[0].client,
        execution_devices=list(mesh.devices.flat),
    )
