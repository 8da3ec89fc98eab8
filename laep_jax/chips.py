"""TPU chips and their slices: published peaks, and which topologies there are.

Sources: Google Cloud's pages on each generation, docs.cloud.google.com/tpu/docs/v4, /v5e, /v5p, /v6e and /tpu7x (per
chip: bfloat16 peak, HBM capacity and bandwidth, bandwidth of all inter-chip links in one direction). Shapes: the same
pages (the largest v5p slice is 16x16x24), docs.cloud.google.com/tpu/docs/types-topologies (A <= B <= C, each a multiple
of 4 from a cube of 64 chips on; what a name counts; the default shape is the one nearest to a cube). The TPU compiler
takes more, such as v5p:4x4x6, which are not offered, and single chips of v5p and tpu7x.
"""

import dataclasses
import math
import re

from laep_jax.errors import UserError

GIB = 2**30
CUBE = 4  # chips along each side of the block that slices of v4, v5p and tpu7x are made of
FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
BELOW_A_CUBE = ("2x2x1", "2x2x2", "2x2x4", "2x4x4")
ALIASES = {"v5litepod": "v5e"}  # in names of accelerator types


@dataclasses.dataclass(frozen=True)
class Chip:
    """Peaks of one JAX device: FLOP/s in bfloat16, bytes of HBM, bytes/s of HBM and of its links together.

    A device is a chip, but half of one on tpu7x, whose two chiplets JAX sees apart. small: shapes of slices that are
    not made of cubes. max_chips: of one that is, 0 where none are. counted: what the number in a name such as "v5p-8"
    counts for each chip, TensorCores or the chip itself. compiler_options: of the train step.
    """

    kind: str  # jax.Device.device_kind
    flops: float
    hbm_bytes: int
    hbm_bandwidth: float
    link_bandwidth: float
    small: tuple[str, ...] = FLAT
    max_chips: int = 0
    counted: int = 1
    compiler_options: dict[str, bool] = dataclasses.field(default_factory=dict)


# All-gathers run in pieces inside the products beside them. It is what v5e does by default.
FUSE_COLLECTIVES = {
    "xla_tpu_enable_async_collective_fusion": True,
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": True,
    "xla_tpu_enable_async_collective_fusion_multiple_steps": True,
    "xla_tpu_overlap_compute_collective_tc": True,
    "xla_enable_async_all_gather": True,
}
CHIPS = {
    "v4": Chip("TPU v4", 275e12, 32 * GIB, 1200e9, 300e9, BELOW_A_CUBE, 4096, counted=2),
    "v5e": Chip("TPU v5 lite", 197e12, 16 * GIB, 819e9, 200e9),
    "v5p": Chip("TPU v5", 459e12, 95 * GIB, 2765e9, 600e9, ("1x1x1", *BELOW_A_CUBE), 6144, 2, FUSE_COLLECTIVES),
    "v6e": Chip("TPU v6 lite", 918e12, 32 * GIB, 1640e9, 448e9, compiler_options=FUSE_COLLECTIVES),
    "tpu7x": Chip("TPU7x", 2307e12 / 2, 96 * GIB, 7380e9 / 2, 300e9, ("1x1x1", *BELOW_A_CUBE), 9216, counted=2),
}


def find_slice(topology: str) -> tuple[str, tuple[int, ...]]:
    """The chip's name and the slice's shape, in chips, of a topology "v5p:4x4x12" or a name "v5p-384".

    `UserError` that says which there are otherwise.

    >>> find_slice("v5p:4x4x12"), find_slice("v6e-8")
    (('v5p', (4, 4, 12)), ('v6e', (2, 4)))
    """
    name, separator, size = topology.partition("-" if ":" not in topology else ":")
    name = ALIASES.get(name, name)
    if name not in CHIPS:
        raise UserError(f"--topology={topology!r} is of no known chip; there are {', '.join(CHIPS)}")
    chip = CHIPS[name]
    if separator == "-":
        shape = _shape_of_size(chip, int(size)) if re.fullmatch("[1-9][0-9]{0,5}", size) else None
    else:
        shape = _shape(size)
    if shape is None or not _exists(chip, shape):
        raise UserError(f"--topology={topology!r} is no slice of {name}; there are {_known(name, shape)}")
    return name, shape


def find_chip(topology: str) -> Chip:
    """The chip of a topology or name; `UserError` as in `find_slice`."""
    return CHIPS[find_slice(topology)[0]]


def _shape(text: str) -> tuple[int, ...] | None:
    return tuple(map(int, text.split("x"))) if re.fullmatch("[1-9][0-9]{0,3}(x[1-9][0-9]{0,3}){1,2}", text) else None


def _exists(chip: Chip, shape: tuple[int, ...]) -> bool:
    of_cubes = len(shape) == 3 and all(side % CUBE == 0 for side in shape) and list(shape) == sorted(shape)
    return "x".join(map(str, shape)) in chip.small or (of_cubes and math.prod(shape) <= chip.max_chips)


def _shape_of_size(chip: Chip, number: int) -> tuple[int, ...] | None:
    """The default shape of a slice with this number in its name."""
    chips, rest = divmod(number, chip.counted)
    shapes = [shape for text in chip.small if math.prod(shape := _shape(text) or ()) == chips]
    if chips <= chip.max_chips and chips % CUBE**3 == 0:
        sides = [side for side in range(CUBE, chips + 1, CUBE) if chips % side == 0]
        shapes += [(a, b, chips // a // b) for a in sides for b in sides if chips % (a * b) == 0]
    shapes = [shape for shape in shapes if _exists(chip, shape)]
    return min(shapes, key=lambda shape: max(shape) - min(shape), default=None) if rest == 0 else None


def _known(name: str, shape: tuple[int, ...] | None) -> str:
    chip = CHIPS[name]
    ascending = tuple(sorted(shape or ()))
    if shape and _exists(chip, ascending):
        return f"{name}:{'x'.join(map(str, ascending))}, whose sides ascend"
    cubes = f", and multiples of {CUBE} that ascend, up to {chip.max_chips:,} chips, as {name}:4x4x12"
    return ", ".join(f"{name}:{known}" for known in chip.small) + (cubes if chip.max_chips else "")


def chip_of(kind: str) -> Chip | None:
    """By the `jax.Device.device_kind` of its devices; None where it is not known.

    >>> chip_of("TPU v5 lite").flops, chip_of("cpu")
    (197000000000000.0, None)
    """
    return next((chip for chip in CHIPS.values() if chip.kind == kind), None)
