"""What a forward pass of an accelerated model costs the host, beside the same model's own dispatch.

    python -m vit_bench.dropin_host_cost

Models of 12 blocks, width 32 and one patch, so that there is next to no arithmetic in them; accelerated ones launch
through the recording driver, untouched ones run on CPU tensors, in turn in one process. See `vit_bench.host_cost` for
what such figures hold and what they leave out.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

import vit_engine
from vit_bench.arguments import command, positive
from vit_bench.recording import gpu, recording
from vit_kernels.device import interpreting

DEPTH = 12


@dataclass(frozen=True)
class Cost:
    """Medians in milliseconds of CPU time per forward pass of a shape seen before, and launches per pass."""

    model: str
    launches: int
    ours: float
    eager: float

    @property
    def ratio(self) -> float:
        return self.ours / self.eager


def _timm() -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(img_size=16, patch_size=16, embed_dim=32, depth=DEPTH, num_heads=2, num_classes=10)


def _torchvision() -> nn.Module:
    from torchvision.models.vision_transformer import VisionTransformer

    return VisionTransformer(16, 16, num_layers=DEPTH, num_heads=2, hidden_dim=32, mlp_dim=128, num_classes=10)


_CONFIG: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 2,
    "intermediate_size": 128,
    "image_size": 16,
    "patch_size": 16,
}


def _timm_rotary() -> nn.Module:
    from timm.models.eva import Eva

    return Eva(
        img_size=16, patch_size=16, embed_dim=32, depth=DEPTH, num_heads=2, num_classes=10, use_rot_pos_emb=True,
        swiglu_mlp=True, scale_mlp=True, mlp_ratio=2.0,
    )  # fmt: skip


def _transformers() -> nn.Module:
    from transformers import ViTConfig, ViTModel

    return ViTModel(ViTConfig(**_CONFIG))


def _transformers_rotary() -> nn.Module:
    from transformers import DINOv3ViTConfig, DINOv3ViTModel

    return DINOv3ViTModel(DINOv3ViTConfig(**_CONFIG))


def _transformers_pooled() -> nn.Module:
    from transformers import SiglipVisionConfig, SiglipVisionModel

    return SiglipVisionModel(SiglipVisionConfig(**_CONFIG))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "timm VisionTransformer": _timm,
    "timm Eva": _timm_rotary,
    "torchvision VisionTransformer": _torchvision,
    "transformers ViTModel": _transformers,
    "transformers DINOv3ViTModel": _transformers_rotary,
    "transformers SiglipVisionModel": _transformers_pooled,
}


def _milliseconds(call: Callable[[], object]) -> float:
    begin = time.process_time()
    call()
    return 1e3 * (time.process_time() - begin)


@torch.inference_mode()
def measure(name: str, rounds: int = 40, gpu_name: str = "sm_90") -> Cost:
    """Medians over rounds of one pass of each in turn, after warm-up; PyTorch on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.inference_mode(False):
            eager, ours = MODELS[name]().eval(), vit_engine.accelerate(MODELS[name]().eval())
        images = torch.randn(1, 3, 16, 16)
        times: dict[str, list[float]] = {"ours": [], "eager": []}
        with recording(gpu(gpu_name)) as recorder:
            for _ in range(4):
                eager(images)
                ours(images)
            for _ in range(rounds):
                recorder.launches.clear()
                times["ours"].append(_milliseconds(lambda: ours(images)))
                times["eager"].append(_milliseconds(lambda: eager(images)))
            launches = len(recorder.launches)
        return Cost(name, launches, **{kind: statistics.median(values) for kind, values in times.items()})
    finally:
        torch.set_num_threads(threads)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = command("dropin_host_cost", __doc__)
    parser.add_argument("--rounds", type=positive, default=40)
    parser.add_argument("--json", action="store_true", help="print one JSON list and nothing else")
    options = parser.parse_args(arguments)
    if interpreting():
        print("TRITON_INTERPRET is set: unset it, the launch path is another one with it", file=sys.stderr)
        return 2
    costs = [measure(name, options.rounds) for name in MODELS]
    if options.json:
        print(json.dumps([asdict(cost) | {"ratio": cost.ratio} for cost in costs]))
        return 0
    print(f"host time of a forward pass of {DEPTH} blocks, no GPU used")
    for cost in costs:
        print(
            f"  {cost.model:<32}{cost.launches:4} launches{cost.ours:8.2f} ms accelerated{cost.eager:8.2f} ms eager"
            f"{cost.ratio:7.2f}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
