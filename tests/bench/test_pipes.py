"""Cycles per pipe, main loops and epilogues of hand-written listings."""

from __future__ import annotations

import pytest

from tests.bench.listing import code
from vit_bench import rates
from vit_bench.pipes import Epilogue, Kernel, measure
from vit_bench.tensor_ops import product
from vit_kernels import tiles


def cost(text: str, capability: int = 90, num_warps: int = 8) -> dict[str, float]:
    """What the last instruction of a listing costs, pipes that it does not touch left out."""
    listing = code(text)
    section = measure(listing, [len(listing) - 1], capability, num_warps, loop=False)
    return {pipe: cycles for pipe, cycles in section.cycles.items() if cycles}


@pytest.mark.parametrize(
    ("text", "capability", "expected"),
    [
        # One warp's 32 lanes over a quarter of the SM's lanes per clock
        ("FFMA R1, R2, R3, R1", 80, {"fp32": 2, "issue": 1}),
        ("FFMA R1, R2, R3, R1", 90, {"fp32": 1, "issue": 1}),
        # Two results per lane save the issue slot, not the arithmetic
        ("FFMA2 R2, R4, R6, R2", 100, {"fp32": 2, "issue": 1}),
        ("IMAD.MOV.U32 R1, RZ, RZ, R2", 90, {"fp32": 2, "issue": 1}),
        ("HADD2.F32 R1, -RZ, R2.H0_H0", 90, {"fp16": 1, "issue": 1}),
        ("HADD2.F32 R1, -RZ, R2.H0_H0", 89, {"fp16": 2, "issue": 1}),
        ("LOP3.LUT R1, R2, R3, RZ, 0xc0, !PT", 90, {"alu": 2, "issue": 1}),
        ("IADD3 R1, R2, R3, RZ", 89, {"alu": 2, "issue": 1}),
        ("IADD3 R1, R2, R3, RZ", 120, {"alu": 1, "issue": 1}),
        ("MUFU.EX2 R1, R2", 90, {"exponential": 8, "issue": 1}),
        ("I2F.U8 R1, R2", 90, {"exponential": 8, "issue": 1}),
        ("F2FP.BF16.F32.PACK_AB R1, R2, R3", 90, {"conversion": 2, "issue": 1}),
        ("LDG.E.128 R4, desc[UR4][R2.64]", 90, {"load_store": 4, "issue": 1}),
        ("SHFL.BFLY PT, R1, R2, 0x1, 0x1f", 90, {"load_store": 4, "issue": 1}),
        # 16 bytes a lane: 512 of the SM's 128 per clock, 32 of which are a sub-core's
        ("LDSM.16.M88.4 R4, [R2]", 80, {"load_store": 4, "shared": 16, "issue": 1}),
        ("LDSM.16.M88.2 R4, [R2]", 80, {"load_store": 4, "shared": 8, "issue": 1}),
        ("STSM.16.M88 [R2], R4", 90, {"load_store": 4, "shared": 4, "issue": 1}),
        ("STS.128 [R2], R4", 80, {"load_store": 4, "shared": 16, "issue": 1}),
        ("STS.64 [R2], R4", 80, {"load_store": 4, "shared": 8, "issue": 1}),
        ("STS [R2], R4", 80, {"load_store": 4, "shared": 4, "issue": 1}),
        ("STS.U16 [R2], R4", 80, {"load_store": 4, "shared": 2, "issue": 1}),
        ("STS.U8 [R2], R4", 80, {"load_store": 4, "shared": 1, "issue": 1}),
        ("LDGSTS.E.BYPASS.128 [R2], [R4.64]", 80, {"load_store": 4, "shared": 16, "issue": 1}),
        # Lanes may read one word together, so plain loads move an unknown amount
        ("LDS.128 R4, [R2]", 80, {"load_store": 4, "issue": 1}),
        ("BAR.SYNC.DEFER_BLOCKING 0x0", 90, {"issue": 1}),
        ("UIADD3 UR4, UR5, 0x1, URZ", 90, {"issue": 1}),
        ("@!PT LDS RZ, [RZ]", 90, {"issue": 1}),
        ("@P0 MUFU.EX2 R1, R2", 90, {"exponential": 8, "issue": 1}),
        # 4096 FLOP over a quarter of 2048, 512, 4096 per clock
        ("HMMA.16816.F32.BF16 R4, R8, R12, R4", 80, {"tensor": 8, "issue": 1}),
        ("HMMA.16816.F32 R4, R8, R12, R4", 89, {"tensor": 32, "issue": 1}),
        ("HMMA.16816.F32 R4, R8, R12, R4", 90, {"tensor": 4, "issue": 1}),
        ("HMMA.1688.F32.TF32 R4, R8, R12, R4", 80, {"tensor": 8, "issue": 1}),
        # 2 x 64 x 256 x 16 / 4096; (64 + 256) x 16 numbers of 2 bytes / 128
        ("HGMMA.64x256x16.F32.BF16 R24, gdesc[UR16], R24", 90, {"tensor": 128, "shared": 80, "issue": 1}),
        ("HGMMA.64x64x16.F32 R24, gdesc[UR16], RZ, !UPT", 90, {"tensor": 32, "shared": 32, "issue": 1}),
        # The first factor comes from registers
        ("HGMMA.64x64x16.F32 R24, R88, gdesc[UR8].tnspB, R24, gsb0", 90, {"tensor": 32, "shared": 16, "issue": 1}),
    ],
)
def test_what_an_instruction_costs(text, capability, expected):
    assert cost(text, capability) == expected


