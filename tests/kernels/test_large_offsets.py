"""Every offset product of every kernel, beyond 2^31 elements: one probe each that fails if it were computed in 32 bits.

Two kinds. A *read* is probed by stretching one axis of one argument until its last index times its stride passes 2^31;
the other products of the launch stay small. A *write*, and a read of what must be contiguous, is probed by a result
with so many rows that its last one lies beyond. Either way only the last program runs, which meets the last index of
everything, and its result must be that of the compact run, bit for bit.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from vit_kernels import attention_tiles, fold_norm, gemm_tiles, mlp_tiles, qk_rope_tiles, row_stats, tiles

from ..rung import RUNG
from ..weights import Draw
from .common import attention, attention_packed, layer_norm, linear, mlp, patch_embed, qk_rope, same_bits
from .large import INT32, last_programs, sparse, spread

pytestmark = pytest.mark.skipif(
    RUNG == "sanitized", reason="the sanitizer copies and fills whole storages: gigabytes of real memory per probe"
)

FLOAT16 = torch.float16
# More rows than this, and the last partial of three (129 columns) lies beyond 2^31 elements of the statistics.
THIRD_PARTIAL = INT32 // 2 + 1


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch):
    """Several programs and steps in small shapes, and shapes that decide which product is the large one."""
    gemm = gemm_tiles.GemmTile(16, 64, 16, 4, 2, group_m=2)
    monkeypatch.setattr(gemm_tiles, "choose_gemm", lambda *a, **k: gemm)
    monkeypatch.setattr(gemm_tiles, "choose_patch_embed", lambda *a, **k: gemm)
    monkeypatch.setattr(mlp_tiles, "choose_mlp", lambda *a, **k: mlp_tiles.MlpTile(16, 16, 4, 1))
    tile = attention_tiles.AttentionTile(16, 16, 4, 2)
    monkeypatch.setattr(attention_tiles, "choose_attention", lambda *a, **k: tile)
    monkeypatch.setattr(tiles, "choose_rows", lambda *a, **k: tiles.RowsTile(2, 16, 4))
    monkeypatch.setattr(qk_rope_tiles, "choose_qk_rope", lambda *a, **k: qk_rope_tiles.QkRopeTile(8, 2, 4))


@pytest.fixture
def draw() -> Draw:
    return Draw(FLOAT16, seed=1)


def rows_beyond(columns: int) -> int:
    """So many rows of this many columns that the last one begins beyond 2^31 elements."""
    return INT32 // columns + 2


def probe_read(launcher: Any, arguments: dict[str, Any], name: str, axis: int) -> None:
    """The launcher gives the same bits when one axis of one argument is stretched beyond 2^31 elements."""
    with last_programs():
        clean = launcher(**arguments)
        ours = launcher(**arguments | {name: spread(arguments[name], axis)})
    for mine, expected in zip(_several(ours), _several(clean), strict=True):
        assert expected.any()
        same_bits(mine, expected)


def _several(results: Any) -> tuple[torch.Tensor, ...]:
    return results if isinstance(results, tuple) else (results,)


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
@pytest.mark.parametrize(
    ("name", "axis", "k"),
    [
        pytest.param("x", 0, 16, id="x-rows"),
        pytest.param("x", 1, 16, id="x-columns"),
        pytest.param("x", 1, 17, id="x-step"),
        pytest.param("weight", 0, 16, id="weight-rows"),
        pytest.param("weight", 1, 16, id="weight-columns"),
        pytest.param("weight", 1, 17, id="weight-step"),
        pytest.param("bias", 0, 16, id="bias"),
        pytest.param("layer_scale", 0, 16, id="layer-scale"),
        pytest.param("residual", 0, 16, id="residual-rows"),
        pytest.param("residual", 1, 16, id="residual-columns"),
    ],
)
def test_linear_reads(draw, name, axis, k, activation):
    """16 inputs are one step of the tile: the last index within the step is the large one. 17: the step itself is."""
    m, n = 20, 20
    outputs = 2 * n if activation == "swiglu" else n
    arguments = {"x": draw.normal(m, k), "weight": draw.weight(outputs, k), "bias": draw.bias(outputs)}
    arguments |= {"layer_scale": draw.layer_scale(n), "residual": draw.rows(m, n)}
    probe_read(linear, arguments | {"activation": activation}, name, axis)


def test_linear_writes_rows(draw):
    m = rows_beyond(64)
    x, weight = draw.normal(1, 16), draw.weight(64, 16)
    with last_programs():
        y = linear(x.expand(m, 16), weight)
    same_bits(y[-1:], linear(x, weight))


def test_linear_writes_statistics(draw):
    x, weight = draw.normal(1, 16), draw.weight(129, 16)
    with last_programs():
        _, stats = linear(x.expand(THIRD_PARTIAL, 16), weight, emit_stats=True)
    clean = linear(x, weight, emit_stats=True)[1]
    # The last program holds the last 64-column tile.
    same_bits(stats[:, 2:, -1:], clean[:, 2:])


def test_linear_reads_statistics(draw):
    x, stats = linear(draw.normal(1, 16), draw.weight(129, 16), emit_stats=True)
    weight, column_sum, bias = fold_norm(draw.weight(5, 129), draw.bias(5), draw.gamma(129), draw.bias(129))
    options = {"weight": weight, "bias": bias, "column_sum": column_sum, "norm": "layer"}
    many = sparse((2, 3, THIRD_PARTIAL), torch.float32)
    many[:, :, -16:] = stats
    with last_programs():
        y = linear(x.expand(THIRD_PARTIAL, 129), stats=many, **options)
    same_bits(y[-1:], linear(x, stats=stats, **options))


@pytest.mark.parametrize(
    "m",
    [
        pytest.param(INT32 - 1, id="the-most-that-int32-holds"),
        pytest.param(INT32 + 5, id="more"),
    ],
)
def test_linear_of_rows_by_the_billion(draw, m):
    x, weight = draw.normal(1, 16), draw.weight(1, 16)
    with last_programs():
        y = linear(x.expand(m, 16), weight)
    same_bits(y[-1:], linear(x, weight))


def test_linear_of_gates_by_the_billion(draw):
    """2^30 gates and as many values: their bias is one vector of more than 2^31."""
    n = INT32 // 2 + 8
    x, weight, bias = draw.normal(1, 1), draw.weight(1, 1), draw.bias(1)
    with last_programs():
        y = linear(x, weight.expand(2 * n, 1), bias.expand(2 * n), activation="swiglu")
    same_bits(y[:, -1:], linear(x, weight.expand(2, 1), bias.expand(2), activation="swiglu"))


MLP_ARGUMENTS = ("x", "fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias", "layer_scale", "residual")


def draw_mlp(draw: Draw, m: int, width: int, hidden: int, activation: str = "gelu") -> dict[str, Any]:
    outputs = 2 * hidden if activation == "swiglu" else hidden
    tensors = (draw.normal(m, width), draw.weight(outputs, width), draw.bias(outputs), draw.weight(width, hidden))
    tensors += (draw.bias(width), draw.layer_scale(width), draw.rows(m, width))
    return dict(zip(MLP_ARGUMENTS, tensors, strict=True)) | {"norm": "none", "activation": activation}


def with_rows(arguments: dict[str, Any], m: int) -> dict[str, Any]:
    """The one row of x and of the residual, m times."""
    return arguments | {name: arguments[name].expand(m, -1) for name in ("x", "residual")}


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
@pytest.mark.parametrize(
    ("fused", "width"),
    [
        pytest.param(True, 64, id="one-kernel"),
        pytest.param(True, 80, id="one-kernel-with-a-tail"),
        pytest.param(False, 64, id="two-gemms"),
    ],
)
@pytest.mark.parametrize(
    ("name", "axis"), [(n, a) for n in MLP_ARGUMENTS for a in range(1 if "bias" in n or n == "layer_scale" else 2)]
)
def test_mlp_reads(draw, name, axis, width, activation, fused):
    """With a tail the last of the columns, the large one, is in it."""
    probe_read(mlp, draw_mlp(draw, 20, width, 20, activation) | {"fused": fused}, name, axis)


@pytest.mark.parametrize("width", [64, 80], ids=["width-64", "width-64-and-tail"])
def test_mlp_writes_rows(draw, width):
    arguments = draw_mlp(draw, 1, width, 20) | {"fused": True}
    with last_programs():
        y = mlp(**with_rows(arguments, rows_beyond(width)))
    same_bits(y[-1:], mlp(**arguments))


def test_mlp_writes_statistics(draw):
    arguments = draw_mlp(draw, 1, 129, 20) | {"fused": True, "emit_stats": True}
    with last_programs():
        _, stats = mlp(**with_rows(arguments, THIRD_PARTIAL))
    same_bits(stats[:, :, -1:], mlp(**arguments)[1])


def test_mlp_keeps_hidden_features(draw):
    """Two GEMMs: what the first writes and the second reads has more than 2^31 elements; x and y have not."""
    arguments = draw_mlp(draw, 1, 16, 64) | {"fused": False}
    with last_programs():
        y = mlp(**with_rows(arguments, rows_beyond(64)))
    same_bits(y[-1:], mlp(**arguments))


one_and_many_tiles = pytest.mark.parametrize("n", [12, 40], ids=["one-tile", "three-tiles"])


@one_and_many_tiles
@pytest.mark.parametrize("axis", [0, 1], ids=["rows", "columns"])
def test_row_stats_reads(draw, axis, n):
    probe_read(row_stats, {"x": draw.rows(5, n)}, "x", axis)


@one_and_many_tiles
@pytest.mark.parametrize(("name", "axis"), [("x", 0), ("x", 1), ("weight", 0), ("bias", 0)])
def test_layer_norm_reads(draw, name, axis, n):
    arguments = {"x": draw.rows(5, n), "weight": draw.gamma(n), "bias": draw.bias(n)}
    probe_read(layer_norm, arguments, name, axis)


@one_and_many_tiles
def test_layer_norm_writes_rows(draw, n):
    x = draw.rows(1, n)
    with last_programs():
        y = layer_norm(x.expand(rows_beyond(n), n))
    same_bits(y[-1:], layer_norm(x))


@pytest.mark.parametrize(
    ("axis", "grid", "patch"),
    [
        pytest.param(0, (2, 2), (2, 2), id="images"),
        pytest.param(1, (2, 2), (2, 2), id="channels"),
        pytest.param(2, (3, 2), (1, 2), id="rows-of-patches"),
        pytest.param(2, (1, 2), (3, 2), id="rows-in-a-patch"),
        pytest.param(3, (2, 3), (2, 1), id="columns-of-patches"),
        pytest.param(3, (2, 1), (2, 3), id="columns-in-a-patch"),
    ],
)
def test_patch_embed_reads_images(draw, axis, grid, patch):
    images = draw.images(3, 3, grid[0] * patch[0], grid[1] * patch[1])
    arguments = {"images": images, "weight": draw.weight(20, 3, *patch), "prefix": draw.normal(1, 20)}
    probe_read(patch_embed, arguments, "images", axis)


@pytest.mark.parametrize("name", ["weight", "bias", "prefix", "position"])
@pytest.mark.parametrize("positions", [4, 7], ids=["patches", "all-tokens"])
def test_patch_embed_reads_parameters(draw, name, positions):
    arguments = {"images": draw.images(2, 3, 4, 4), "weight": draw.weight(20, 3, 2, 2), "bias": draw.bias(20)}
    arguments |= {"prefix": draw.normal(3, 20), "position": draw.normal(positions, 20)}
    probe_read(patch_embed, arguments, name, 0)


def test_patch_embed_writes_rows(draw):
    image, weight = draw.images(1, 3, 2, 2), draw.weight(64, 3, 2, 2)
    with last_programs():
        tokens = patch_embed(image.expand(rows_beyond(64), 3, 2, 2), weight)
    same_bits(tokens[-1:], patch_embed(image, weight))


def test_patch_embed_writes_statistics(draw):
    image, weight = draw.images(1, 3, 2, 2), draw.weight(129, 3, 2, 2)
    with last_programs():
        _, stats = patch_embed(image.expand(THIRD_PARTIAL, 3, 2, 2), weight, emit_stats=True)
    same_bits(stats[:, 2:, -1:], patch_embed(image, weight, emit_stats=True)[1][:, 2:])


def draw_attention(draw: Draw, width: int) -> dict[str, Any]:
    """Three images of three heads, 20 queries and 40 keys each: several tiles and blocks."""
    q, k, v = (draw.normal(3, tokens, 3, width) for tokens in (20, 40, 40))
    return {"q": q, "k": k, "v": v, "return_lse": True}


@pytest.mark.parametrize("width", [16, 40], ids=["width-16", "width-32-and-tail"])
@pytest.mark.parametrize("name", ["q", "k", "v"])
@pytest.mark.parametrize(
    "axis",
    [
        pytest.param(0, id="images"),
        pytest.param(1, id="tokens"),
        pytest.param(2, id="heads"),
        pytest.param(3, id="columns"),
    ],
)
def test_attention_reads(draw, name, axis, width):
    probe_read(attention, draw_attention(draw, width), name, axis)


@pytest.mark.parametrize("name", ["k", "v"])
@pytest.mark.parametrize("keys", [16, 33], ids=["inside-a-block", "start-of-a-block"])
def test_attention_reads_the_last_key_of_all(draw, name, keys):
    """The offset of a key is the offset of its block and that inside the block, each of which may be the large one."""
    arguments = {"q": draw.normal(1, 5, 1, 16)} | {name: draw.normal(1, keys, 1, 16) for name in ("k", "v")}
    probe_read(attention, arguments, name, 1)


@pytest.mark.parametrize("name", ["q", "k", "v"])
@pytest.mark.parametrize("lengths", [[20], [16, 1]], ids=["inside-a-sequence", "start-of-a-sequence"])
def test_attention_packed_reads(draw, name, lengths):
    """The offset of a row is that of its sequence and that inside it, each of which may be the large one."""
    arguments = {name: draw.normal(sum(lengths), 2, 16) for name in ("q", "k", "v")}
    bounds = torch.tensor([0, *lengths], device=draw.device).cumsum(0)
    probe_read(attention_packed, arguments | {"cu_seqlens": bounds, "max_seqlen": max(lengths)}, name, 0)


@pytest.mark.parametrize("kind", ["additive", "boolean"])
@pytest.mark.parametrize("axis", range(4), ids=["images", "heads", "queries", "keys"])
def test_attention_reads_mask(draw, axis, kind):
    mask = draw.normal(3, 3, 20, 40)
    mask = mask > -0.5 if kind == "boolean" else mask
    probe_read(attention, draw_attention(draw, 16) | {"mask": mask}, "mask", axis)


def test_attention_of_almost_as_many_queries_as_int32_holds(draw):
    q, k, v = draw.normal(1, 1, 1, 1), draw.normal(1, 5, 1, 1), draw.normal(1, 5, 1, 1)
    with last_programs():
        o = attention(q.expand(1, INT32 - 1, 1, 1), k, v)
    same_bits(o[:, -1:], attention(q, k, v))


@pytest.mark.parametrize(
    ("batch", "queries", "heads", "width"),
    [
        pytest.param(3, INT32 // 2, 1, 1, id="queries-of-images"),
        pytest.param(1, INT32 // 4 + 1, 4, 1, id="heads-of-queries"),
        pytest.param(1, INT32 // 64 + 1, 4, 16, id="columns-of-heads"),
    ],
)
def test_attention_writes(draw, batch, queries, heads, width):
    """Each factor of an output's offset in turn; lse [B, H, Nq] is as large in the first two."""
    q, k, v = draw.normal(1, 1, heads, width), draw.normal(1, 5, heads, width), draw.normal(1, 5, heads, width)
    many = (q.expand(batch, queries, heads, width), *(x.expand(batch, 5, heads, width) for x in (k, v)))
    with last_programs():
        o, lse = attention(*many, return_lse=True)
    clean_o, clean_lse = attention(q, k, v, return_lse=True)
    # The last program is the last head's.
    same_bits(o[-1:, -1:, -1:], clean_o[:, :, -1:])
    same_bits(lse[-1:, -1:, -1:], clean_lse[:, -1:])


