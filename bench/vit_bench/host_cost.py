"""What a forward pass costs the host: the time to make its launches, beside that of eager PyTorch's dispatch.

    python -m vit_bench.host_cost --depth 12

Both run the same architecture with next to no arithmetic in it (width 32, one patch) in one process, one after the
other. Ours goes through the recording driver for a chosen GPU: everything up to the launch is the engine's and Triton's
own, and the launch itself is noted instead of made. Eager is timm's model on CPU tensors, so its time holds the
dispatch of its operators and the little that they compute. Neither holds the driver's own time per launch, which a GPU
adds to both, nor that of Triton's launcher, whose place the recorder's takes.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch

from vit_bench.arguments import command, positive
from vit_bench.recording import gpu, recording
from vit_engine import ViT, ViTConfig
from vit_kernels.device import interpreting

TARGET = 1 / 3  # of eager's time


@dataclass(frozen=True)
class HostCost:
    """Medians in milliseconds per forward pass, and launches per forward pass.

    repeated: ours from the third pass of a shape on; as_written: ours when a shape is new; eager: timm's, or our torch
    backend's where timm is not installed (see eager_is).
    """

    depth: int
    launches: int
    repeated: float
    as_written: float
    eager: float
    eager_is: str
    rounds: int

    @property
    def ratio(self) -> float:
        """Time of a repeated pass over eager's."""
        return self.repeated / self.eager


def tiny_config(depth: int) -> ViTConfig:
    """One patch of 16 pixels, width 32: launches of the usual number and of no size."""
    return ViTConfig(image_size=16, patch_size=16, embed_dim=32, depth=depth, num_heads=2, num_classes=10)


def _eager(config: ViTConfig) -> tuple[str, torch.nn.Module]:
    try:
        import timm
        from timm.models.vision_transformer import VisionTransformer
    except ImportError:
        return "torch backend", ViT(config, backend="torch").eval()
    model = VisionTransformer(
        img_size=16, patch_size=16, embed_dim=config.embed_dim, depth=config.depth, num_heads=2, num_classes=10
    )
    return f"timm {timm.__version__}", model.eval()


def _milliseconds(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - begin)


@torch.no_grad()
def measure(depth: int = 12, rounds: int = 40, gpu_name: str = "sm_90") -> HostCost:
    """Medians over `rounds` rounds of one pass of each kind in turn, after warm-up; PyTorch on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        config = tiny_config(depth)
        name, eager = _eager(config)
        images = torch.randn(1, 3, 16, 16)
        ours, anew = (ViT(config, backend="triton").eval() for _ in range(2))
        times: dict[str, list[float]] = {"repeated": [], "as_written": [], "eager": []}
        with recording(gpu(gpu_name)) as recorder:
            for _ in range(4):
                for model in (eager, ours, anew):
                    model(images)
            recorder.launches.clear()
            ours(images)
            launches = len(recorder.launches)
            for _ in range(rounds):
                recorder.launches.clear()
                anew.replays.clear()
                times["repeated"].append(_milliseconds(lambda: ours(images)))
                times["eager"].append(_milliseconds(lambda: eager(images)))
                times["as_written"].append(_milliseconds(lambda: anew(images)))
        medians = {kind: statistics.median(values) for kind, values in times.items()}
        return HostCost(depth=depth, launches=launches, eager_is=name, rounds=rounds, **medians)
    finally:
        torch.set_num_threads(threads)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = command("host_cost", __doc__)
    parser.add_argument("--depth", type=positive, default=12, help="encoder blocks")
    parser.add_argument("--rounds", type=positive, default=40)
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    options = parser.parse_args(arguments)
    if interpreting():
        print("TRITON_INTERPRET is set: unset it, the launch path is another one with it", file=sys.stderr)
        return 2
    cost = measure(options.depth, options.rounds)
    if options.json:
        print(json.dumps(asdict(cost) | {"ratio": cost.ratio}))
        return 0
    print(f"host time of a forward pass of {cost.depth} blocks, median of {cost.rounds}, no GPU used")
    for label, value in (
        (f"ours, shape seen before ({cost.launches} launches, recorded)", cost.repeated),
        ("ours, new shape (recorded)", cost.as_written),
        (f"eager, {cost.eager_is} on CPU tensors", cost.eager),
    ):
        print(f"  {label:<52}{value:8.3f} ms")
    print(f"ours / eager: {cost.ratio:.2f} (target: at most {TARGET:.2f})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
