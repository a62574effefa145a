"""Properties of `patch_embed`."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vit_kernels import gemm_tiles, reference

from ..kernels.common import patch_embed, same_bits
from ..kernels.test_patch_embed import draw_patch_embed
from ..weights import Draw
from .strategies import (
    SPOILT,
    Arguments,
    Layout,
    any_gemm_tile,
    batches,
    dtypes,
    in_dtype,
    judge_among,
    judge_emitted,
    laid_out,
    layouts,
    poisons,
    refuses,
    seeds,
    several,
    sizes,
    spoilt,
    tiled,
)

# Interpreted, kernels are numpy: exp may overflow to infinity, and poisoned examples are full of NaN.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@dataclass(frozen=True)
class Case:
    """One call of `patch_embed`, as data. pixels: "bytes" or of the weight's dtype; normalise: with mean and std."""

    dtype: torch.dtype
    seed: int
    batch: int
    grid: tuple[int, int]
    patch: tuple[int, int]
    channels: int
    width: int
    prefix: int
    position: str
    bias: bool
    pixels: str
    normalise: bool
    emit_stats: bool
    layouts: dict[str, Layout]
    vectors: torch.dtype
    tile: gemm_tiles.GemmTile

    def build(self, draw: Draw) -> Arguments:
        """Arguments of the reference, contiguous."""
        arguments = draw_patch_embed(
            draw, self.batch, self.grid, self.patch, self.width,
            channels=self.channels, prefix=self.prefix, position=self.position, bias=self.bias,
        )  # fmt: skip
        if self.pixels == "bytes":
            arguments["images"] = draw.bytes(*arguments["images"].shape)
        if self.normalise:
            wide = Draw(torch.float32, draw.generator.initial_seed() + 1)
            mean, std = (wide.uniform(self.channels, low=low, high=0.6) for low in (0.4, 0.2))
            arguments |= {"mean": mean, "std": std}
        return laid_out(arguments, self.layouts)[0]

    def both(self) -> tuple[Arguments, Arguments]:
        """Arguments of the launcher, contiguous and in the drawn layouts."""
        arguments = self.build(Draw(self.dtype, self.seed)) | {"emit_stats": self.emit_stats}
        return laid_out(in_dtype(arguments, ("bias", "prefix", "position"), self.vectors), self.layouts)

    def run(self, arguments: Arguments) -> tuple[torch.Tensor, ...]:
        with tiled(patch_embed=self.tile):
            return several(patch_embed(**arguments))


@st.composite
def cases(draw: st.DrawFn, least_batch: int = 0) -> Case:
    dtype = draw(dtypes)
    layout = {"images": layouts(4), "weight": layouts(4), "bias": layouts(1)}
    layout |= {"prefix": layouts(2), "position": layouts(2)}
    return Case(
        dtype,
        draw(seeds),
        draw(batches(least_batch, 3)),
        (draw(st.integers(1, 4)), draw(st.integers(1, 4))),
        (draw(st.integers(1, 5)), draw(st.integers(1, 5))),
        draw(st.integers(1, 4)),
        draw(sizes(1, 70)),
        draw(st.integers(0, 3)),
        draw(st.sampled_from(["all", "patches", "none"])),
        draw(st.booleans()),
        draw(st.sampled_from(["floating", "bytes"])),
        draw(st.booleans()),
        draw(st.booleans()),
        {name: draw(strategy) for name, strategy in layout.items()},
        draw(st.sampled_from([dtype, torch.float32])),
        draw(any_gemm_tile),
    )


@pytest.mark.sanitize
@given(cases())
def test_agrees_with_the_reference(case: Case) -> None:
    tokens, *stats = case.run(case.both()[1])
    assert tokens.is_contiguous()
    judge_among(tokens, reference.patch_embed, case.build, case.dtype, case.seed)
    if stats and tokens.numel():
        judge_emitted(stats[0], tokens.flatten(0, 1))


@given(cases())
def test_layout_changes_no_bit(case: Case) -> None:
    dense, views = case.both()
    for ours, expected in zip(case.run(views), case.run(dense), strict=True):
        same_bits(ours, expected)