DESCRIBED = """
    UMOV UR35, 0x8200490
    UIADD3 UR34, UR35, 0x1, URZ
    UTCHMMA {}, gdesc[UR12], tmem[UR9], tmem[UR34], idesc[UR35], UPT
"""


def test_products_of_a_whole_cta_are_shared_by_its_warps():
    # The descriptor says bf16, 128 x 128 (x 16): 524,288 FLOP at 8192 per clock are 64 clocks of the SM.
    assert cost(DESCRIBED.format("gdesc[UR6]"), 100, num_warps=4) == {"tensor": 64, "shared": 64, "issue": 1}
    assert cost(DESCRIBED.format("gdesc[UR6]"), 100, num_warps=8) == {"tensor": 32, "shared": 32, "issue": 1}
    assert cost(DESCRIBED.format("tmem[UR6]"), 100, num_warps=4) == {"tensor": 64, "shared": 32, "issue": 1}


@pytest.mark.parametrize(
    ("descriptor", "shape"), [("0x8200490", (128, 128, 16)), ("0x4080490", (64, 32, 16)), ("0x8400910", (128, 256, 8))]
)
def test_the_shape_is_read_from_the_descriptor(descriptor, shape):
    listing = code(DESCRIBED.format("gdesc[UR6]").replace("0x8200490", descriptor))
    made = product(listing, 2)
    assert (made.m, made.n, made.k) == shape and made.itemsize == 32 // made.k


@pytest.mark.parametrize(
    "text",
    [
        "QGMMA.64x128x32.F32.E4M3.E4M3 R24, gdesc[UR4], R24",
        "HMMA.16816.F16 R4, R8, R12, R4",
        "UTCHMMA.2CTA gdesc[UR6], gdesc[UR12], tmem[UR9], tmem[UR34], idesc[UR35], UPT",
        # No descriptor, two that are computed, one of 8-bit operands, one of fp16 sums
        DESCRIBED.format("gdesc[UR6]").replace("UMOV UR35", "UMOV UR36"),
        DESCRIBED.format("gdesc[UR6]").replace("UIADD3 UR34", "UIADD3 UR35"),
        DESCRIBED.format("gdesc[UR6]").replace("UMOV", "UBREV"),
        DESCRIBED.format("gdesc[UR6]").replace("0x8200490", "0x8200590"),
        DESCRIBED.format("gdesc[UR6]").replace("0x8200490", "0x8200480"),
    ],
    ids=["fp8", "fp16 sums", "two CTAs", "no descriptor", "computed", "reversed", "8 bits", "described sums"],
)
def test_unknown_products_are_refused(text):
    with pytest.raises(ValueError, match="tensor-core instruction"):
        cost(text, 100)


def test_unknown_capabilities_are_refused():
    for text in ("FFMA R1, R2, R3, R1", "HMMA.16816.F32 R4, R8, R12, R4"):
        with pytest.raises(ValueError, match=r"one of sm_80, sm_86, .*; got sm_75"):
            cost(text, 75)


def test_tensor_rates_are_those_of_the_tile_choice():
    assert rates.TENSOR == tiles.TENSOR_RATE
    for capability in rates.CAPABILITIES:
        # The tile choice counts FLOP: a multiply-add on each lane is two.
        assert 2 * rates.lanes(rates.KIND_OF["FFMA"], capability) == tiles.FP32_RATE[capability]


