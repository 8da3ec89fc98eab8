"""Files of safetensors as bytes: read without loading them, written with whatever dtypes there are.

The library reads bfloat16 and float8 through torch only, and what is done here needs no numbers. The format: the length
of a JSON header in 8 bytes, the header, and the tensors one after the other at the offsets that it names
(github.com/huggingface/safetensors#format).
"""

import dataclasses
import json
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from laep_jax.errors import UserError, require
from laep_jax.files import MAX_JSON, open_regular, parse_json, read_json

METADATA = "__metadata__"
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


@dataclasses.dataclass(frozen=True)
class Tensor:
    """data: uint8, of all elements."""

    dtype: str
    shape: tuple[int, ...]
    data: np.ndarray


def read_shards(model: Path) -> dict[str, dict[str, Any]]:
    """The header of each file of a folder by its name. `UserError` where it has none."""
    if not (model / INDEX).exists():
        return {SINGLE: read_header(model / SINGLE)}
    weight_map = read_json(model / INDEX, str(model / INDEX)).get("weight_map")
    if not isinstance(weight_map, dict):
        raise UserError(f"{model / INDEX} has no weight_map")
    files = sorted({str(file) for file in weight_map.values()})
    outside = [file for file in files if Path(file).name != file]
    require(not outside, f"files of {model / INDEX}", outside, "lie outside the folder")
    return {file: read_header(model / file) for file in files}


def read_header(path: Path) -> dict[str, Any]:
    """dtype, shape and data_offsets of each tensor by its name. `UserError` where they are none, or not in the file."""
    name = f"header of {path}"
    with open_regular(path, str(path)) as file:
        length = file.read(8)
        size = struct.unpack("<Q", length)[0] if len(length) == 8 else 2**63
        require(size <= MAX_JSON, name, size, "is none of a safetensors file")
        header = parse_json(file.read(size), name)
        left = file.seek(0, 2) - 8 - size
    require(isinstance(header, dict), name, header, "must be an object")
    tensors = {key: of for key, of in header.items() if key != METADATA}
    for key, of in tensors.items():
        try:
            (start, stop), shape = of["data_offsets"], of["shape"]
            dtype = of["dtype"]
            fits = 0 <= start <= stop <= left and all(type(size) is int and size >= 0 for size in shape)
        except (TypeError, KeyError, ValueError) as error:
            raise UserError(f"{name}: {key} is no tensor: {error!r}") from error
        require(fits and isinstance(dtype, str), f"{name}: {key}", of, "does not lie in the file")
    return tensors


def read_tensors(path: Path, header: Mapping[str, Any]) -> dict[str, Tensor]:
    """Those of a header; their bytes are read when they are used."""
    with path.open("rb") as file:
        begin = 8 + struct.unpack("<Q", file.read(8))[0]
    content = np.memmap(path, np.uint8, mode="r")
    return {
        name: Tensor(
            of["dtype"], tuple(of["shape"]), content[begin + of["data_offsets"][0] : begin + of["data_offsets"][1]]
        )
        for name, of in header.items()
    }


class Described(NamedTuple):
    """A tensor that is still to be made. size: bytes."""

    dtype: str
    shape: tuple[int, ...]
    size: int


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> int:
    """Writes a file; returns the bytes of its tensors."""
    described = {name: Described(of.dtype, of.shape, of.data.nbytes) for name, of in tensors.items()}
    return write_one_by_one(path, described, lambda name: tensors[name].data)


def write_one_by_one(path: Path, tensors: Mapping[str, Described], make: Callable[[str], np.ndarray]) -> int:
    """The same of tensors that are made when their turn comes, so that only one is in memory."""
    header: dict[str, Any] = {METADATA: {"format": "pt"}}
    end = 0
    for name, of in tensors.items():
        header[name] = {"dtype": of.dtype, "shape": of.shape, "data_offsets": [end, end + of.size]}
        end += of.size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, of in tensors.items():
            data = np.ascontiguousarray(make(name))
            assert data.nbytes == of.size, (name, data.shape, of)
            data.tofile(file)
    return end
