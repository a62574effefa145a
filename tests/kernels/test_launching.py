"""What each launcher launches: the tile it was given, chosen for the problem at hand, on the tensor's own device.

A kernel launched with other warps, stages or an unmasked loop left unused computes the same, only slower; so the
results of the other tests cannot show it.
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import inspect
import re
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from triton import knobs

from vit_kernels import attention_tiles, fold_norm, gemm_tiles, mlp_tiles, qk_rope_tiles, row_stats, tiles
from vit_kernels import launch as launch_module
from vit_kernels.device import A100, H100, device_of

from ..weights import Draw
from .common import attention, layer_norm, linear, mlp, patch_embed, qk_rope

GEMM = gemm_tiles.GemmTile(16, 64, 32, 2, 7, group_m=3)
ATTENTION = attention_tiles.AttentionTile(16, 32, 2, 7)
MLP = mlp_tiles.MlpTile(16, 32, 2, 7)
ROWS = tiles.RowsTile(4, 32, 2)


@dataclass(frozen=True)
class Launch:
    kernel: str
    on: torch.Tensor
    programs: int
    constants: dict[str, Any]


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[Launch]:
    """Every launch from here on, noted and made."""
    seen: list[Launch] = []
    original = launch_module.launch

    def note(on: torch.Tensor, kernel: Any, programs: int, *arguments: Any, **constants: Any) -> None:
        seen.append(Launch(kernel.__name__, on, programs, constants))
        original(on, kernel, programs, *arguments, **constants)

    for name in ("attention", "linear", "mlp", "norm", "patch_embed", "qk_rope"):
        monkeypatch.setattr(importlib.import_module(f"vit_kernels.{name}"), "launch", note)
    return seen


@pytest.fixture
def choose(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Any], list[tuple[Any, ...]]]:
    """choose(name, tile): the chooser `name` gives this tile; returns the list of what it will have been asked."""

    def replace(name: str, tile: Any) -> list[tuple[Any, ...]]:
        asked: list[tuple[Any, ...]] = []
        modules = (attention_tiles, gemm_tiles, mlp_tiles, qk_rope_tiles, tiles)
        (module,) = (m for m in modules if name in vars(m))
        monkeypatch.setattr(module, name, lambda *a, call=(), **k: asked.append((*a, k)) or tile)
        return asked

    return replace


def expect(launch: Launch, kernel: str, on: torch.Tensor, programs: int, **constants: Any) -> None:
    assert (launch.kernel, launch.programs) == (kernel, programs)
    assert launch.on is on
    assert {name: launch.constants[name] for name in constants} == constants


GEMM_CONSTANTS = {"BLOCK_M": 16, "BLOCK_N": 64, "BLOCK_K": 32, "GROUP_M": 3, "num_warps": 2, "num_stages": 7}
DRAW = Draw(torch.float16, seed=1)


@pytest.mark.parametrize(
    ("options", "gated", "described"),
    [
        pytest.param({}, False, True, id="plain"),
        pytest.param({"activation": "swiglu"}, True, True, id="gated"),
        pytest.param({"residual": DRAW.rows(40, 144)}, False, True, id="residual"),
        pytest.param({"residual": DRAW.rows(40, 145)[:, :144]}, False, False, id="residual whose rows begin anywhere"),
        pytest.param({"emit_stats": True}, False, True, id="statistics"),
    ],
)
def test_linear(launches, choose, options, gated, described):
    asked = choose("choose_gemm", GEMM)
    x, weight = DRAW.normal(40, 24), DRAW.weight(144, 24)
    n = 72 if gated else 144
    linear(x, weight, **options)
    options = {
        "gated": gated, "tf32": False, "described": described, "activation": options.get("activation", "none"),
        "residual": "residual" in options,
    }  # fmt: skip
    assert asked == [(40, n, 24, 2, device_of(x), options)]
    expect(launches[0], "linear_kernel", x, 3 * (2 if gated else 3), EVEN_K=False, FAST=True, **GEMM_CONSTANTS)


def test_linear_of_a_width_that_the_step_divides(launches, choose):
    """No mask in the loop, and no padding of the partials."""
    choose("choose_gemm", GEMM)
    x = DRAW.rows(8, 192)
    weight, column_sum, bias = fold_norm(DRAW.weight(30, 192), None, None)
    stats = linear(DRAW.normal(8, 5), DRAW.weight(192, 5), emit_stats=True)[1]
    linear(x, weight, bias, norm="layer", stats=stats, column_sum=column_sum)
    linear(x, weight, bias, norm="layer", stats=row_stats(x), column_sum=column_sum)
    assert [seen.constants["EVEN_K"] for seen in launches if seen.kernel == "linear_kernel"] == [False, True, True]
    assert [seen.constants["PARTIALS"] for seen in launches if seen.kernel == "linear_kernel"] == [1, 3, 1]


@pytest.mark.parametrize("masked", [False, True], ids=["full", "masked"])
def test_attention(launches, choose, masked):
    asked = choose("choose_attention", ATTENTION)
    q, k, v = DRAW.normal(2, 20, 6, 40), DRAW.normal(2, 50, 3, 40), DRAW.normal(2, 50, 3, 40)
    attention(q, k, v, mask=DRAW.normal(50) if masked else None)
    assert asked == [(12, 20, 50, 40, 2, device_of(q), {"masked": masked, "described": False})]
    expect(
        launches[0], "attention_kernel", q, 2 * 2 * 6,
        BLOCK_M=16, BLOCK_N=32, num_warps=2, num_stages=7, MAIN=32, TAIL=16, GROUP=2, HAS_LENGTHS=False,
    )  # fmt: skip


@pytest.mark.parametrize("gated", [False, True], ids=["gelu", "swiglu"])
def test_mlp_in_one_kernel(launches, choose, gated):
    asked = choose("choose_mlp", MLP)
    x, fc1, fc2 = DRAW.normal(20, 80), DRAW.weight(80 if gated else 40, 80), DRAW.weight(80, 40)
    activation = "swiglu" if gated else "gelu"
    for fused in (None, True):
        mlp(x, fc1, None, fc2, norm="none", activation=activation, fused=fused)
    # Whoever chooses is also told that descriptors can load x and the weights.
    options = [{"gated": gated, "always": always, "described": True} for always in (False, True)]
    assert asked == [(20, 80, 40, 2, device_of(x), each) for each in options]
    for launch in launches:
        expect(
            launch, "mlp_kernel", x, 2, BLOCK_M=16, BLOCK_H=32, num_warps=2, num_stages=7, MAIN=64, TAIL=16, FAST=True
        )


def test_mlp_of_two_products(launches, choose):
    """No tile for one kernel, statistics that are not given: three launches, the last with everything at its end."""
    assert choose("choose_mlp", None) == []
    choose("choose_rows", ROWS)
    choose("choose_gemm", GEMM)
    x = DRAW.rows(20, 100)
    fc1, column_sum, bias = fold_norm(DRAW.weight(40, 100), None, None)
    mlp(x, fc1, bias, DRAW.weight(100, 40), column_sum=column_sum, residual=x, emit_stats=True)
    assert [launch.kernel for launch in launches] == ["row_stats_kernel", "linear_kernel", "linear_kernel"]


@pytest.mark.parametrize(("n", "one_tile"), [(20, True), (32, True), (33, False)])
def test_norms(launches, choose, n, one_tile):
    asked = choose("choose_rows", ROWS)
    x = DRAW.rows(9, n)
    layer_norm(x)
    row_stats(x)
    assert asked == [(9, n, 2, device_of(x), {})] * 2
    expect(launches[0], "layer_norm_kernel", x, 3, BLOCK_M=4, BLOCK_N=32, num_warps=2, ONE_TILE=one_tile)
    expect(launches[1], "row_stats_kernel", x, 3, BLOCK_M=4, BLOCK_N=32, num_warps=2)


def test_patch_embed(launches, choose):
    asked = choose("choose_patch_embed", GEMM)
    images, weight = DRAW.images(2, 3, 16, 24), DRAW.weight(70, 3, 4, 4)
    patch_embed(images, weight, prefix=DRAW.normal(1, 70))
    assert asked == [(50, 70, 48, 2, device_of(images), {"tf32": False, "described": False})]
    expect(launches[0], "patch_embed_kernel", images, 4 * 2, **GEMM_CONSTANTS)


def test_qk_rope(launches, choose):
    """One launch for queries and keys, of as many groups as the one with more heads has."""
    asked = choose("choose_qk_rope", qk_rope_tiles.QkRopeTile(8, 2, 2))
    q, k = DRAW.normal(2, 9, 3, 22), DRAW.normal(2, 9, 1, 22)
    cos, sin = DRAW.normal(8, 22), DRAW.normal(8, 22)
    qk_rope(q, k, cos=cos, sin=sin, prefix=1)
    qk_rope(q, k, norm="rms", q_weight=DRAW.gamma(22))
    assert asked == [(2, 9, 3, 22, 2, device_of(q), {})] * 2
    expect(
        launches[0], "qk_rope_kernel", q, 2 * 2 * 2,
        BLOCK_T=8, num_warps=2, WIDTH=22, HALF=16, FIRST=11, ROPE=True, DENSE=True, NORM="none",
    )  # fmt: skip
    # Not rotated, the second tile begins where the first one ends, full.
    expect(launches[1], "qk_rope_kernel", q, 2 * 2 * 2, FIRST=16, ROPE=False, NORM="rms", INTERLEAVED=False)
    heads_apart = DRAW.normal(2, 3, 9, 22).transpose(1, 2)
    for both in ((heads_apart, q), (q, heads_apart)):
        qk_rope(*both, cos=cos.expand(3, 8, 22), sin=sin, prefix=1)
    qk_rope(q, q, cos=cos.repeat(3, 1, 1), sin=sin, prefix=1)
    qk_rope(q, q, cos=cos, sin=sin.repeat(3, 1, 1), prefix=1)
    assert [seen.constants["DENSE"] for seen in launches[2:]] == [False, False, True, True]
    # A table of each head: as many programs as heads.
    assert [seen.programs for seen in launches[2:]] == [2 * 2 * 2, 2 * 2 * 2, 2 * 2 * 3, 2 * 2 * 3]


def test_tf32_reaches_the_tile_and_the_kernel(launches, choose):
    asked, asked_by_patches = choose("choose_gemm", GEMM), choose("choose_patch_embed", GEMM)
    choose("choose_mlp", None)
    choose("choose_attention", ATTENTION)
    draw = Draw(torch.float32, seed=2)
    x, weight, q = draw.normal(4, 8), draw.weight(8, 8), draw.normal(1, 4, 1, 16)
    linear(x, weight, tf32=True)
    mlp(x, weight, None, weight, norm="none", tf32=True)
    patch_embed(draw.images(1, 1, 4, 4), draw.weight(8, 1, 2, 2), tf32=True)
    attention(q, q, q, tf32=True)
    assert [options["tf32"] for *_, options in [*asked, *asked_by_patches]] == [True] * 4
    assert [launch.constants["PRECISION"] for launch in launches] == ["tf32"] * 5
    assert not any(launch.constants.get("FAST", False) for launch in launches)


def test_nothing_is_launched_for_nothing(launches):
    empty, weight, q = DRAW.normal(0, 8), DRAW.weight(8, 8), DRAW.normal(0, 4, 1, 16)
    linear(empty, weight)
    mlp(empty, weight, None, weight, norm="none")
    layer_norm(empty)
    row_stats(empty)
    attention(q, q, q)
    qk_rope(q, q)
    qk_rope(q.view(1, 0, 1, 16), q.view(1, 0, 1, 16))
    qk_rope(q.view(1, 4, 0, 16), q.view(1, 4, 0, 16))
    patch_embed(DRAW.images(0, 1, 4, 4), DRAW.weight(8, 1, 2, 2))
    assert launches == []


@pytest.mark.parametrize("current", [0, 1])
def test_the_tensors_own_gpu_is_made_the_current_one(monkeypatch, current):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current)
    tensor: Any = SimpleNamespace(is_cuda=True, device=torch.device("cuda", 1))
    guard = launch_module.launching_on(tensor)
    if current == 1:
        assert isinstance(guard, contextlib.nullcontext)
    else:
        assert isinstance(guard, torch.cuda.device) and guard.idx == 1


@pytest.mark.interpreted_only
def test_tensors_elsewhere_touch_no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: pytest.fail("asked for the current GPU"))
    assert isinstance(launch_module.launching_on(torch.zeros(1)), contextlib.nullcontext)


@pytest.mark.parametrize(
    ("device", "overlapping"), [(A100, {"OVERLAP": False}), (H100, {"OVERLAP": True, "launch_pdl": True})]
)
def test_a_launch_happens_while_its_gpu_is_current(monkeypatch, device, overlapping):
    """And with a grid along x, the one dimension that may pass 65535; from sm_90 on it may begin early."""
    current: list[Any] = []

    @contextlib.contextmanager
    def guard(tensor: torch.Tensor):
        current.append(tensor)
        yield
        current.clear()

    class Kernel:
        arg_names = ("a", "b")

        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            def run(a: int, **constants: Any) -> None:
                made.append((grid, a, constants, *current))

            return run

    made: list[tuple[Any, ...]] = []
    monkeypatch.setattr(launch_module, "launching_on", guard)
    monkeypatch.setattr(launch_module, "device_of", lambda tensor: device)
    x = torch.zeros(1)
    launch_module.launch(x, Kernel(), 70000, 5, b=6)
    assert made == [((70000, 1, 1), 5, {"b": 6, **overlapping}, x)] and current == []


def test_every_kernel_waits_for_the_launch_before_it_first():
    """`follow` comes before anything else a kernel does: a launch may begin before the one in front has ended. Only
    weights may be asked for ahead of it, which nobody reads there."""
    for name in ("attention", "linear_kernels", "linear_parts", "mlp", "norm", "patch_embed", "qk_rope"):
        module = importlib.import_module(f"vit_kernels.{name}")
        # The warps of `patch_embed_blocks` have roles: see below.
        named = [key for key in vars(module) if key.endswith("_kernel") and key != "patch_embed_blocks_kernel"]
        kernels = [vars(module)[key] for key in named]
        assert kernels
        for kernel in kernels:
            (function,) = ast.parse(textwrap.dedent(inspect.getsource(kernel.fn))).body
            assert isinstance(function, ast.FunctionDef)
            first, second = (ast.unparse(statement).splitlines() for statement in function.body[1:3])
            if first[0] == "if ahead_ptr is not None:" and len(first) == 2:
                assert first[1].startswith("    fetch_ahead(ahead_ptr, "), kernel.__name__
                first = second
            assert first == ["follow(OVERLAP)"], kernel.__name__


def test_where_warps_have_roles_those_that_load_wait_for_the_launch_before_it():
    """Only weights are loaded ahead of that, and whoever loads nothing works on what has been loaded."""
    load, multiply, finish, roles = (
        importlib.import_module(f"vit_kernels.linear_roles{part}") for part in ("_load", "_multiply", "_finish", "")
    )
    kernel = inspect.getsource(roles.linear_roles_kernel.fn)
    roles_of = set(re.findall(r"\( ?(multiply|finish|load\w*), \(", re.sub(r"\s+", " ", kernel)))
    assert roles_of == {"multiply", "finish", "load_operands", "load_statistics"}
    assert "load_block" not in kernel and "gl.load" not in kernel

    def before(function, call):
        (definition,) = ast.parse(textwrap.dedent(inspect.getsource(function.fn))).body
        assert isinstance(definition, ast.FunctionDef)
        lines = [line for statement in definition.body[1:] for line in ast.unparse(statement).splitlines()]
        (at,) = (n for n, line in enumerate(lines) if f"{call}(" in line)
        return "\n".join(lines[:at])

    loading = r"\bload\w*\("
    for role in (load.load_operands, multiply.multiply):
        assert set(re.findall(loading, before(role, "follow"))) <= {"load_weights("}
    assert set(re.findall(r"load_block\((\w+)", inspect.getsource(load.load_weights.fn))) == {"w_desc"}
    for role in (load.load_statistics, finish.finish):
        assert not re.search(loading, before(role, "follow")) and "gl.load" not in before(role, "follow")
    # A residual and vectors of columns are read by those who finish.
    assert "finish_piece" not in before(finish.finish, "follow") and "load_" not in before(finish.finish, "follow")
    assert "gl.load" not in inspect.getsource(multiply)

    staying = importlib.import_module("vit_kernels.linear_staying")
    kernel = re.sub(r"\s+", " ", inspect.getsource(staying.linear_staying_kernel.fn))
    assert set(re.findall(r"\( ?(_\w+), \(", kernel)) == {"_multiply", "_finish", "_load_operands", "_load_statistics"}
    assert "load_block" not in kernel and "gl.load" not in kernel
    assert set(re.findall(loading, before(staying._load_operands, "follow"))) == {"load_weights("}
    for role in (staying._load_statistics, staying._finish):
        assert not re.search(loading, before(role, "follow")) and "finish_piece" not in before(role, "follow")
    assert not re.search(loading, inspect.getsource(staying._multiply.fn))

    blocks = importlib.import_module("vit_kernels.patch_embed_blocks")
    assert set(re.findall(loading, before(blocks._load, "follow"))) == set()
    assert not re.search(r"load_block\((?!w_desc|w_tail_desc)", inspect.getsource(blocks._load_weights.fn))
    for role, memory in ((blocks._finish, "_write_front"), (blocks._multiply, "_finish_pieces")):
        assert memory in inspect.getsource(role.fn) and memory not in before(role, "follow")


class Compiled:
    """A compiled kernel that notes how it is launched: past Triton's hooks by run(), with them by [grid]()."""

    function, packed_metadata = "function", "metadata"

    def __init__(self) -> None:
        self.made: list[tuple[Any, ...]] = []

    def run(self, *everything: Any) -> None:
        self.made.append(("past hooks", *everything))

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *arguments, stream: self.made.append(("with hooks", grid, stream, *arguments))


