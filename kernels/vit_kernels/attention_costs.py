"""What a program of the attention kernel costs on an SM, by tile, head width and GPU: modelled, not measured, but for
sm_90 at a width of 64.

The figures come from simulating the compiled machine code of each tile (issue slots, tensor cores, exponentials, shared
memory, latencies and scoreboards of one SM) in bf16, with keys and values in L2 and 5 keys left over by whole blocks. A
tile without a figure for a head width is not offered for it: it spills registers, or another is better. Those of sm_90
at a width of 64, on a full SM, were fitted to 197, 577 and 4,096 tokens on an H100 (Triton 3.6, cold L2, 1.75 GHz and
5,000 cycles for the launch assumed): of six launches five are within 3 % and one is 8 % off, which were up to 15 % off;
those of 64 x 64 in 3 stages for a program alone on its SM to 197 and 577 tokens of one image.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class AttentionTile:
    """One program computes block_m queries of one head against block_n keys at a time.

    whole: all keys and values of the head are in shared memory (`attention_whole`), and a program goes through so many
    tiles of block_m queries; 0 where they come block by block. roles: its warps have roles (`attention_roles`), and
    num_stages blocks of keys and of values are under way.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    whole: int = 0
    roles: bool = False


@dataclass(frozen=True)
class Cost:
    """SM cycles of one program: start for all but its whole blocks of keys, step for each of these.

    The first two per program on an SM that is full of such programs; the others for a program alone on its SM.
    """

    start: int
    step: int
    start_alone: int
    step_alone: int


# By tile, and by the padded head width they were modelled at.
Costs = dict[AttentionTile, dict[int, Cost]]

# sm_80, modelled for an A100.
AMPERE: Costs = {
    AttentionTile(128, 32, 4, 3): {
        64: Cost(3515, 778, 4935, 1004),
    },
    AttentionTile(64, 32, 4, 3): {
        64: Cost(1594, 493, 3053, 737),
        80: Cost(1854, 593, 3561, 1291),
        128: Cost(4277, 1464, 5620, 2137),
    },
    AttentionTile(128, 64, 8, 3): {
        64: Cost(6233, 1648, 6233, 1648),
        80: Cost(7480, 2589, 7480, 2589),
        128: Cost(11093, 2934, 11093, 2934),
    },
    AttentionTile(128, 32, 8, 3): {
        64: Cost(3678, 965, 4981, 1160),
        80: Cost(5758, 1249, 5758, 1249),
        128: Cost(8475, 1775, 8475, 1775),
    },
    AttentionTile(16, 64, 4, 3): {
        64: Cost(1080, 546, 2559, 1186),
        80: Cost(1477, 1145, 2711, 2062),
        128: Cost(2350, 982, 3547, 1348),
    },
    AttentionTile(16, 32, 4, 2): {
        64: Cost(715, 361, 2533, 1065),
        80: Cost(1105, 623, 2685, 1033),
        128: Cost(1093, 576, 2391, 1299),
    },
}

# sm_86, sm_89 and sm_120, modelled for an RTX 4090.
SMALL: Costs = {
    AttentionTile(128, 32, 4, 3): {
        64: Cost(11320, 1971, 11788, 2155),
    },
    AttentionTile(64, 32, 4, 3): {
        64: Cost(5563, 1035, 6050, 1263),
        80: Cost(7648, 1232, 7466, 1623),
        128: Cost(12984, 2782, 12984, 2782),
    },
    AttentionTile(64, 32, 4, 2): {
        64: Cost(5170, 1019, 10469, 1334),
        80: Cost(4998, 1346, 12919, 1631),
        128: Cost(11714, 2278, 22097, 2756),
    },
    AttentionTile(128, 32, 8, 3): {
        80: Cost(14058, 2598, 14058, 2598),
        128: Cost(22309, 4020, 22309, 4020),
    },
    AttentionTile(128, 64, 8, 2): {
        128: Cost(42784, 7306, 42784, 7306),
    },
    AttentionTile(16, 64, 4, 3): {
        64: Cost(2964, 758, 3604, 1243),
        80: Cost(2466, 2814, 4137, 3105),
        128: Cost(5633, 1768, 5633, 1768),
    },
    AttentionTile(16, 32, 4, 2): {
        64: Cost(1290, 348, 2805, 1179),
        80: Cost(1393, 1482, 3283, 1839),
    },
}

