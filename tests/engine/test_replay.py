"""A repeated forward pass computes what the pass as written computes, and notices every change of the model."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

from tests.engine.redraw import redraw
from tests.engine.stand_in import repeated
from vit_bench.memory import peak_of
from vit_bench.whole_model import SMALL
from vit_engine import ViT, ViTConfig, ops
from vit_engine.fingerprint import Fingerprint
from vit_engine.launches import Launches
from vit_engine.position import PositionCache
from vit_engine.replay import ReplayCache
from vit_kernels import gemm_tiles, mlp_tiles
from vit_kernels.gemm_tiles import GemmTile
from vit_kernels.mlp_tiles import MlpTile

pytestmark = pytest.mark.interpreted_only
__all__ = ["repeated"]

# As little as has every kind of launch: the interpreter takes its time.
TINY = dataclasses.replace(SMALL, depth=1, embed_dim=32, num_heads=2, image_size=16, num_register_tokens=1)


def model(config: ViTConfig = TINY) -> ViT:
    made = ViT(config, backend="interpret").eval()
    redraw(made)
    return made


def images(seed: int, batch: int = 1, size: int = 16) -> torch.Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(seed))


def as_written(vit: ViT, x: torch.Tensor, run: Callable[..., torch.Tensor] = ViT.forward) -> torch.Tensor:
    """The same pass by a copy that has never seen this shape."""
    return run(copy.deepcopy(vit), x)


PLANS = {
    "registers, LayerScale": dataclasses.replace(TINY, depth=2),
    "average pooling": dataclasses.replace(TINY, global_pool="avg", num_register_tokens=0),
    "statistics in two parts": dataclasses.replace(TINY, embed_dim=96, num_heads=3, hidden_dim=16),
    "one kernel for the MLP": TINY,
    "pre-training head": dataclasses.replace(TINY, head="pretrain", representation_size=40),
    "no classes": dataclasses.replace(TINY, num_classes=0),
    "uint8, positions for patches only": dataclasses.replace(TINY, no_embed_class=True),
}


@pytest.mark.parametrize("name", list(PLANS))
def test_a_repeated_pass_is_the_pass_as_written_bit_for_bit(
    name: str, repeated: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    one_kernel = "one kernel" in name
    if one_kernel:  # as many rows have it, more than are interpreted here
        monkeypatch.setattr(mlp_tiles, "choose_mlp", lambda *_, **__: MlpTile(16, 32, 4, 2))
    vit = model(PLANS[name])
    inputs = [images(seed) for seed in range(4)]
    if "uint8" in name:
        inputs = [(x * 60 + 128).clamp(0, 255).to(torch.uint8) for x in inputs]
    results = [vit(x) for x in inputs[:2]]
    assert not repeated, "the first pass of a shape runs as written, the second is noted"
    results += [vit(x) for x in inputs[2:]]
    assert repeated and not vit.replays.refused
    assert ("mlp_kernel" in repeated) is one_kernel
    for x, result in zip(inputs, results, strict=True):
        assert torch.equal(result, as_written(vit, x))
    # Earlier results are memory of their own: nothing that followed has touched them.
    assert len({r.data_ptr() for r in results}) == len(results)


def test_every_launch_is_repeated_and_no_other(repeated: list[str]) -> None:
    vit = model(dataclasses.replace(TINY, depth=2))
    for seed in range(3):
        vit(images(seed))
    block = ["linear_kernel", "attention_kernel", "linear_kernel", "linear_kernel", "linear_kernel"]
    one_kernel_mlp = block[:3] + ["mlp_kernel"]
    inside = repeated[1:-2]
    assert repeated[0] == "patch_embed_kernel" and repeated[-2:] == ["layer_norm_kernel", "linear_kernel"]
    assert inside in (block * 2, one_kernel_mlp * 2), inside


def test_launches_with_tensor_descriptors_are_repeated(
    repeated: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Descriptors of inputs, of intermediate results and of weights, each at the address where it is now."""
    walk = GemmTile(32, 64, 32, 4, 2, chunk=64, tma=2)
    pointers = GemmTile(32, 64, 32, 4, 2)
    monkeypatch.setattr(gemm_tiles, "choose_gemm", lambda *a, described, **k: walk if described else pointers)
    vit = model(dataclasses.replace(TINY, depth=2, num_classes=16)).half()
    inputs = [images(seed).half() for seed in range(4)]
    results = [vit(x) for x in inputs]
    assert repeated.count("linear_tma_kernel") == 2 * 5 and "linear_kernel" not in repeated
    for x, result in zip(inputs, results, strict=True):
        assert torch.equal(result, as_written(vit, x))
    assert not vit.replays.refused