@pytest.mark.parametrize("listener", [None, "launch_enter_hook", "launch_exit_hook"])
def test_repeated_launches_go_to_the_current_stream_and_to_whoever_listens(monkeypatch, listener):
    driver = SimpleNamespace(get_current_device=lambda: 3, get_current_stream=lambda device: f"stream of {device}")
    monkeypatch.setattr(launch_module, "active_driver", lambda: driver)
    compiled = Compiled()
    hook = getattr(knobs.runtime, listener) if listener else None

    def profiler(metadata: Any) -> None:
        """Listens."""

    if hook is not None:
        hook.add(profiler)
    try:
        launch_module.repeat([launch_module.Launched(compiled, (7, 1, 1), (5, 6))] * 2)
    finally:
        if hook is not None:
            hook.remove(profiler)
    if listener is None:
        made = ("past hooks", 7, 1, 1, "stream of 3", "function", "metadata", None, None, None, 5, 6)
    else:
        made = ("with hooks", (7, 1, 1), "stream of 3", 5, 6)
    assert compiled.made == [made] * 2


def test_a_tape_holds_the_launches_and_memory_of_its_block():
    x = DRAW.rows(3, 8)
    with launch_module.taped() as outer:
        y = layer_norm(x)
        with launch_module.taped() as inner:
            row_stats(x)
    layer_norm(x)
    assert [len(tape.launches) for tape in (outer, inner)] == [1, 1]
    assert [tuple(t.shape for t in tape.allocated) for tape in (outer, inner)] == [((3, 8),), ((2, 1, 3),)]
    (launch,) = outer.launches
    assert launch.grid[1:] == (1, 1) and launch.arguments[0] is x and launch.arguments[3] is y is outer.allocated[0]
    assert len(launch.arguments) == len(importlib.import_module("vit_kernels.norm").layer_norm_kernel.arg_names)


def test_a_descriptor_for_gluon_names_its_tensor_and_moves_like_the_others():
    x = torch.zeros(40, 64, dtype=torch.float16)
    described: Any = launch_module.describe_in_gluon(x, 16, 64)
    assert described.block_shape == [16, 64] and described.layout.swizzle_byte_width == 128
    assert launch_module.tensor_behind(described) is x
    moved: Any = launch_module.at_address(described, 4096)
    assert moved.base.data_ptr() == 4096 and moved.layout == described.layout and described.base is x
    assert launch_module.at_address(x, 4096) == 4096
