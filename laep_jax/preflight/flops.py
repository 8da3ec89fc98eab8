"""FLOPs of the products in a compiled program, read from its optimised HLO text.

XLA:TPU makes a convolution of every product. Kernels do not say what they compute: a grouped matmul has its rows, as
many as are routed to a chip in the mean, times the matrices of one expert; splash attention half of the square of the
sequence, for each of its products.
"""

import dataclasses
import math
import re
from collections.abc import Iterator

from laep_jax.preflight.hlo import ARRAY, Operation, executed, parse

SPLASH_PRODUCTS = {"fwd": 2, "dq": 3, "dkv": 4}  # scores and outputs; scores again and their gradient, and what follows


@dataclasses.dataclass(frozen=True)
class Product:
    """name: of the operation in the model. result: its type. flops: of one step on one chip."""

    name: str
    result: str
    flops: float


def products(text: str, rows: float) -> list[Product]:
    """All products that a step executes, the largest first; equal ones together. rows: routed to a chip."""
    _, computations = parse(text)
    types = {op.name: op.result for operations in computations.values() for op in operations}

    def within(op: Operation) -> Iterator[Operation]:
        """The operation, or those that are fused in it."""
        if op.opcode != "fusion":
            yield op
        for inner in computations[op.attribute("calls") or ""] if op.opcode == "fusion" else ():
            yield from within(inner)

    found: dict[tuple[str, str], float] = {}
    for op, times, _ in executed(text):
        for inner in within(op):
            if flops := times * _flops(inner, types, rows):
                key = _name(inner), "{}[{}]".format(*_main_array(inner.result))
                found[key] = found.get(key, 0) + flops
    return sorted((Product(*key, flops) for key, flops in found.items()), key=lambda product: -product.flops)


def _flops(op: Operation, types: dict[str, str], rows: float) -> float:
    if op.opcode == "convolution":
        return _convolution(op, *(_dims(types[name]) for name in re.findall(r"%([\w.-]+)", op.rest)[:2]))
    if op.opcode != "custom-call" or "tpu_custom_call" not in op.rest:
        return 0.0
    if splash := re.match(r"splash_mha_([a-z]+)", op.name):
        *heads, length, size = _dims(op.result)
        return SPLASH_PRODUCTS[splash[1]] * math.prod(heads) * length * length * size
    if re.match(r"t?gmm|ragged-dot-(?!metadata)", op.name):
        shapes = [_as_dims(dims) for _, dims in ARRAY.findall(op.result + op.rest.partition("frontend")[0])]
        [*_, (_, rows_in, rows_out)] = [shape for shape in shapes if len(shape) == 3]
        return 2.0 * rows * rows_in * rows_out
    return 0.0


def _convolution(op: Operation, inputs: list[int], kernel: list[int]) -> float:
    """Multiplications and additions of values that are there: padding and what dilation puts between do not count."""
    of_inputs, of_kernel, of_result = re.split(r"_|->", re.findall(r"dim_labels=([\w>-]+)", op.rest)[0])
    flops = 2.0 * inputs[of_inputs.index("b")] * kernel[of_kernel.index("i")] * kernel[of_kernel.index("o")]
    result, window = _dims(op.result), _window(op.rest)
    for place, label in enumerate(sorted(set(of_result) & set("0123456789"))):
        part = {name: values[place] for name, values in window.items()}
        size, pad = int(part["size"]), int(part.get("pad", "0_0").partition("_")[0])
        stride, dilate, spread = (int(part.get(name, 1)) for name in ("stride", "lhs_dilate", "rhs_dilate"))
        last = (inputs[of_inputs.index(label)] - 1) * dilate
        positions = (
            at * stride + tap * spread - pad for at in range(result[of_result.index(label)]) for tap in range(size)
        )
        flops *= sum(0 <= position <= last and position % dilate == 0 for position in positions)
    return flops


def _window(rest: str) -> dict[str, list[str]]:
    """Such as {"size": ["4", "1"], "pad": ["3_3", "0_0"]}."""
    found = re.search(r"window=\{([^}]*)\}", rest)
    return {name: values.split("x") for name, values in re.findall(r"(\w+)=(\S+)", found[1])} if found else {}


def _name(op: Operation) -> str:
    """The end of where it is in the model, such as `experts/dot_general`."""
    found = re.search(r'op_name="([^"]*)"', op.rest)
    return "/".join(found[1].split("/")[-2:]) if found else op.name


def _dims(result: str) -> list[int]:
    return _as_dims(_main_array(result)[1])


def _main_array(result: str) -> tuple[str, str]:
    """Type and dimensions of an array, or of that in a tuple which has most dimensions."""
    return max(ARRAY.findall(result), key=lambda array: array[1].count(","))


def _as_dims(text: str) -> list[int]:
    return [int(dim) for dim in filter(None, text.split(","))]
