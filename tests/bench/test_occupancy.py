"""CTAs per SM against cases computed by hand from the tables of the CUDA programming guide."""

from __future__ import annotations

import dataclasses

import pytest

from vit_bench.occupancy import ctas_per_sm
from vit_kernels.device import A100, B200, H100, KNOWN_DEVICES, RTX_3090, RTX_4090, RTX_5090


@pytest.mark.parametrize(
    ("device", "registers", "shared", "num_warps", "expected"),
    [
        # 64 warps / 8; 32 registers x 32 lanes = 1024 per warp, 64 warps
        (H100, 32, 0, 8, 8),
        # 168 x 32 = 5376 = 21 x 256 per warp; 16384 // 5376 = 3 per sub-core, 12 per SM
        (H100, 168, 0, 12, 1),
        (H100, 168, 0, 4, 3),
        # 255 -> 256 x 32 = 8192 per warp, 2 per sub-core, 8 per SM
        (H100, 255, 0, 8, 1),
        (H100, 255, 0, 4, 2),
        # 129 x 32 = 4128 -> 4352 per warp: 3 per sub-core; 128 -> 4096: 4 per sub-core
        (A100, 129, 0, 4, 3),
        (A100, 128, 0, 4, 4),
        # 12 warps by registers, of which a CTA of 8 leaves 4 unused
        (A100, 129, 0, 8, 1),
        # 228 KiB / (113 KiB + 1 KiB) = 2, and one 128-byte portion more is too much
        (H100, 32, 113 << 10, 4, 2),
        (H100, 32, (113 << 10) + 1, 4, 1),
        # 164 KiB / (40 KiB + 1 KiB) = 4
        (A100, 64, 40 << 10, 4, 4),
        # all of the opt-in limit, and a byte over it
        (A100, 64, A100.shared_memory, 4, 1),
        (A100, 64, A100.shared_memory + 1, 4, 0),
        # 100 KiB / (49 KiB + 1 KiB) = 2
        (RTX_4090, 64, 49 << 10, 4, 2),
        # resident CTAs of one warp each: 32, 16, 24, 32, 32, 24
        (A100, 16, 0, 1, 32),
        (RTX_3090, 16, 0, 1, 16),
        (RTX_4090, 16, 0, 1, 24),
        (H100, 16, 0, 1, 32),
        (B200, 16, 0, 1, 32),
        (RTX_5090, 16, 0, 1, 24),
        # resident warps: 64 / 4 = 16, 48 / 4 = 12
        (B200, 16, 0, 4, 16),
        (RTX_3090, 16, 0, 4, 12),
        (RTX_5090, 16, 0, 4, 12),
        # 32 warps of 72 registers: 72 x 32 = 2304 each, 73,728 together
        (H100, 72, 0, 32, 0),
        (H100, 64, 0, 32, 1),
        # 15 warps of 4352 would fit the whole register file, but not the four parts of it
        (H100, 129, 0, 1, 12),
        # nine warps of 6912 would, too, but some sub-core has to take three of them
        (H100, 216, 0, 9, 0),
        (H100, 216, 0, 8, 1),
        (H100, 256, 0, 4, 0),
    ],
)
def test_by_hand(device, registers, shared, num_warps, expected):
    assert ctas_per_sm(device, registers, shared, num_warps) == expected


# Shared memory of one SM in KiB, by the guide's table.
PER_SM = {80: 164, 86: 100, 89: 100, 90: 228, 100: 228, 120: 100}


@pytest.mark.parametrize("device", KNOWN_DEVICES, ids=lambda device: device.name)
def test_shared_memory_of_the_sm(device):
    half = (PER_SM[device.capability] << 10) // 2 - 1024
    assert ctas_per_sm(device, 32, half, 4) == 2
    assert ctas_per_sm(device, 32, half + 1, 4) == 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"registers": -1}, "registers must be at least 0; got -1"),
        ({"shared": -1}, "shared must be at least 0; got -1"),
        ({"num_warps": 0}, "num_warps must be at least 1; got 0"),
        ({"device": dataclasses.replace(A100, capability=75)}, "sm_80, sm_86, .* got sm_75"),
    ],
    ids=["registers", "shared", "num_warps", "capability"],
)
def test_impossible_arguments_are_refused(change, words):
    arguments = {"device": A100, "registers": 32, "shared": 0, "num_warps": 4} | change
    with pytest.raises(ValueError, match=words):
        ctas_per_sm(**arguments)
