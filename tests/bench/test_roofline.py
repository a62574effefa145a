"""FLOP and bytes against published figures, hand-made sums and the operands of the launches themselves."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torchvision.models import ViT_B_16_Weights, ViT_L_16_Weights

from tests.bench.child import run
from vit_bench import rates
from vit_bench.roofline import PEAKS, attention_flops, gemm_flops, launch_flops, mlp_flops, operand_bytes, roofline
from vit_kernels.device import A100, H100, KNOWN_DEVICES, RTX_4090, Device

PUBLISHED = {
    "vit_base_patch16_224": ViT_B_16_Weights.IMAGENET1K_V1,
    "vit_base_patch16_384": ViT_B_16_Weights.IMAGENET1K_SWAG_E2E_V1,
    "vit_large_patch16_224": ViT_L_16_Weights.IMAGENET1K_V1,
}


@pytest.fixture(scope="module")
def asked() -> dict[str, list[list[Any]]]:
    """What the launchers ask of Triton, nothing compiled: [times per forward, kernel, FLOP, bytes] of every launch."""
    return run(
        f"""
        import json, torch
        from unittest import mock
        from triton.runtime.jit import JITFunction
        from vit_bench.inspection import tensors_of
        from vit_bench.plan import model_calls
        from vit_bench.recording import gpu, recording
        from vit_bench.roofline import launch_flops, operand_bytes
        from vit_engine.config import ViTConfig

        launches = []

        def note(self, *arguments, grid, warmup, **options):
            named = dict(zip(self.arg_names, arguments)) | {{k: v for k, v in options.items() if k in self.arg_names}}
            size = operand_bytes(tensors_of(tuple(named.values())))
            launches.append((self.__name__, launch_flops(self.__name__, named), size))

        def asked(model, batch, **changes):
            found = []
            with recording(gpu("sm_90"), torch_device="meta"), mock.patch.object(JITFunction, "run", note):
                for call in model_calls(ViTConfig.preset(model, **changes), batch, torch.float16):
                    launches.clear()
                    call.run()
                    found += [(call.times, *launch) for launch in launches]
            return found

        mean = dict(global_pool="avg", fc_norm=False)
        cases = [(name, batch) for name in {list(PUBLISHED)} for batch in (1, 8, 64)]
        found = {{f"{{name}} {{batch}}": asked(name, batch) for name, batch in cases}}
        found |= {{f"{{name}} {{batch}} pooled": asked(name, batch, **mean) for name, batch in cases}}
        found |= {{f"tiny {{batch}}": asked("vit_tiny_patch16_224", batch) for batch in (4, 64)}}
        found["pooled"] = asked("vit_tiny_patch16_224", 4, **mean)
        print(json.dumps(found))
        """
    )


def test_products_counted_by_hand():
    assert gemm_flops(2, 3, 5) == 2 * 30
    # 7 queries x 11 keys x 4 numbers, twice, for each of 2 x 3 heads
    assert attention_flops(2, 3, 7, 11, 4) == 2 * (2 * 7 * 11 * 4) * 6
    assert mlp_flops(5, 8, 16) == 2 * (2 * 5 * 8 * 16)
    assert mlp_flops(5, 8, 16, gated=True) == 3 * (2 * 5 * 8 * 16)


@pytest.mark.parametrize(("model", "gflop"), [*zip(PUBLISHED, (35.13, 110.97, 123.1), strict=True)])
def test_flop_per_image_are_the_published_ones(asked, model, gflop):
    """torchvision publishes billions of multiply-adds, which are those of matrix products: two FLOP each. The rest of a
    forward (norms, softmax, activations) is in neither figure. They are of all tokens, as for a mean over them."""
    assert gflop == pytest.approx(2 * PUBLISHED[model].value.meta["_ops"], rel=2e-4)
    for batch in (1, 8):
        flops = sum(times * flops for times, _, flops, _ in asked[f"{model} {batch} pooled"])
        assert flops / batch / 1e9 == pytest.approx(gflop, rel=2e-4)


def test_behind_the_last_attention_the_class_token_alone_is_computed(asked):
    """Of 197 tokens 196 are left out of projection, fc1 and fc2 (9 of a block's 12 D^2) and of the queries' products;
    of the queries themselves (another D^2) where they are many."""
    width, others = 768, 196
    for batch, d_squared in ((1, 9), (8, 9), (64, 10)):
        whole, alone = (
            sum(times * flops for times, _, flops, _ in asked[f"vit_base_patch16_224 {batch}{pooled}"])
            for pooled in (" pooled", "")
        )
        assert whole - alone == batch * others * (2 * d_squared * width**2 + 2 * 2 * 197 * width), batch


def test_a_forward_makes_its_launches_as_often_as_there_are_blocks(asked):
    def made(name):
        found = [(times, kernel) for times, kernel, _, _ in asked[name] if times]
        kinds = re.compile("_(tma|roles|staying|columns|whole|parts|blocks)_kernel")
        return [(times, kinds.sub("_kernel", kernel)) for times, kernel in found]

    def block(times, behind=1):
        return [(times, "linear_kernel")] * behind + [(times, "attention_kernel"), *[(times, "linear_kernel")] * 3]

    tail = [(1, "layer_norm_kernel"), (1, "linear_kernel")]
    assert made("vit_base_patch16_224 8 pooled") == [(1, "patch_embed_kernel"), *block(12), *tail]
    # The one row of each image is too few for fc2's long K: its parts are summed up by a launch more.
    rows = [*block(1), (1, "linear_sum_kernel")]
    assert made("vit_base_patch16_224 8") == [(1, "patch_embed_kernel"), *block(11), *rows, *tail]
    rows = [(1, "row_stats_kernel"), *block(1, behind=2), (1, "linear_sum_kernel")]
    assert made("vit_base_patch16_224 64") == [(1, "patch_embed_kernel"), *block(11), *rows, *tail]
    assert (11, "mlp_roles_kernel") in [(times, kernel) for times, kernel, _, _ in asked["tiny 64"]]
    norms = [(times, size) for times, kernel, _, size in asked["pooled"] if kernel == "layer_norm_kernel"]
    assert [times for times, _ in norms] == [1, 0] and norms[0][1] > 100 * norms[1][1]


def test_bytes_are_every_operand_once(asked):
    batch, tokens, width, hidden, classes, size = 4, 197, 192, 768, 1000, 2
    rows, partials = batch * tokens, 3
    x, stats = rows * width * size, 2 * partials * rows * 4
    # The norm is folded: its bias is fp32. The residual is x itself in the one-kernel MLP, read once.
    expected = {
        "stem": batch * 3 * 224 * 224 * size + (768 + 1 + 1 + tokens) * width * size + x + stats,
        "qkv": x + stats + 3 * width * (width * size + 4) + 3 * x,
        "attention": 3 * x + x,
        "projection": x + width * (width + 1) * size + x + x + stats,
        "fc1": x + stats + hidden * (width * size + 4) + rows * hidden * size,
        "fc2": rows * hidden * size + width * (hidden + 1) * size + x + x + stats,
        "norm": 2 * batch * width * size + 2 * width * size,
        "head": batch * width * size + classes * (width + 1) * size + batch * classes * size,
    }
    assert [size for times, _, _, size in asked["pooled"] if times] == [
        *list(expected.values())[:-2], 2 * x + 2 * width * size, expected["head"],
    ]  # fmt: skip
    # Behind the attention of the last block there is a row for each image.
    row, its_stats = batch * width * size, 2 * partials * batch * 4
    expected |= {
        "last qkv": expected["qkv"],
        "last attention": row + 2 * x + row,
        "last projection": 3 * row + width * (width + 1) * size + its_stats,
        "last fc1": row + its_stats + hidden * (width * size + 4) + batch * hidden * size,
        "last fc2": batch * hidden * size + width * (hidden + 1) * size + 2 * row + its_stats,
    }
    order = [*list(expected)[:6], *list(expected)[8:], "norm", "head"]
    assert [size for times, _, _, size in asked["tiny 4"] if times] == [expected[name] for name in order]
    rows = 64 * tokens
    x, stats = rows * width * size, 2 * partials * rows * 4
    (one_kernel,) = (size for _, kernel, _, size in asked["tiny 64"] if kernel == "mlp_roles_kernel")
    assert one_kernel == x + stats + hidden * (width * 2 + 4) + width * (hidden + 1) * 2 + x + stats


def test_a_tensor_given_twice_is_read_once_and_a_view_has_its_own_elements():
    x = torch.empty(8, 16, dtype=torch.float16)
    assert operand_bytes([x, x]) == 256
    assert operand_bytes([x, x[:, :4], torch.empty(3)]) == 256 + 64 + 12


@pytest.mark.parametrize(
    ("kernel", "arguments", "flops"),
    [
        ("linear_kernel", {"M": 2, "N": 3, "K": 5, "ACTIVATION": "gelu"}, 60),
        ("linear_kernel", {"M": 2, "N": 3, "K": 5, "ACTIVATION": "swiglu"}, 120),
        # Two images of four patches and one class token each
        ("patch_embed_kernel", {"M": 10, "T": 5, "PREFIX": 1, "N": 3, "K": 7}, 2 * 8 * 3 * 7),
        ("attention_kernel", {"q_ptr": torch.empty(2, 7, 3, 4), "keys": 11}, 2 * (2 * 7 * 11 * 4) * 6),
        ("mlp_kernel", {"M": 5, "WIDTH": 8, "HIDDEN": 16, "ACTIVATION": "gelu"}, 2 * (2 * 5 * 8 * 16)),
        ("mlp_roles_kernel", {"M": 5, "WIDTH": 64, "HIDDEN": 16, "ACTIVATION": "gelu"}, 2 * (2 * 5 * 64 * 16)),
        ("mlp_kernel", {"M": 5, "WIDTH": 8, "HIDDEN": 16, "ACTIVATION": "swiglu"}, 3 * (2 * 5 * 8 * 16)),
        ("layer_norm_kernel", {"M": 5, "N": 8}, 0),
        ("row_stats_kernel", {"M": 5, "N": 8}, 0),
        ("qk_rope_kernel", {"WIDTH": 64, "tokens": 5}, 0),
    ],
)
def test_products_of_one_launch(kernel, arguments, flops):
    assert launch_flops(kernel, arguments) == flops


def test_kernels_without_a_formula_are_refused():
    with pytest.raises(ValueError, match="'new_kernel' has no formula"):
        launch_flops("new_kernel", {})


def test_the_larger_time_is_the_bound():
    # 312 TFLOP/s and 2.039 TB/s
    compute = roofline(312_000_000, 1000, torch.bfloat16, A100)
    assert (compute.compute_s, compute.bound, compute.seconds) == (pytest.approx(1e-6), "compute", compute.compute_s)
    memory = roofline(1000, 2_039_000, torch.float16, A100)
    assert (memory.memory_s, memory.bound, memory.seconds) == (pytest.approx(1e-6), "memory", memory.memory_s)
    # fp32 runs without tensor cores
    assert roofline(19_500_000, 0, torch.float32, A100).compute_s == pytest.approx(1e-6)


def test_every_known_gpu_has_peaks_that_fit_its_sms():
    """The datasheets' peaks over SMs and FLOP per clock give a clock: a plausible one, and the same for both units
    within what the tensor cores are clocked down."""
    assert set(PEAKS) == set(KNOWN_DEVICES)
    for device, peaks in PEAKS.items():
        tensor_clock = peaks.half / rates.tensor(device.capability, 2) / device.sm_count
        clock = peaks.single / (2 * rates.lanes(rates.KIND_OF["FFMA"], device.capability)) / device.sm_count
        assert 1.3e9 < tensor_clock < 2.7e9, device.name
        assert tensor_clock == pytest.approx(clock, rel=0.08), device.name
    bandwidths = {d.name: p.bandwidth / 1e12 for d, p in PEAKS.items()}
    assert bandwidths == {
        "A100": 2.039, "RTX 3090": 0.936, "RTX 4090": 1.008, "H100 SXM": 3.35, "H200": 4.8, "B200": 7.7,
        "RTX 5090": 1.792,
    }  # fmt: skip
    assert PEAKS[H100].half == 989.4e12 and PEAKS[RTX_4090].half == 165.2e12


def test_a_gpu_without_peaks_is_refused():
    with pytest.raises(ValueError, match=r"one of A100, .*; got 'GH200'"):
        roofline(1, 1, torch.float16, Device("GH200", 90, 132, 232_448))