def test_noting_a_pass_takes_no_more_memory_than_making_it(repeated: list[str]) -> None:
    """Its intermediate results are freed as they are otherwise, and none is kept."""
    vit = model(dataclasses.replace(TINY, depth=3))
    written, noted = (peak_of(lambda: vit(images(0)), operators=False).nbytes for _ in range(2))
    assert noted == written and not repeated
    again = peak_of(lambda: vit(images(0)), operators=False).nbytes
    assert repeated and again < written


def test_features_are_repeated_too(repeated: list[str]) -> None:
    vit = model()
    results = [vit.forward_features(images(seed)) for seed in range(3)]
    assert repeated
    assert torch.equal(results[2], as_written(vit, images(2), ViT.forward_features))


def test_another_shape_or_alignment_is_another_pass(repeated: list[str]) -> None:
    vit = model()
    for _ in range(3):
        vit(images(0))
    count = len(repeated)
    larger = images(1, size=24)
    unaligned = torch.empty(3 * 16 * 16 + 1)[1:].view(1, 3, 16, 16).copy_(images(2))
    transposed = images(3).transpose(2, 3)
    for x in (larger, unaligned, transposed, images(4, batch=2)):
        assert torch.equal(vit(x), as_written(vit, x))
    assert len(repeated) == count
    assert torch.equal(vit(images(5)), as_written(vit, images(5)))
    assert len(repeated) > count


def edit_weight(vit: Any) -> None:
    vit.blocks[0].mlp.fc1.weight.add_(0.05)


def edit_norm(vit: Any) -> None:
    vit.blocks[0].norm1.weight.mul_(1.5)


def replace_head(vit: Any) -> None:
    vit.head = torch.nn.Linear(TINY.embed_dim, TINY.num_classes)


def replace_parameter(vit: Any) -> None:
    vit.cls_token = torch.nn.Parameter(torch.randn_like(vit.cls_token))


def replace_data(vit: Any) -> None:
    vit.pos_embed.data = torch.randn_like(vit.pos_embed)


def change_eps(vit: Any) -> None:
    vit.blocks[0].norm2.eps = 0.3


def change_scale(vit: Any) -> None:
    vit.blocks[0].attn.scale = 0.9


def load(vit: Any) -> None:
    other = model()
    redraw(other, seed=5)
    vit.load_state_dict(other.state_dict())


def to_half(vit: Any) -> None:
    vit.half()


CHANGES = [
    edit_weight, edit_norm, replace_head, replace_parameter, replace_data, change_eps, change_scale, load, to_half
]  # fmt: skip


def test_what_hooks_do_is_never_left_out(repeated: list[str]) -> None:
    vit = model()
    for _ in range(3):
        vit(images(0))
    count = len(repeated)
    block: Any = vit.blocks[0]
    for add in (block.register_forward_hook, block.mlp.register_forward_pre_hook):
        handle = add(lambda *_: None)
        for _ in range(3):
            with pytest.raises(RuntimeError, match="has a hook"):
                vit(images(0))
        assert len(repeated) == count
        handle.remove()
    handle = torch.nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        assert not Fingerprint(vit).holds()
    finally:
        handle.remove()
    vit.register_forward_hook(lambda *_: None)  # runs around the replay
    for _ in range(3):
        vit(images(0))
    assert len(repeated) > count


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_change_of_the_model_is_never_missed(change: Callable[[ViT], None], repeated: list[str]) -> None:
    vit = model()
    for _ in range(3):
        before = vit(images(0))
    change(vit)
    x = images(0).to(vit.pos_embed.dtype)
    count = len(repeated)
    after = vit(x)
    assert len(repeated) == count, "the first pass after a change runs as written"
    assert torch.equal(after, as_written(vit, x)) and not torch.equal(after.float(), before)
    vit(x)
    assert torch.equal(vit(x), after) and len(repeated) > count