def test_a_section_adds_up_and_names_the_busiest_pipe():
    listing = code("MUFU.EX2 R1, R2\n@!PT LDS RZ, [RZ]\nMUFU.RCP R1, R2\nFADD R1, R2, R3")
    section = measure(listing, range(4), 90, 4, loop=True)
    assert (section.instructions, section.bound, section.flops, section.loop) == (4, "exponential", 0, True)
    assert section.mix == {"MUFU": 2, "LDS": 1, "FADD": 1} and next(iter(section.mix)) == "MUFU"
    assert section.cycles["exponential"] == 16 and section.cycles["issue"] == 4 and section.cycles["load_store"] == 0
    assert set(section.cycles) == set(rates.PIPES)


GEMM = """
    MOV R1, R2
    .L_x_0:
    LDSM.16.M88.4 R8, [R2]
    HMMA.16816.F32 R4, R8, R12, R4
    HMMA.16816.F32 R4, R8, R12, R4
    @P0 BRA `(.L_x_0)
    FADD R4, R4, R1
    @P1 BRA `(.L_x_1)
    MUFU.TANH R4, R4
    CALL.REL.NOINC `($__internal_0_$__cuda_sm20_rem_s64)
    .L_x_1:
    STG.E [R2], R4
    EXIT
    $__internal_0_$__cuda_sm20_rem_s64:
    IMAD R1, R1, R2, RZ
    RET.REL.NODEC R4 `(kernel)
"""


def test_the_main_loop_and_the_epilogue_of_a_plain_kernel():
    kernel = Kernel(code(GEMM), 80, 4)
    (loop,) = kernel.main_loops
    assert loop.instructions == 4 and loop.flops == 2 * 4096 and loop.loop
    assert loop.cycles["tensor"] == 16 and loop.cycles["shared"] == 16
    # FADD, BRA, MUFU, CALL, STG, EXIT: both sides of the condition, not the subroutine
    assert kernel.epilogue == Epilogue(6, 0)
    assert kernel.whole.instructions == 11 and not kernel.whole.loop


def test_of_two_main_loops_the_last_one_has_the_epilogue():
    kernel = Kernel(
        code("""
            MOV R1, R2
            .L_x_0:
            HMMA.16816.F32 R4, R8, R12, R4
            @P0 BRA `(.L_x_0)
            FMUL R1, R2, R3
            FMUL R1, R2, R3
            .L_x_1:
            HMMA.16816.F32 R4, R8, R12, R4
            FADD R1, R2, R3
            @P0 BRA `(.L_x_1)
            STG.E [R2], R4
            EXIT
        """),
        80,
        4,
    )
    assert [loop.instructions for loop in kernel.main_loops] == [2, 3]
    assert kernel.epilogue == Epilogue(2, 0)


PERSISTENT = """
    MOV R1, R2
    .L_x_0:
    IADD3 R1, R1, R2, RZ
    HMMA.16816.F32 R4, R8, R12, RZ
    .L_x_1:
    HMMA.16816.F32 R4, R8, R12, R4
    SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R2]
    @!P0 BRA `(.L_x_4)
    .L_x_2:
    @P1 BRA `(.L_x_1)
    FADD R4, R4, R1
    .L_x_3:
    STG.E [R2], R4
    @P3 BRA `(.L_x_3)
    @P2 BRA `(.L_x_0)
    FADD R1, R2, R3
    FADD R1, R2, R3
    EXIT
    .L_x_4:
    SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R2]
    @!P0 BRA `(.L_x_4)
    BRA `(.L_x_2)
"""


def test_a_persistent_kernel_has_one_tiles_epilogue():
    kernel = Kernel(code(PERSISTENT), 80, 4)
    # The loop over tiles holds a product, too, but also the loop that is meant; the wait behind the end is nested.
    (loop,) = kernel.main_loops
    assert loop.mix == {"BRA": 3, "HMMA": 1, "SYNCS": 1}
    # FADD, STG and its BRA back (one trip of it), BRA to the next tile; nothing of what follows the last tile
    assert kernel.epilogue == Epilogue(4, 1)


def test_a_flattened_persistent_kernel_is_split_at_what_only_the_last_trip_passes():
    kernel = Kernel(
        code("""
            MOV R1, R2
            .L_x_0:
            @P3 BRA `(.L_x_1)
            UMOV UR4, URZ
            .L_x_1:
            HMMA.16816.F32 R4, R8, R12, R4
            @P0 BRA `(.L_x_2)
            FADD R4, R4, R1
            @P1 BRA `(.L_x_3)
            MUFU.TANH R4, R4
            .L_x_3:
            UTMASTG.2D [UR4], [UR6]
            .L_x_2:
            IADD3 R1, R1, R2, RZ
            @P2 BRA `(.L_x_0)
            EXIT
        """),
        90,
        8,
    )
    (loop,) = kernel.main_loops
    # The other condition stores nothing and stays.
    assert loop.mix == {"BRA": 3, "UMOV": 1, "HMMA": 1, "IADD3": 1}
    assert kernel.epilogue == Epilogue(4, 0)


