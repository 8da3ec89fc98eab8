"""Slices that exist are taken, by topology and by name; others are refused with what there is."""

import pytest

from laep_jax.chips import CHIPS, find_chip, find_slice
from laep_jax.errors import UserError


@pytest.mark.parametrize(
    ("topology", "chip", "shape"),
    [
        ("v5p:4x4x12", "v5p", (4, 4, 12)),
        ("v5p:8x8x12", "v5p", (8, 8, 12)),
        ("v5p:16x16x24", "v5p", (16, 16, 24)),
        ("v4:12x12x24", "v4", (12, 12, 24)),
        ("tpu7x:2x2x1", "tpu7x", (2, 2, 1)),
        ("tpu7x:16x16x36", "tpu7x", (16, 16, 36)),
        ("v5e:1x1", "v5e", (1, 1)),
        ("v6e-8", "v6e", (2, 4)),  # chips
        ("v5litepod-16", "v5e", (4, 4)),
        ("v5p-8", "v5p", (2, 2, 1)),  # TensorCores, two of each chip
        ("v5p-32", "v5p", (2, 2, 4)),
        ("v5p-384", "v5p", (4, 4, 12)),
        ("v5p-1024", "v5p", (8, 8, 8)),
        ("v5p-2048", "v5p", (8, 8, 16)),
        ("v5p-12288", "v5p", (16, 16, 24)),
        ("v4-64", "v4", (2, 4, 4)),
        ("tpu7x-128", "tpu7x", (4, 4, 4)),
    ],
)
def test_a_topology_and_a_name_are_a_slice(topology, chip, shape):
    assert find_slice(topology) == (chip, shape)
    assert find_chip(topology) is CHIPS[chip]


@pytest.mark.parametrize(
    ("topology", "message"),
    [
        ("v9:2x2", "is of no known chip; there are v4, v5e, v5p, v6e, tpu7x"),
        ("v9-8", "is of no known chip"),
        ("", "is of no known chip"),
        ("v5e", "is no slice of v5e; there are v5e:1x1"),
        ("v5e:3x3", "is no slice of v5e; there are v5e:1x1, .* v5e:16x16$"),
        ("v5p:4x4x6", "is no slice of v5p; there are .*v5p:2x4x4, and multiples of 4 that ascend, up to 6,144 chips"),
        ("v5p:12x4x4", "is no slice of v5p; there are v5p:4x4x12, whose sides ascend"),
        ("v5p:16x16x28", "is no slice of v5p"),
        ("v4:2x2", "is no slice of v4"),
        ("v5p-9", "is no slice of v5p"),
        ("v6e-12", "is no slice of v6e"),
        ("v5p-99999999", "is no slice of v5p"),
        ("v5p:0x4x4", "is no slice of v5p"),
        ("v5p:4x4x\u0664", "is no slice of v5p"),
    ],
)
def test_what_is_no_slice_is_refused_with_those_there_are(topology, message):
    with pytest.raises(UserError, match=message):
        find_slice(topology)


def test_every_chip_has_its_peaks():
    for chip in CHIPS.values():
        assert min(chip.flops, chip.hbm_bytes, chip.hbm_bandwidth, chip.link_bandwidth) > 1e9
