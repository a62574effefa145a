"""Reads compiled kernels: registers, stack, tensor-core instructions and load widths from the machine code.

Uses the disassemblers that come inside the Triton wheel, so no CUDA toolkit and no GPU are needed.
"""

from __future__ import annotations

import bisect
import functools
import os
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import triton

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

# Tensor-core instructions, most specific first: tcgen05 of sm_100, wgmma of sm_90, mma of sm_80 and sm_120.
_TENSOR = (
    ("UTCMMA", re.compile(r"\bUTC[A-Z]*MMA\b")),
    ("HGMMA", re.compile(r"\b[HQI]GMMA\b")),
    ("HMMA", re.compile(r"\b[HQI]MMA\b")),
)
_LOADS = re.compile(r"\b(?:LDG|LDGSTS)\b([.\w]*)")
_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", re.MULTILINE)
_PARTS = re.compile(r"(?:@(!?U?P\w+)\s+)?([\w.]+)\s*(.*)", re.DOTALL)
_LABEL = re.compile(r"^(\.L_\w+):", re.MULTILINE)
_TARGET = re.compile(r"\.L_\w+")


@dataclass(frozen=True)
class Resources:
    """What one kernel takes. registers: per thread; stack, local: bytes per thread (spills appear as stack)."""

    registers: int
    stack: int
    local: int

    @property
    def spilled_bytes(self) -> int:
        return self.stack + self.local


@dataclass(frozen=True)
class CodeFacts:
    """What the machine code shows.

    tensor: UTCMMA, HGMMA, HMMA, FFMA (no tensor core, but multiply-adds) or "none"; load_bytes: the widest global load
    of one thread in bytes, 0 when there is none; tma: loads through the tensor memory accelerator; specialized: warps
    change their register budgets, which is what warp specialization leaves in the code.
    """

    tensor: str
    load_bytes: int
    tma: bool
    specialized: bool
    instructions: int


@dataclass(frozen=True)
class Instruction:
    """One machine instruction.

    predicate: "P0", "!UP1", "!PT" (never executed), or "" (always); opcode: with its modifiers, such as
    "HMMA.16816.F32.BF16"; targets: the positions in the listing of the labels that the operands name.
    """

    predicate: str
    opcode: str
    operands: str
    targets: tuple[int, ...] = ()

    @property
    def base(self) -> str:
        """The opcode without modifiers."""
        return self.opcode.partition(".")[0]


def _run_tool(tool: str, arguments: list[str], cubin: bytes) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "kernel.cubin")
        Path(path).write_bytes(cubin)
        command = [str(_TOOLS / tool), *arguments, path]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def resources(cubin: bytes) -> Resources:
    """Registers and stack of the (single) kernel in a cubin."""
    text = _run_tool("cuobjdump", ["--dump-resource-usage"], cubin)
    found = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
    if "REG" not in found:
        raise ValueError(f"cuobjdump reported no register count: {text.strip()!r}")
    return Resources(found["REG"], found.get("STACK", 0), found.get("LOCAL", 0))


@functools.lru_cache(maxsize=4)
def _listing(cubin: bytes) -> str:
    """nvdisasm's. It takes most of a second however small the kernel is, and several functions here read it."""
    return _run_tool("nvdisasm", ["--print-code"], cubin)


def disassemble(cubin: bytes) -> list[str]:
    """The instructions of a cubin in order, one string each."""
    return _INSTRUCTION.findall(_listing(cubin))


def parse(listing: str) -> list[Instruction]:
    """The instructions of nvdisasm's listing of one kernel, with the labels resolved."""
    found = list(_INSTRUCTION.finditer(listing))
    starts = [match.start() for match in found]
    labels = {match[1]: bisect.bisect_left(starts, match.start()) for match in _LABEL.finditer(listing)}
    instructions = []
    for match in found:
        parts = _PARTS.fullmatch(match[1])
        if parts is None:
            raise ValueError(f"nvdisasm printed an instruction that cannot be read: {match[1]!r}")
        predicate, opcode, operands = parts.groups()
        targets = tuple(labels[name] for name in _TARGET.findall(operands))
        instructions.append(Instruction(predicate or "", opcode, operands, targets))
    return instructions


def instructions(cubin: bytes) -> list[Instruction]:
    """The instructions of the (single) kernel in a cubin, in order."""
    return parse(_listing(cubin))


def load_width(modifiers: str) -> int:
    """Bytes per thread of a global load with these modifiers, such as ".E.128.CONSTANT"."""
    parts = modifiers.split(".")
    for bits in (256, 128, 64):
        if str(bits) in parts:
            return bits // 8
    if {"U16", "S16"} & set(parts):
        return 2
    if {"U8", "S8"} & set(parts):
        return 1
    return 4


def code_facts(cubin: bytes) -> CodeFacts:
    """Tensor-core kind, load width and TMA use of a compiled kernel."""
    instructions = disassemble(cubin)
    text = "\n".join(instructions)
    tensor = next((kind for kind, pattern in _TENSOR if pattern.search(text)), "")
    if not tensor:
        tensor = "FFMA" if re.search(r"\bFFMA2?\b", text) else "none"
    widths = [load_width(match) for match in _LOADS.findall(text)]
    return CodeFacts(
        tensor=tensor,
        load_bytes=max(widths, default=0),
        tma="UTMALDG" in text,
        specialized="USETMAXREG" in text,
        instructions=len(instructions),
    )
