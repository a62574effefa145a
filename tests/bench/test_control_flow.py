"""Loops of hand-written listings with the shapes that ptxas gives to loops, waits and dispatches."""

from __future__ import annotations

import pytest

from tests.bench.listing import code
from vit_bench.control_flow import ControlFlow
from vit_bench.sass import parse


def loops(flow: ControlFlow) -> dict[str, list[str]]:
    """The opcodes of each loop's own instructions, by the operands of its first one."""
    return {
        flow.instructions[loop.header].operands: [i.opcode for i in flow.code(loop.own)] for loop in flow.loops.values()
    }


def test_instructions_are_taken_apart():
    first, second, third, fourth = code("""
        @!UP1 UTMALDG.2D [UR4], [UR12]
        HMMA.16816.F32.BF16 R4, R8.reuse, R12, R4
        .L_x_0:
        EXIT
        @P2 BRA `(.L_x_0)
    """)
    assert (first.predicate, first.opcode, first.base) == ("!UP1", "UTMALDG.2D", "UTMALDG")
    assert (second.predicate, second.operands) == ("", "R4, R8.reuse, R12, R4")
    assert (third.opcode, third.operands, third.targets) == ("EXIT", "", ())
    assert (fourth.predicate, fourth.base, fourth.targets) == ("P2", "BRA", (2,))


def test_what_cannot_be_read_is_refused():
    with pytest.raises(ValueError, match="cannot be read: '@@'"):
        parse("        /*0000*/                   @@ ;")


def test_a_loop_with_its_entry_and_exit():
    flow = ControlFlow(
        code("""
            ISETP P0
            @!P0 BRA `(.L_x_1)
            .L_x_0:
            FFMA loop
            @P1 BRA `(.L_x_0)
            .L_x_1:
            STG out
            EXIT
            .L_x_2:
            BRA `(.L_x_2)
        """)
    )
    assert loops(flow) == {"loop": ["FFMA", "BRA"]}  # the last line is where no path leads
    (loop,) = flow.loops.values()
    assert flow.exits(loop) == {4} and loop.parent is None and loop.latches == (2,)
    assert flow.dominates(0, 4) and not flow.dominates(2, 4)


def test_nested_loops_belong_to_themselves():
    flow = ControlFlow(
        code("""
            MOV start
            .L_x_0:
            IADD3 outer
            .L_x_1:
            FFMA middle
            .L_x_2:
            MUFU inner
            @P0 BRA `(.L_x_2)
            @P0 BRA `(.L_x_1)
            STG outer
            @P1 BRA `(.L_x_0)
            EXIT
        """)
    )
    assert loops(flow) == {"outer": ["IADD3", "STG", "BRA"], "middle": ["FFMA", "BRA"], "inner": ["MUFU", "BRA"]}
    assert {header: loop.parent for header, loop in flow.loops.items()} == {1: None, 2: 1, 3: 2}


def test_a_waiting_loop_behind_the_kernel_makes_no_loop_of_what_it_jumps_over():
    flow = ControlFlow(
        code("""
            MOV start
            .L_x_0:
            UTCHMMA main
            SYNCS.TRYWAIT P0
            @!P0 BRA `(.L_x_2)
            .L_x_1:
            IADD3 main
            @P1 BRA `(.L_x_0)
            STG out
            EXIT
            .L_x_2:
            SYNCS wait
            @!P0 BRA `(.L_x_2)
            BRA `(.L_x_1)
        """)
    )
    # The last BRA goes back in the listing, but what it goes to can be reached without it: no loop.
    assert loops(flow) == {
        "main": ["UTCHMMA", "SYNCS.TRYWAIT", "BRA", "IADD3", "BRA", "BRA"],
        "wait": ["SYNCS", "BRA"],
    }


def test_a_call_of_a_label_leaves_the_loop_and_a_named_subroutine_returns():
    flow = ControlFlow(
        code("""
            MOV start
            .L_x_0:
            HMMA main
            CALL.REL.NOINC `($__internal_0_$__cuda_sm20_div_s64)
            @P0 CALL.REL.NOINC `(.L_x_1)
            BRA `(.L_x_0)
            .L_x_1:
            STG out
            EXIT
            $__internal_0_$__cuda_sm20_div_s64:
            IMAD subroutine
            RET.REL.NODEC R4 `(kernel)
        """)
    )
    assert loops(flow) == {"main": ["HMMA", "CALL.REL.NOINC", "CALL.REL.NOINC", "BRA"]}
    reached = [i.operands for i in flow.code(flow.blocks)]
    assert "out" in reached and "subroutine" not in reached


def test_conditions_among_the_operands_and_jump_tables():
    flow = ControlFlow(
        code("""
            BRA.U UP0, `(.L_x_3)
            .L_x_0:
            MOV head
            BRX R2 -0x2b50 (*"BRANCH_TARGETS .L_x_1,.L_x_2"*)
            MOV never
            .L_x_1:
            FADD one
            BRA `(.L_x_0)
            .L_x_2:
            FMUL two
            @P0 EXIT
            BRA `(.L_x_0)
            .L_x_3:
            EXIT
        """)
    )
    assert loops(flow) == {"head": ["MOV", "BRX", "FADD", "BRA", "FMUL", "EXIT", "BRA"]}
    assert "never" not in [i.operands for i in flow.code(flow.blocks)]
    # Past the jump table there are two ways; neither dominates the other.
    assert not flow.dominates(4, 6) and not flow.dominates(6, 4) and flow.dominates(1, 6)


def test_the_way_onwards_stops_at_branches_back_and_at_the_border():
    flow = ControlFlow(
        code("""
            MOV start
            .L_x_0:
            FFMA k
            @P0 BRA `(.L_x_0)
            @P1 BRA `(.L_x_1)
            STG some
            .L_x_1:
            IADD3 next
            @P2 BRA `(.L_x_0)
            EXIT
        """)
    )
    found = flow.reachable({3})
    assert [i.operands for i in flow.code(found)] == ["`(.L_x_1)", "some", "next", "`(.L_x_0)", ""]
    assert flow.reachable({3}, within={3, 5}) == {3, 5}
    assert flow.reachable({1}, within={3, 5}) == set()