def test_what_depends_on_parameters_alone_is_kept(repeated: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Until a parameter changes."""
    vit = model()
    original = PositionCache.get
    monkeypatch.setattr(PositionCache, "get", lambda self, *a, **k: original(self, *a, **k) * 1.0)
    for seed in range(4):
        assert torch.equal(vit(images(seed)), as_written(vit, images(seed)))
    assert repeated and not vit.replays.refused
    vit.pos_embed.mul_(2)
    for seed in range(4):
        assert torch.equal(vit(images(seed)), as_written(vit, images(seed)))


def test_passes_that_need_the_host_run_as_written(repeated: list[str]) -> None:
    vit = model()
    for _ in range(3):
        vit(images(0))
    count = len(repeated)
    with torch.enable_grad():
        vit(images(0))
    with FlopCounterMode(display=False):
        vit(images(0))
    with forward_ad.dual_level():
        vit(images(0))
        x = forward_ad.make_dual(images(0), images(1))
        with pytest.raises(RuntimeError, match="in forward mode"):
            vit(x)
    assert vit(images(0)[:0]).shape == (0, TINY.num_classes)
    assert len(repeated) == count


def test_tensors_of_inference_mode_are_known_by_address(repeated: list[str]) -> None:
    """They count no changes: clear_cache() tells of one, as for `.data`."""
    with torch.inference_mode():
        frozen = copy.deepcopy(model())
        for _ in range(3):
            before = frozen(images(0))
        assert repeated
        frozen.get_parameter("head.bias").add_(1.0)
        frozen.clear_cache()
        after = frozen(images(0))
    torch.testing.assert_close(after, before + 1.0, rtol=0, atol=1e-5)


def test_the_least_recently_used_shape_is_given_up(repeated: list[str]) -> None:
    vit = model()
    vit.replays.limit = 2
    for batch in (1, 2, 1, 2, 1, 3):
        vit(images(0, batch=batch))
    count = len(repeated)
    vit(images(0, batch=2))
    assert len(repeated) == count, "given up for the third shape"


def test_copies_and_pickles_leave_replays_behind(repeated: list[str]) -> None:
    vit = model()
    for _ in range(3):
        expected = vit(images(0))
    for other in (copy.deepcopy(vit), pickle.loads(pickle.dumps(vit))):
        assert not other.replays._entries
        assert torch.equal(other(images(0)), expected)
    vit.clear_cache()
    count = len(repeated)
    vit(images(0))
    assert len(repeated) == count


def test_threads_do_not_share_memory(repeated: list[str]) -> None:
    vit = model()
    inputs = [images(seed) for seed in range(3)]
    expected = [as_written(vit, x) for x in inputs]
    for _ in range(2):
        vit(inputs[0])
    results: dict[int, torch.Tensor] = {}

    def work(number: int) -> None:
        with torch.no_grad():
            vit(inputs[number])
            results[number] = vit(inputs[number])

    threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert repeated and all(torch.equal(results[number], expected[number]) for number in range(3))


def launches_of(vit: ViT) -> Launches:
    """Of the one pass that is repeated, all its launches in one."""
    (found,) = (entry for entry in vit.replays._entries.values() if entry is not None)
    (launches,) = found._steps
    assert isinstance(launches, Launches)
    return launches


def test_intermediate_results_share_memory(repeated: list[str]) -> None:
    """Depth costs no memory: the arena of three blocks is that of two."""
    sizes = []
    for depth in (2, 3):
        vit = model(dataclasses.replace(TINY, depth=depth))
        for _ in range(3):
            vit(images(0))
        sizes.append(launches_of(vit).arena_bytes)
    assert sizes[0] == sizes[1]


def test_a_pass_of_several_inputs_and_results(repeated: list[str]) -> None:
    """As an encoder block has them: each input at an address of its own, or several in one storage."""
    layer = torch.nn.LayerNorm(64)
    cache = ReplayCache()

    def norms(*inputs: torch.Tensor) -> list[torch.Tensor]:
        return [ops.layer_norm(x, layer.weight, layer.bias) for x in inputs]

    def passed(inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        return list(cache.run("norms", layer, inputs, lambda: norms(*inputs)))

    with torch.no_grad():
        for _ in range(4):
            apart = [torch.randn(3, 64), torch.randn(5, 64)]
            found = passed(apart)
            assert all(torch.equal(a, b) for a, b in zip(found, norms(*apart), strict=True))
        assert len(repeated) == 2 * 2
        for rows in (4, 8, 4, 8, 4, 8):  # two inputs in one storage, nearer and farther apart
            whole = torch.randn(rows + 4, 64)
            shared = [whole[:4], whole[rows:]]
            assert all(torch.equal(a, b) for a, b in zip(passed(shared), norms(*shared), strict=True))
        assert len(repeated) == 2 * 2 + 2 * 2


def test_a_launch_is_placed_once_for_each_set_of_addresses(repeated: list[str]) -> None:
    """What a launch takes on the host is for new addresses alone, and only so many sets of them are kept."""
    vit = model()
    for _ in range(3):
        vit(images(1))
    launches = launches_of(vit)
    number = 1 + len(launches.written) + len(launches.given)

    def placed(arena: int, others: int) -> list[Any]:
        return launches._placed((arena, *range(others, others + 16 * (number - 1), 16)))

    first, elsewhere, again = placed(4096, 1 << 20), placed(4096, 2 << 20), placed(4096, 1 << 20)
    assert all(map(lambda a, b: a is b, first, again))
    moved = [a is not b for a, b in zip(first, elsewhere, strict=True)]
    assert moved[0] and moved[-1] and not all(moved), "those that take the images or write the logits, and no others"
    for arena in range(8192, 8192 + 16 * 20, 16):
        placed(arena, 1 << 20)
    assert 1 <= max(map(len, launches._made)) <= 8 and len(launches._lists) <= 8
