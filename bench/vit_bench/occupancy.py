"""How many CTAs of a compiled kernel one SM holds at a time: CUDA's occupancy rules, no GPU needed."""

from __future__ import annotations

from dataclasses import dataclass

from vit_kernels.device import Device


@dataclass(frozen=True)
class _Limits:
    """Most CTAs and warps that are resident on one SM."""

    ctas: int
    warps: int


# CUDA C++ Programming Guide, table "Technical Specifications per Compute Capability": maximum number of resident blocks
# and warps per SM.
_LIMITS = {
    80: _Limits(32, 64),
    86: _Limits(16, 48),
    89: _Limits(24, 48),
    90: _Limits(32, 64),
    100: _Limits(32, 64),
    120: _Limits(24, 48),
}
# The same table: 64K registers per SM, at most 255 per thread, and on all of these capabilities an SM with 1 KiB more
# shared memory than one CTA may ask for, which is what the system uses per CTA. Granularities and the four parts of an
# SM: cuda_occupancy.h of the CUDA toolkit.
_REGISTERS_PER_SM = 65_536
_MOST_REGISTERS = 255
_SUB_CORES = 4
_REGISTERS_GRANULARITY = 256  # per warp
_SHARED_RESERVED = 1024  # per CTA
_SHARED_GRANULARITY = 128


def _up(value: int, step: int) -> int:
    return -(-value // step) * step


def ctas_per_sm(device: Device, registers: int, shared: int, num_warps: int) -> int:
    """CTAs of one kernel that are resident on one SM of `device` at a time; 0 when not even one fits.

    registers: per thread, as the kernel is launched; shared: bytes of shared memory per CTA, static and dynamic;
    num_warps: warps per CTA, those of all partitions of a warp-specialised kernel.

    The least of four limits: resident CTAs; resident warps; registers, which each of the SM's four sub-cores gives to
    whole warps in portions of 256; shared memory in portions of 128 bytes with 1 KiB reserved per CTA.

    Raises ValueError for a negative number, for num_warps below 1 and for a compute capability without an entry here.
    Source: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"; cuda_occupancy.h.
    """
    for name, value, least in (("registers", registers, 0), ("shared", shared, 0), ("num_warps", num_warps, 1)):
        if value < least:
            raise ValueError(f"{name} must be at least {least}; got {value}")
    if device.capability not in _LIMITS:
        known = ", ".join(f"sm_{capability}" for capability in _LIMITS)
        raise ValueError(f"device must have one of the capabilities {known}; got sm_{device.capability}")
    if registers > _MOST_REGISTERS:
        return 0
    limits = _LIMITS[device.capability]
    per_warp = _up(max(registers, 1) * 32, _REGISTERS_GRANULARITY)
    warps_by_registers = _REGISTERS_PER_SM // _SUB_CORES // per_warp * _SUB_CORES
    return min(
        limits.ctas,
        limits.warps // num_warps,
        warps_by_registers // num_warps,
        (device.shared_memory + _SHARED_RESERVED) // _up(shared + _SHARED_RESERVED, _SHARED_GRANULARITY),
    )
