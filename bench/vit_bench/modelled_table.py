"""Modelled forward passes of a few models on three GPUs, as the README's table. No GPU is used and nothing is timed.

    python -m vit_bench.modelled_table            # into the README (some minutes: the kernels are compiled)
    python -m vit_bench.modelled_table --print    # to the terminal alone

Of each forward: the sum of modelled times (`vit_bench.modelled`; the larger bound for launches without a model), the
sum of bounds, and the launches. The modelled time of a product holds what its launch costs, as seen on an H100; all
others leave it out.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from vit_bench.arguments import command
from vit_bench.inspection import arguments_of, modelled_time, recorded_launches, tensors_of
from vit_bench.plan import BATCHES, model_calls
from vit_bench.roofline import launch_flops, operand_bytes, roofline
from vit_bench.support_table import replaced
from vit_engine.config import ViTConfig
from vit_kernels.device import A100, H100, RTX_4090, Device

MODELS = (
    *("vit_tiny_patch16_224", "vit_small_patch16_224", "vit_base_patch16_224"),
    *("vit_base_patch16_384", "vit_large_patch16_224", "vit_large_patch16_384"),
)
GPUS = (H100, A100, RTX_4090)
BEGIN = "<!-- modelled table: written by `python -m vit_bench.modelled_table`; do not edit -->"
END = "<!-- end of modelled table -->"


def forward(model: str, batch: int, device: Device) -> tuple[float, float, int]:
    """(modelled seconds, least seconds by datasheet, launches) of one forward pass of a preset in bf16."""
    dtype = torch.bfloat16
    modelled = bound = 0.0
    launches = 0
    for call, _, launch in recorded_launches(model_calls(ViTConfig.preset(model), batch, dtype), device):
        arguments = arguments_of(launch)
        flops, size = launch_flops(launch.kernel, arguments), operand_bytes(tensors_of(launch.values))
        least = roofline(flops, size, dtype, device).seconds
        seconds = modelled_time(launch, arguments, dtype, device)
        modelled += call.times * (least if seconds is None else seconds)
        bound += call.times * least
        launches += call.times
    return modelled, bound, launches


def rows(models: Sequence[str] = MODELS, batches: Sequence[int] = BATCHES) -> Iterator[str]:
    """The table in Markdown, line by line."""
    yield "| model, bf16 | batch | launches | " + " | ".join(f"{gpu.name}: ms (bound)" for gpu in GPUS) + " |"
    yield "|---" * (3 + len(GPUS)) + "|"
    for model in models:
        for batch in batches:
            found = [forward(model, batch, gpu) for gpu in GPUS]
            cells = [f"{1e3 * modelled:.2f} ({1e3 * bound:.2f})" for modelled, bound, _ in found]
            counts = "/".join(str(count) for count in sorted({launches for *_, launches in found}))
            yield f"| `{model}` | {batch} | {counts} | " + " | ".join(cells) + " |"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = command("modelled_table", __doc__)
    parser.add_argument("--print", action="store_true", help="change no file")
    parser.add_argument("--readme", type=Path, default=Path("README.md"))
    options = parser.parse_args(arguments)
    if not options.print:
        try:
            replaced(options.readme.read_text(encoding="utf-8"), "", BEGIN, END)  # said before the minutes of compiling
        except (OSError, ValueError) as error:
            parser.error(str(error))
    lines = []
    for line in rows():
        print(line, flush=True)
        lines.append(line)
    if not options.print:
        before = options.readme.read_text(encoding="utf-8")
        options.readme.write_text(replaced(before, "\n".join(lines), BEGIN, END), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