SPECIALIZED = """
    @P0 BRA `(.L_x_9)
    .L_x_0:
    UTMALDG.2D [UR4], [UR6]
    @P1 BRA `(.L_x_0)
    EXIT
    .L_x_9:
    @P2 BRA `(.L_x_2)
    .L_x_1:
    HGMMA.64x128x16.F32 R24, gdesc[UR4], R24
    @P1 BRA `(.L_x_1)
    {store} [R2], R4
    EXIT
    .L_x_2:
    HGMMA.64x128x16.F32 R24, gdesc[UR4], R24
    @P1 BRA `(.L_x_2)
    FADD R4, R4, R1
    {store} [R2], R4
    EXIT
"""


def test_each_group_of_multiplying_warps_has_its_loop_and_the_longest_epilogue_counts():
    kernel = Kernel(code(SPECIALIZED.format(store="STG.E")), 90, 12)
    assert [loop.mix for loop in kernel.main_loops] == [{"HGMMA": 1, "BRA": 1}] * 2
    assert kernel.epilogue == Epilogue(3, 0)


def test_where_nothing_is_stored_behind_the_main_loop_there_is_no_epilogue_to_count():
    assert Kernel(code(SPECIALIZED.format(store="STS")), 90, 12).epilogue is None


HANDED_OVER = """
    @P0 BRA `(.L_x_1)
    .L_x_0:
    LDS R4, [R2]
    FADD R4, R4, R1
    STG.E [R2], R4
    @P1 BRA `(.L_x_0)
    EXIT
    .L_x_1:
    HGMMA.64x128x16.F32 R24, gdesc[UR4], R24
    @P1 BRA `(.L_x_1)
    STS [R2], R4
    EXIT
"""


def test_where_others_finish_than_those_that_multiply_both_are_counted():
    kernel = Kernel(code(HANDED_OVER), 90, 12)
    assert kernel.epilogue is None and kernel.finishing == (Epilogue(2, 0), Epilogue(4, 0))
    # Nobody finishes, or those that multiply do.
    nobody = HANDED_OVER.replace("STG.E", "STS")
    assert Kernel(code(nobody), 90, 12).finishing is None
    assert Kernel(code(nobody.replace("HGMMA", "STG.E [R2], R4\n    HGMMA")), 90, 12).finishing is None
    kernel = Kernel(code(HANDED_OVER.replace("STS", "STG.E")), 90, 12)
    assert kernel.epilogue == Epilogue(2, 0) and kernel.finishing is None


def test_without_products_the_hottest_loops_are_the_main_ones():
    text = """
        MOV R1, R2
        .L_x_0:
        MUFU.EX2 R1, R2
        MUFU.EX2 R1, R2
        @P0 BRA `(.L_x_0)
        .L_x_1:
        LDG.E R4, [R2]
        @P0 BRA `(.L_x_1)
        .L_x_2:
        FADD R1, R2, R3
        MUFU.EX2 R1, R2
        @P0 BRA `(.L_x_2)
        STG.E [R2], R4
        EXIT
    """
    kernel = Kernel(code(text), 90, 4)
    # 16 and 8 cycles of the exponential unit; 4 of loads are less than half of 16
    assert [loop.cycles[loop.bound] for loop in kernel.main_loops] == [16, 8]
    assert kernel.epilogue == Epilogue(2, 0)


def test_products_outside_of_all_loops_leave_no_main_loop():
    kernel = Kernel(
        code("""
            HMMA.16816.F32 R4, R8, R12, R4
            .L_x_0:
            SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R2]
            @!P0 BRA `(.L_x_0)
            STG.E [R2], R4
            EXIT
        """),
        80,
        4,
    )
    assert kernel.main_loops == [] and kernel.whole.flops == 4096


def test_a_kernel_without_a_loop():
    kernel = Kernel(code("LDG.E R4, [R2]\nHMMA.16816.F32 R4, R8, R12, R4\nSTG.E [R2], R4\nEXIT"), 80, 4)
    assert kernel.main_loops == [] and kernel.epilogue is None
    assert kernel.whole.instructions == 4 and kernel.whole.flops == 4096
    assert Kernel(code("FADD R1, R2, R3\nEXIT"), 80, 4).main_loops == []
