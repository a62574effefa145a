"""How fast the units of one SM are: lanes per clock by kind of instruction, and tensor-core FLOP per clock.

Sources:
[G] CUDA C++ Programming Guide 12 (section "Arithmetic Instructions") and CUDA C++ Best Practices Guide 13 (section
    "Arithmetic Instructions"), table "Throughput of Native Arithmetic Instructions": results per clock and SM. A packed
    16-bit instruction has two results per lane.
[N] Nsight Compute, Profiling Guide, section "Pipelines": which unit executes what.
[W] NVIDIA's architecture whitepapers and datasheets of A100, GA102, Ada, H100 and RTX Blackwell, HGX B200 datasheet.
"""

from __future__ import annotations

from dataclasses import dataclass

CAPABILITIES = (80, 86, 89, 90, 100, 120)

SUB_CORES = 4  # each issues one instruction of one warp per clock [W]
WARP = 32

PIPES: tuple[str, ...] = ("tensor", "fp32", "fp16", "alu", "exponential", "conversion", "load_store", "shared", "issue")


@dataclass(frozen=True)
class Kind:
    """Instructions of one throughput. lanes: per clock and SM, in the order of CAPABILITIES."""

    pipe: str
    lanes: tuple[int, int, int, int, int, int]
    opcodes: str


_KINDS = (
    # [G] 32-bit floating-point add, multiply, multiply-add
    Kind("fp32", (64, 128, 128, 128, 128, 128), "FFMA FMUL FADD FHADD FHFMA FSWZADD"),
    # Two of those per lane in one instruction: the issue slot is saved, not the arithmetic ([W]: the peak stays).
    Kind("fp32", (32, 64, 64, 64, 64, 64), "FFMA2 FMUL2 FADD2"),
    # [G] 32-bit integer multiply, multiply-add; on the multiply-add pipe [N]
    Kind("fp32", (64, 64, 64, 64, 64, 64), "IMAD IMUL IDP"),
    # [G] 16-bit floating-point add, multiply, multiply-add: 256 results, GeForce 128
    Kind("fp16", (128, 64, 64, 128, 128, 64), "HADD2 HMUL2 HFMA2"),
    # [G] 32-bit integer add, subtract, minimum, maximum: 64, RTX Blackwell 128
    Kind("alu", (64, 64, 64, 64, 64, 128), "IADD3 IADD VIADD VIADDMNMX VIMNMX VIMNMX3 IMNMX"),
    # [G] 32-bit floating-point minimum, maximum: 64, B200 128
    Kind("alu", (64, 64, 64, 64, 128, 64), "FMNMX FMNMX3"),
    # [G] compare, shift, bitwise operations: 64; the rest of the pipe's work alike [N]
    Kind(
        "alu",
        (64, 64, 64, 64, 64, 64),
        "LOP3 LOP SHF SHL SHR ISETP FSETP FSET SEL FSEL PRMT LEA PLOP3 IABS SGXT BMSK P2R R2P MOV CS2R FCHK VOTE "
        "HMNMX2 HSETP2 HSET2 VABSDIFF VABSDIFF4 VHMNMX",
    ),
    # [G] reciprocal, rsqrt, base-2 exp and log: 16. The same unit makes the slow conversions, also at 16, and counts
    # bits [N].
    Kind("exponential", (16, 16, 16, 16, 16, 16), "MUFU F2F F2I I2F FRND POPC FLO BREV"),
    # Two 32-bit floats packed into 16 bits each, and int32 to float: at the rate of the simple integer operations
    Kind("conversion", (64, 64, 64, 64, 64, 64), "F2FP F2IP I2FP I2IP"),
    # [G] warp shuffle: 32; loads and stores alike: shared memory has 32 banks
    Kind(
        "load_store",
        (32, 32, 32, 32, 32, 32),
        "LDS STS LDSM STSM LDG STG LDGSTS LD ST LDL STL LDC SHFL ATOM ATOMG ATOMS RED REDG",
    ),
)

KIND_OF = {opcode: kind for kind in _KINDS for opcode in kind.opcodes.split()}

# Shared memory: 32 banks of 4 bytes per clock and SM [G, section "Shared Memory"].
SHARED_BYTES = 128

# Dense FLOP per clock and SM of 16-bit operands with fp32 sums, a multiply-add being two: the datasheets' peak divided
# by SMs and clock [W]. Operands of 32 bits (tf32) run at half of it.
TENSOR = {80: 2048, 86: 512, 89: 512, 90: 4096, 100: 8192, 120: 512}


def _known(capability: int) -> int:
    if capability not in CAPABILITIES:
        known = ", ".join(f"sm_{c}" for c in CAPABILITIES)
        raise ValueError(f"capability must be one of {known}; got sm_{capability}")
    return capability


def lanes(kind: Kind, capability: int) -> int:
    """Lanes per clock and SM. Raises ValueError for a capability without figures."""
    return kind.lanes[CAPABILITIES.index(_known(capability))]


def tensor(capability: int, itemsize: int) -> float:
    """Tensor-core FLOP per clock and SM, operands of 2 bytes (fp16, bf16) or 4 (tf32). Raises ValueError as `lanes`."""
    return TENSOR[_known(capability)] * 2 / itemsize
