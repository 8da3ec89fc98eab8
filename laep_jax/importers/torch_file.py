"""Tensors of a file that `torch.save` wrote, read without torch and without executing anything in it.

Such a file is a zip archive: a pickle, data.pkl, and the bytes of every storage. The unpickler here knows dictionaries,
lists, texts, numbers and tensors, and refuses every other class and function that the pickle names.
"""

import dataclasses
import io
import math
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from laep_jax.errors import UserError, short
from laep_jax.files import MAX_ARRAY, MAX_JSON, open_regular

STORAGES = {
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
    "FloatStorage": np.float32,
    "DoubleStorage": np.float64,
}


@dataclasses.dataclass(frozen=True, slots=True)
class _Storage:
    dtype: Any
    content: bytes


@dataclasses.dataclass(frozen=True, slots=True)
class _Tensor:
    """A tensor as the pickle describes it; an array is made of it once the pickle is read."""

    storage: Any
    offset: Any
    shape: Any
    strides: Any


def _rebuild_tensor_v2(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> _Tensor:
    return _Tensor(storage, offset, shape, strides)


class _Unpickler(pickle.Unpickler):
    def __init__(self, text: bytes, archive: zipfile.ZipFile, folder: str):
        super().__init__(io.BytesIO(text))
        self._archive, self._folder = archive, folder

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _rebuild_tensor_v2
        if module == "torch" and name in STORAGES:
            return name
        raise pickle.UnpicklingError(f"it names {module}.{name}, which is no tensor")

    def persistent_load(self, pid: Any) -> _Storage:
        kind, storage, key, *_ = pid
        if kind != "storage" or storage not in STORAGES or not isinstance(key, str):
            raise pickle.UnpicklingError(f"storage {short(pid)} is unknown")
        return _Storage(STORAGES[storage], _member(self._archive, f"{self._folder}data/{key}", MAX_ARRAY))


def read_torch(path: Path, name: str) -> dict[str, Any]:
    """The dictionary in such a file, its tensors as arrays. `UserError` on anything else."""
    with open_regular(path, name) as file:
        try:
            with zipfile.ZipFile(file) as archive:
                [folder] = [
                    member.removesuffix("data.pkl") for member in archive.namelist() if member.endswith("data.pkl")
                ]
                text = _member(archive, f"{folder}data.pkl", MAX_JSON)
                values = _Unpickler(text, archive, folder).load()
                return {key: _array(item) if isinstance(item, _Tensor) else item for key, item in values.items()}
        except Exception as error:  # zipfile and pickle have many for a damaged file
            raise UserError(f"{name} does not read as a file of torch.save with tensors: {short(error)}") from error


def _member(archive: zipfile.ZipFile, member: str, most: int) -> bytes:
    info = archive.getinfo(member)
    if info.compress_type != zipfile.ZIP_STORED or info.file_size > most:
        raise ValueError(f"{member} is compressed, or has {info.file_size} bytes")
    return archive.read(info)


def _array(tensor: _Tensor) -> np.ndarray:
    """The tensor's elements; ValueError where they do not lie in its storage."""
    storage = tensor.storage
    whole = np.frombuffer(storage.content, storage.dtype)
    numbers = [tensor.offset, *tensor.shape, *tensor.strides]
    if not all(type(number) is int and 0 <= number <= MAX_ARRAY for number in numbers):
        raise ValueError("a tensor's shape is none")
    last = tensor.offset + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.strides, strict=True))
    if math.prod(tensor.shape) > whole.size or last >= whole.size:
        raise ValueError("a tensor reaches beyond its storage")
    bytes_between = [stride * whole.itemsize for stride in tensor.strides]
    return np.lib.stride_tricks.as_strided(whole[tensor.offset :], tensor.shape, bytes_between, writeable=False).copy()