@given(cases(least_batch=1), poisons, st.data())
def test_images_do_not_mix(case: Case, poison: float, data: st.DataObject) -> None:
    """What one image holds changes no token of another, though they share tiles."""
    arguments = case.both()[0]
    clean = case.run(arguments)[0]
    image = data.draw(st.integers(0, case.batch - 1), label="image")
    images = arguments["images"].clone()
    images[image] = poison if images.is_floating_point() else 255
    others = [i for i in range(case.batch) if i != image]
    same_bits(case.run(arguments | {"images": images})[0][others], clean[others])


@given(cases(least_batch=1), st.data())
def test_fewer_images_are_the_first_images(case: Case, data: st.DataObject) -> None:
    arguments = case.both()[0]
    few = data.draw(st.integers(0, case.batch), label="few")
    fewer = arguments | {"images": arguments["images"][:few]}
    same_bits(case.run(fewer)[0], case.run(arguments)[0][:few])


@given(cases(least_batch=1))
def test_a_prefix_token_knows_no_image(case: Case) -> None:
    """It is itself plus its position, rounded once; NaN in every image changes nothing."""
    arguments = case.both()[0]
    if case.pixels == "floating":
        arguments["images"] = torch.full_like(arguments["images"], float("nan"))
    tokens = case.run(arguments)[0][:, : case.prefix]
    expected = torch.zeros(case.prefix, case.width) if case.prefix == 0 else arguments["prefix"].float()
    if case.position == "all" and case.prefix:
        expected = expected + arguments["position"][: case.prefix].float()
    same_bits(tokens, expected.to(case.dtype).to(tokens.device).expand(case.batch, -1, -1))


@given(cases(least_batch=1), st.data())
def test_patches_do_not_mix(case: Case, data: st.DataObject) -> None:
    """A pixel belongs to one token."""
    arguments = case.both()[0]
    (rows, columns), (ph, pw) = case.grid, case.patch
    arguments["images"] = arguments["images"].clone()
    clean = case.run(arguments)[0]
    y, x = (data.draw(st.integers(0, n * p - 1)) for n, p in zip(case.grid, case.patch, strict=True))
    pixel = arguments["images"][..., y, x]
    pixel.copy_(torch.full_like(pixel, float("nan")) if pixel.is_floating_point() else 255 - pixel)
    token = case.prefix + y // ph * columns + x // pw
    ours = case.run(arguments)[0]
    others = [t for t in range(case.prefix + rows * columns) if t != token]
    same_bits(ours[:, others], clean[:, others])
    assert torch.isnan(ours[:, token]).all() or case.pixels == "bytes"


def test_a_weight_of_every_other_column() -> None:
    """Its patches flatten to columns two places apart, without a copy."""
    draw = Draw(torch.float32)
    arguments = {"images": draw.images(1, 3, 4, 4), "weight": draw.weight(5, 3, 2, 4)[..., ::2]}
    same_bits(patch_embed(**arguments), patch_embed(arguments["images"], arguments["weight"].contiguous()))


TENSORS = ("images", "weight", "bias", "prefix", "position", "mean", "std")


@given(st.sampled_from(TENSORS), st.sampled_from(SPOILT), st.data())
def test_refuses_a_spoilt_argument(name: str, how: str, data: st.DataObject) -> None:
    # Patches of at least two pixels each way, so that one more row or column is no whole patch; more than one prefix
    # token, so that one more position is neither of the two numbers that are allowed.
    patch = (data.draw(st.integers(2, 3)), data.draw(st.integers(2, 3)))
    good = draw_patch_embed(Draw(torch.float32), 1, (2, 1), patch, data.draw(st.integers(1, 5)), prefix=2)
    good |= {n: torch.full((3,), 0.5, device=good["images"].device) for n in ("mean", "std")}
    # Another image, and another prefix token where there are no positions, would be as good.
    axis = data.draw(st.integers(1 if name == "images" else 0, good[name].ndim - 1), label="axis")
    refuses(patch_embed, good, name, spoilt(good[name], how, axis), how)