# sm_90, modelled for an H100.
HOPPER: Costs = {
    AttentionTile(64, 64, 4, 2): {
        64: Cost(2300, 555, 3406, 1375),
        80: Cost(2149, 717, 5381, 1482),
    },
    AttentionTile(64, 64, 4, 3): {
        64: Cost(2250, 472, 1820, 933),
        80: Cost(3112, 615, 4980, 1272),
    },
    AttentionTile(64, 32, 4, 3): {
        64: Cost(1800, 318, 3170, 778),
        80: Cost(1761, 399, 4713, 887),
        128: Cost(2879, 515, 3877, 910),
    },
    AttentionTile(128, 64, 8, 3): {
        64: Cost(4300, 1000, 5003, 1353),
        80: Cost(7488, 1445, 7488, 1445),
        128: Cost(9242, 1625, 9242, 1625),
    },
    AttentionTile(128, 32, 8, 3): {
        128: Cost(6277, 884, 6839, 1180),
    },
    AttentionTile(16, 64, 4, 3): {
        64: Cost(882, 551, 2878, 1136),
        80: Cost(1850, 1000, 2988, 1229),
        128: Cost(1956, 984, 3494, 1960),
    },
    AttentionTile(16, 32, 4, 2): {
        64: Cost(721, 364, 3020, 1222),
        80: Cost(1474, 626, 3341, 1298),
        128: Cost(1139, 588, 3357, 1273),
    },
}

# sm_100, with the figures of its predecessor. In two stages and heads of two pieces, Triton 3.7 and 3.8 put the fence
# between a copy of values and the product that reads them before the copy has landed (seen when emulated; not in 3.9).
BLACKWELL: Costs = {tile: costs for tile, costs in HOPPER.items() if tile != AttentionTile(64, 64, 4, 2)}

# By compute capability.
COSTS = {80: AMPERE, 86: SMALL, 90: HOPPER, 100: BLACKWELL, 120: SMALL}


@dataclass(frozen=True)
class WholeCost:
    """SM cycles of programs with all keys in shared memory.

    start: of a program; of each of its tiles of queries: tile for all but its whole blocks of keys, block for each of
    these, rest for what they leave over. Tiles take `longer` more for every tile that a program goes through, and
    `alone` times as long where no other program shares the SM.
    """

    start: int
    tile: int
    block: int
    rest: int
    longer: float
    alone: float


# Fitted to programs of 4, 2 and 1 tiles of 197 tokens at 12, 96, 192, 384, 768 and 1,024 heads on an H100 (Triton 3.6,
# cold L2, 1.755 GHz and 5,000 cycles for the launch assumed): 8 % off at most, and the fastest of the three is chosen
# for all six. What a tile's blocks share of it is simulated.
WHOLE = WholeCost(960, 770, 244, 217, longer=0.085, alone=1.7)
WHOLE_TILES = tuple(AttentionTile(64, 64, 4, 2, whole) for whole in (4, 2, 1))


@dataclass(frozen=True)
class RolesCost:
    """SM cycles of a program whose warps have roles, alone on its SM: start before the first tile of queries, and of
    each tile: all but its blocks of keys, each whole one of these, one of half the width, what they leave over. A
    tile takes `idle` of that less for every warpgroup without queries.
    """

    start: int
    tile: int
    block: int
    half: int
    rest: int
    idle: float


# Fitted to 257, 577, 1,025 and 4,096 tokens on an H100 (as above, 16 to 768 heads): 9 % off at most, where there are
# more tiles than SMs.
ROLES = RolesCost(2500, 2500, 2580, 1200, 1500, 0.15)
ROLES_TILES = (AttentionTile(192, 128, 4, 4, roles=True),)