@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
@pytest.mark.parametrize(
    ("name", "axis"),
    [
        *((name, axis) for name in ("q", "k", "cos", "sin") for axis in range(4)),
        *((name, 0) for name in ("q_weight", "q_bias", "k_weight", "k_bias")),
    ],
)
def test_qk_rope_reads(draw, name, axis, interleaved):
    """Three images of four heads: two programs of two, or, with the tables of each head, four of one."""
    shape = (3, 20, 4, 16)
    arguments: dict[str, Any] = {"q": draw.normal(*shape), "k": draw.normal(*shape), "norm": "layer"}
    arguments |= {name: draw.gamma(16) for name in ("q_weight", "q_bias", "k_weight", "k_bias")}
    table = (3, 1 if axis == 3 else 4, 19, 16)
    arguments |= {"cos": draw.normal(*table), "sin": draw.normal(*table), "prefix": 1, "interleaved": interleaved}
    probe_read(qk_rope, arguments, name, axis)


@pytest.mark.parametrize("rope", ["halves", "interleaved"])
@pytest.mark.parametrize(
    ("batch", "tokens", "heads", "width"),
    [
        pytest.param(3, INT32 // 4, 1, 2, id="tokens-of-images"),
        pytest.param(1, INT32 // 8 + 1, 4, 2, id="heads-of-tokens"),
        pytest.param(1, INT32 // 64 + 1, 4, 16, id="columns-of-heads"),
    ],
)
def test_qk_rope_writes(draw, batch, tokens, heads, width, rope):
    q, k, cos, sin = (draw.normal(*shape, width) for shape in [(1, 1, heads)] * 2 + [(1,)] * 2)
    options = {"interleaved": rope == "interleaved", "norm": "rms"}
    many = (x.expand(batch, tokens, heads, width) for x in (q, k))
    with last_programs():
        results = qk_rope(*many, cos=cos.expand(tokens, width), sin=sin.expand(tokens, width), **options)
    # The last program is the last heads'.
    for ours, clean in zip(results, qk_rope(q, k, cos=cos, sin=sin, **options), strict=True):
        same_bits(ours[-1:, -1:, -2:], clean[:, :, -2:])


def test_qk_rope_of_almost_as_many_tokens_as_int32_holds(draw):
    q, k = draw.normal(1, 1, 1, 1), draw.normal(1, 1, 1, 1)
    q_out, k_out = qk_rope(q, k)
    with last_programs():
        results = qk_rope(*(x.expand(1, INT32 - 1, 1, 1) for x in (q, k)))
    for ours, clean in zip(results, (q_out, k_out), strict=True):
        same_bits(ours[:, -1:], clean)
