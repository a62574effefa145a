"""What is known of one model on one GPU from its compiled code, shapes and datasheets: launch by launch, without a GPU.

    inspection = inspect_model("vit_base_patch16_224", "h100", batch=64, dtype="bf16")

All of it are bounds, from the code (`vit_bench.pipes`) or by arithmetic (`vit_bench.roofline`), not measurements.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from math import prod
from typing import Any

import torch

from vit_bench import records
from vit_bench.modelled import blocks_of, modelled_seconds
from vit_bench.occupancy import ctas_per_sm
from vit_bench.pipes import Kernel, Section
from vit_bench.plan import DTYPES, Call, launch_labels, model_calls
from vit_bench.recording import Launch, gpu, recording, require_compiler
from vit_bench.roofline import PEAKS, Roofline, launch_flops, operand_bytes, roofline
from vit_bench.sass import CodeFacts, code_facts, instructions
from vit_engine.config import ViTConfig
from vit_kernels.device import Device
from vit_kernels.linear_roles_finish import WARPS
from vit_kernels.linear_roles_ring import NARROW, ROWS

NOTE = (
    "Compiled only: no GPU was used and nothing was executed or timed. Registers, shared memory and instructions are "
    "read from the machine code; cycles and times are bounds computed from it and from datasheets, not measurements."
)

_TILE = ("BLOCK_M", "BLOCK_N", "BLOCK_K", "BLOCK_H")
# Results of a thread in one trip of the loop of the warps that finish, in every kernel that has some.
_FINISHED_PER_TRIP = ROWS.value * NARROW.value / (32 * WARPS.value)


@dataclass(frozen=True)
class EpilogueCost:
    """outputs_per_thread: elements of the result's tile over the threads that hold it (None where these are unknown);
    slots_per_output: instructions over outputs, which is issue slots per output element.

    Where other warps finish than those that multiply, instructions and outputs_per_thread are those of one trip of
    their loop, and handed_over slots an output come in front of it, in slots_per_output with the rest."""

    instructions: int
    loops: int
    outputs_per_thread: float | None
    slots_per_output: float | None
    handed_over: float | None = None


@dataclass(frozen=True)
class LaunchReport:
    """One launch of the forward pass.

    times: per forward; tile: its BLOCK_ sizes; shared, shared_limit: bytes per CTA; ctas_per_sm: resident at a time;
    waves: CTAs over what all SMs hold at a time; stack: bytes per thread, spills included; code: `sass.CodeFacts`;
    main_loops: one trip of each; repeated: tensor-core FLOP in such a trip over those that the CTA's tile needs, above
    1 where warps compute what others compute too (None without tensor cores, and where the warps' parts are not known);
    whole: all of a kernel that multiplies no matrices; roofline: of one launch; modelled_s: seconds that the tile
    choice's model gives it (`vit_bench.modelled`), None in fp32 and where there is no model.
    """

    label: str
    kernel: str
    times: int
    tile: dict[str, int]
    num_warps: int
    num_stages: int
    grid: tuple[int, int, int]
    registers: int
    stack: int
    shared: int
    shared_limit: int
    ctas_per_sm: int
    waves: float
    code: CodeFacts
    main_loops: list[Section]
    repeated: float | None
    whole: Section | None
    epilogue: EpilogueCost | None
    roofline: Roofline
    modelled_s: float | None


@dataclass(frozen=True)
class Forward:
    """The roofline of a whole forward pass: sums over its launches, each as often as it is made.

    bound_s: the sum of each launch's larger time; images_per_s: the batch over that; modelled_s: the sum of modelled
    times, of the larger bound where a launch has none; None where no launch has one.
    """

    launches: int
    flops: int
    bytes: int
    compute_s: float
    memory_s: float
    bound_s: float
    images_per_s: float
    modelled_s: float | None


@dataclass(frozen=True)
class Inspection:
    """All of it, for one model, GPU, batch size and dtype."""

    model: str
    device: Device
    batch: int
    dtype: str
    launches: list[LaunchReport]
    forward: Forward

    def as_json(self) -> dict[str, Any]:
        """Plain values under the names of the dataclasses, with the note and the versions that compiled."""
        launches = []
        for launch in self.launches:
            bound = {"bound": launch.roofline.bound}
            launches.append({**asdict(launch), "roofline": asdict(launch.roofline) | bound})
        return {
            "rung": "compiled only",
            "note": NOTE,
            "model": self.model,
            "gpu": asdict(self.device),
            "peaks": asdict(PEAKS[self.device]),
            "batch": self.batch,
            "dtype": self.dtype,
            "versions": records.versions(),
            "launches": launches,
            "forward": asdict(self.forward),
        }


def inspect_model(model: str, gpu_name: str, batch: int, dtype: str) -> Inspection:
    """Compiles the launches of one forward pass of a preset and takes the machine code apart.

    model: a name in `vit_engine.config.PRESETS`; gpu_name: as for `vit_bench.recording.gpu`; batch: images, at least 1;
    dtype: "fp32", "fp16" or "bf16".

    Raises ValueError for an argument that is none of these, RuntimeError where Triton interprets instead of compiling.
    """
    require_compiler()
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}; got {dtype!r}")
    if batch < 1:
        raise ValueError(f"batch must be at least 1; got {batch}")
    device, config = gpu(gpu_name), ViTConfig.preset(model)
    found = recorded_launches(model_calls(config, batch, DTYPES[dtype]), device)
    launches = [report(launch, label, call.times, device, DTYPES[dtype]) for call, label, launch in found]
    return Inspection(model, device, batch, dtype, launches, _forward(launches, batch))


def recorded_launches(calls: Iterable[Call], device: Device) -> Iterator[tuple[Call, str, Launch]]:
    """(call, label, launch) of each launch, compiled for `device`, of those calls that a forward pass makes."""
    with recording(device, torch_device="meta") as recorder:
        for call in calls:
            if not call.times:
                continue
            recorder.launches.clear()
            call.run()
            launches = list(recorder.launches)
            labels = launch_labels(call.label, [launch.kernel for launch in launches])
            yield from ((call, label, launch) for label, launch in zip(labels, launches, strict=True))


def arguments_of(launch: Launch) -> dict[str, Any]:
    """A launch's arguments by name, as they were passed, with the sizes of blocks that only its descriptors tell."""
    arguments = dict(zip(launch.names, launch.values, strict=True))
    return arguments | blocks_of(arguments)


def tile_of(arguments: Mapping[str, Any]) -> dict[str, int]:
    """The BLOCK_ sizes among a launch's arguments: "m" to BLOCK_M."""
    return {name[6:].lower(): arguments[name] for name in _TILE if name in arguments}


def resident_ctas(launch: Launch, device: Device) -> int:
    """CTAs of a launch that an SM holds at a time. Raises RuntimeError where not even one fits."""
    resident = ctas_per_sm(device, launch.binary.resources.registers, launch.shared, launch.num_warps)
    if not resident:
        raise RuntimeError(f"not even one CTA of {launch.kernel} fits an SM of {device.name}")
    return resident


def modelled_time(launch: Launch, arguments: Mapping[str, Any], dtype: torch.dtype, device: Device) -> float | None:
    """`modelled_seconds` of a recorded launch; None in fp32, too."""
    if dtype == torch.float32:
        return None
    ctas = prod(launch.grid)
    return modelled_seconds(launch.kernel, arguments, ctas, launch.num_warps, launch.num_stages, device)


def report(launch: Launch, label: str, times: int, device: Device, dtype: torch.dtype) -> LaunchReport:
    """One recorded launch, taken apart."""
    arguments = arguments_of(launch)
    binary = launch.binary
    kernel = Kernel(instructions(binary.cubin), device.capability, launch.num_warps)
    facts = code_facts(binary.cubin)
    flops = launch_flops(launch.kernel, arguments)
    resident = resident_ctas(launch, device)
    return LaunchReport(
        label=label,
        kernel=launch.kernel,
        times=times,
        tile=tile_of(arguments),
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
        grid=launch.grid,
        registers=binary.resources.registers,
        stack=binary.resources.spilled_bytes,
        shared=launch.shared,
        shared_limit=device.shared_memory,
        ctas_per_sm=resident,
        waves=prod(launch.grid) / (resident * device.sm_count),
        code=facts,
        main_loops=kernel.main_loops,
        repeated=None if facts.specialized else _repeated(kernel, arguments, launch.num_warps),
        whole=None if flops else kernel.whole,
        epilogue=_epilogue(kernel, arguments, launch.num_warps, facts.specialized) if flops else None,
        roofline=roofline(flops, operand_bytes(tensors_of(launch.values)), dtype, device),
        modelled_s=modelled_time(launch, arguments, dtype, device),
    )


def tensors_of(values: tuple[Any, ...]) -> list[torch.Tensor]:
    """The tensors among a launch's arguments, those behind tensor descriptors too."""
    found = [getattr(value, "base", value) if hasattr(value, "block_shape") else value for value in values]
    return [value for value in found if isinstance(value, torch.Tensor)]


def _epilogue(kernel: Kernel, arguments: Mapping[str, Any], num_warps: int, specialized: bool) -> EpilogueCost | None:
    def per_output(instructions: int) -> tuple[float | None, float | None]:
        """Outputs of a thread that multiplies, and these instructions over them."""
        columns = _width(arguments) if "WIDTH" in arguments else arguments["BLOCK_N"]
        warps = _multiplying_warps(kernel, arguments) if specialized else num_warps
        outputs = arguments["BLOCK_M"] * columns / (32 * warps) if warps else None
        return outputs, instructions / outputs if outputs else None

    if whole := kernel.epilogue:
        return EpilogueCost(whole.instructions, whole.loops, *per_output(whole.instructions))
    if apart := kernel.finishing:
        handing_over, finishing = apart
        _, handed_over = per_output(handing_over.instructions)
        slots = None if handed_over is None else handed_over + finishing.instructions / _FINISHED_PER_TRIP
        return EpilogueCost(finishing.instructions, finishing.loops, _FINISHED_PER_TRIP, slots, handed_over)
    return None


def trip_flops(arguments: Mapping[str, Any]) -> int:
    """Tensor-core FLOP of one CTA in one trip of a main loop, padding included, from the launch's constants."""
    a = arguments
    factors = 2 if a.get("ACTIVATION") == "swiglu" else 1
    if "BLOCK_K" in a:
        return 2 * a["BLOCK_M"] * a["BLOCK_N"] * a["BLOCK_K"] * factors
    products = 1 + factors  # scores and results; fc1, twice when gated, and fc2
    if "BLOCKS" in a:
        return 2 * products * a["BLOCK_M"] * a["WIDTH"] * (a["BLOCKS"] * a["BLOCK_N"] + a["REST"])
    return 2 * products * a["BLOCK_M"] * _width(a) * a.get("BLOCK_H", a.get("BLOCK_N", 0))


def _width(arguments: Mapping[str, Any]) -> int:
    """Columns of a head, or of the one-kernel MLP, as they are computed: some kernels pad them."""
    return arguments["MAIN"] + arguments["TAIL"] if "MAIN" in arguments else arguments["WIDTH"]


def _repeated(kernel: Kernel, arguments: Mapping[str, Any], num_warps: int) -> float | None:
    made = max((section.flops for section in kernel.main_loops), default=0) * num_warps
    return made / trip_flops(arguments) if made else None


def _multiplying_warps(kernel: Kernel, arguments: Mapping[str, Any]) -> int | None:
    """How many of a warp-specialised kernel's warps multiply, and so hold results: from their share of a trip's FLOP,
    in the loop of its whole tiles where others do pieces of tiles.

    None where the share gives no whole number, as with a loop that the compiler unrolled.
    """
    share = max((section.flops for section in kernel.main_loops), default=0)
    if not share:
        return None
    warps, rest = divmod(trip_flops(arguments), share)
    return warps if not rest and warps % 4 == 0 else None


def _forward(launches: list[LaunchReport], batch: int) -> Forward:
    def total(of: Any) -> Any:
        return sum(of(launch.roofline) * launch.times for launch in launches)

    seconds = total(lambda r: r.seconds)
    known = any(launch.modelled_s is not None for launch in launches)
    modelled = sum((launch.modelled_s or launch.roofline.seconds) * launch.times for launch in launches)
    return Forward(
        launches=sum(launch.times for launch in launches),
        flops=total(lambda r: r.flops),
        bytes=total(lambda r: r.bytes),
        compute_s=total(lambda r: r.compute_s),
        memory_s=total(lambda r: r.memory_s),
        bound_s=seconds,
        images_per_s=batch / seconds,
        modelled_s=modelled if known else None,
    )
