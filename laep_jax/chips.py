"""TPU chips and their slices: published peaks, and which topologies there are.

Sources: Google Cloud's pages on each generation, docs.cloud.google.com/tpu/docs/v5e, /v5p and /v6e
(per chip: bfloat16 peak, HBM capacity and bandwidth, bandwidth of all inter-chip links in one direction).
"""

import dataclasses

from laep_jax.errors import UserError

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """Peaks of one chip: FLOP/s in bfloat16, bytes of HBM, bytes/s of HBM and of its links together."""

    kind: str  # jax.Device.device_kind
    flops: float
    hbm_bytes: int
    hbm_bandwidth: float
    link_bandwidth: float
    slices: tuple[str, ...]


FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16", "16x16x16")
CHIPS = {
    "v5e": Chip("TPU v5 lite", 197e12, 16 * GIB, 819e9, 200e9, FLAT),
    "v5p": Chip("TPU v5", 459e12, 95 * GIB, 2765e9, 600e9, CUBES),
    "v6e": Chip("TPU v6 lite", 918e12, 32 * GIB, 1640e9, 448e9, FLAT),
}


def find_chip(topology: str) -> Chip:
    """The chip of a topology such as "v5p:8x8x16"; `UserError` that lists the known ones otherwise."""
    name, _, shape = topology.partition(":")
    if name not in CHIPS:
        raise UserError(f"--topology={topology!r} is of no known chip; there are {', '.join(CHIPS)}")
    if shape not in CHIPS[name].slices:
        known = ", ".join(f"{name}:{known}" for known in CHIPS[name].slices)
        raise UserError(f"--topology={topology!r} is no slice of {name}; there are {known}")
    return CHIPS[name]


def peak_flops(kind: str) -> float | None:
    """Of one device by its `jax.Device.device_kind`; None where it is not known.

    >>> peak_flops("TPU v5 lite"), peak_flops("cpu")
    (197000000000000.0, None)
    """
    return next((chip.flops for chip in CHIPS.values() if chip.kind == kind), None)
