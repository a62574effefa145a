import copy
import io
import threading
from collections import OrderedDict
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers.pos_embed import resample_abs_pos_embed
from torch import Tensor

from tests.engine.redraw import images, relative, small_vit, timm_model
from vit_engine import position as position_module
from vit_engine.position import PositionCache, resample_position, square_grid

grids = st.tuples(st.integers(1, 9), st.integers(1, 9))


def table(rows: int, width: int = 6, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(1, rows, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@settings(max_examples=60, deadline=None)
@given(
    old=grids,
    new=grids,
    prefix=st.integers(0, 3),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
)
def test_bicubic_is_timms(old, new, prefix, dtype) -> None:
    position = table(prefix + old[0] * old[1], dtype=dtype)
    theirs = resample_abs_pos_embed(position, new_size=list(new), old_size=list(old), num_prefix_tokens=prefix)
    ours = resample_position(position, new, old, num_prefix=prefix)
    assert torch.equal(ours, theirs)
    assert ours.dtype == dtype


@settings(max_examples=60, deadline=None)
@given(old=grids, new=grids, prefix=st.integers(0, 2))
def test_bilinear_is_googles(old, new, prefix) -> None:
    """Google's checkpoint.py: scipy.ndimage.zoom of the grid with order=1."""
    zoom = pytest.importorskip("scipy.ndimage").zoom
    position = table(prefix + old[0] * old[1])
    grid = position[0, prefix:].reshape(*old, 6).numpy()
    theirs = zoom(grid, (new[0] / old[0], new[1] / old[1], 1), order=1, mode="nearest").reshape(-1, 6)
    ours = resample_position(position, new, old, num_prefix=prefix, method="bilinear")
    assert torch.equal(ours[:, :prefix], position[:, :prefix])
    # float64 on both sides; coordinates divided in another order differ in their last bits.
    np.testing.assert_allclose(ours[0, prefix:].numpy(), theirs, rtol=1e-10, atol=1e-10)


def test_float64_is_computed_in_float64() -> None:
    position = table(16)
    ours = resample_position(position, (7, 5), (4, 4))
    single = resample_position(position.float(), (7, 5), (4, 4))
    assert ours.dtype == torch.float64
    assert 1e-12 < relative(single.double(), ours) < 1e-5


@settings(max_examples=30, deadline=None)
@given(old=grids, new=grids, method=st.sampled_from(["bicubic", "bilinear"]))
def test_constant_stays_constant(old, new, method) -> None:
    ours = resample_position(torch.full((old[0] * old[1], 2), 1.5, dtype=torch.float64), new, old, method=method)
    assert ours.shape == (new[0] * new[1], 2)
    # float64: the weights of a cell add up to 1 but for rounding.
    torch.testing.assert_close(ours, torch.full_like(ours, 1.5), rtol=1e-12, atol=0)


def test_same_grid_is_the_same_tensor() -> None:
    position = table(7)
    assert resample_position(position, (2, 3), (2, 3), num_prefix=1) is position
    # As many cells, another shape: that is a different table.
    assert not torch.equal(resample_position(position, (3, 2), (2, 3), num_prefix=1), position)


def test_square_grid() -> None:
    assert [square_grid(n) for n in (0, 1, 2, 196, 197)] == [None, (1, 1), None, (14, 14), None]


@pytest.mark.parametrize(
    ("position", "arguments", "text"),
    [
        (table(16), {"method": "nearest"}, "method must be one of 'bicubic', 'bilinear', got 'nearest'"),
        (torch.zeros(2, 16, 6), {}, "position must be [rows, D] or [1, rows, D], got [2, 16, 6]"),
        (torch.zeros(16, 6, dtype=torch.int64), {}, "position must be floating point, got torch.int64"),
        (table(16), {"num_prefix": 17}, "num_prefix must be between 0 and the 16 rows of position, got 17"),
        (table(15), {}, "old_grid must be given, for 15 rows after 0 prefix rows are not those of a square grid"),
        (table(16), {"old_grid": (3, 5)}, "old_grid (3, 5) has 15 cells, but position has 16 rows after 0 prefix rows"),
        (table(16), {"new_grid": (0, 5)}, "new_grid must be two positive ints, got (0, 5)"),
    ],
)
def test_refuses(position: Tensor, arguments: dict, text: str) -> None:
    with pytest.raises(ValueError) as error:
        resample_position(position, **{"new_grid": (2, 2), **arguments})
    assert text in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"position": np.zeros((16, 6))}, "position must be a torch.Tensor, got ndarray"),
        ({"num_prefix": "1"}, "num_prefix must be an int, got '1'"),
        ({"num_prefix": 1.0}, "num_prefix must be an int, got 1.0"),
        ({"new_grid": 3}, "new_grid must be two positive ints, got 3"),
        ({"new_grid": (3.0, 3.0)}, "new_grid must be two positive ints, got (3.0, 3.0)"),
        ({"new_grid": None}, "new_grid must be two positive ints, got None"),
        ({"old_grid": "44"}, "old_grid must be two positive ints, got '44'"),
        ({"old_grid": (True, True)}, "old_grid must be two positive ints, got (True, True)"),
    ],
)
def test_other_types_are_named(arguments: dict, text: str) -> None:
    with pytest.raises(TypeError) as error:
        resample_position(**{"position": table(16), "new_grid": (2, 2), **arguments})
    assert text in str(error.value)


@pytest.mark.parametrize("grid", [3, None, "33"])
def test_the_model_names_a_grid_of_another_type(grid: Any, model) -> None:
    with pytest.raises(TypeError, match="new_grid must be two positive ints, got"):
        model.position_embedding(grid)


# --- the cache ------------------------------------------------------------------------------------


@pytest.fixture
def model():
    return small_vit().requires_grad_(False)


def expected(model) -> Tensor:
    return resample_position(model.pos_embed, (2, 5), (4, 4), num_prefix=1)[0]


def test_cache_returns_the_same_tensor(model) -> None:
    first = model.position_embedding((2, 5))
    assert torch.equal(first, expected(model))
    assert model.position_embedding((5, 2)).shape == first.shape
    assert model.position_embedding((2, 5)).data_ptr() == first.data_ptr()
    assert model.position_embedding((4, 4)).data_ptr() == model.pos_embed.data_ptr()


def _step(model, **how) -> None:
    model.pos_embed.requires_grad_(True).grad = torch.ones_like(model.pos_embed)
    torch.optim.SGD([model.pos_embed], lr=0.5, **how).step()
    model.pos_embed.requires_grad_(False)


def _replace(model) -> None:
    model.pos_embed = torch.nn.Parameter(table(17, 48, seed=3), requires_grad=False)


CHANGES = {
    "in place": lambda model: model.pos_embed.mul_(2),
    "optimizer": _step,
    "fused optimizer": lambda model: _step(model, fused=True),
    "load_state_dict": lambda model: model.load_state_dict(small_vit(seed=9).state_dict()),
    "assigned state": lambda model: model.load_state_dict(small_vit(seed=9).state_dict(), assign=True),
    "dtype": lambda model: model.float(),
    "replaced": _replace,
    "strides": lambda model: setattr(
        model.pos_embed, "data", model.pos_embed.data.as_strided((1, 17, 48), (816, 1, 17))
    ),
    "data replaced": lambda model: setattr(model.pos_embed, "data", table(17, 48, seed=4)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_cache_sees_changes(model, change: str) -> None:
    before = model.position_embedding((2, 5)).clone()
    CHANGES[change](model)
    after = model.position_embedding((2, 5))
    assert torch.equal(after, expected(model))
    assert not torch.equal(after.double(), before)


def test_clear_after_writing_through_data(model) -> None:
    model.position_embedding((2, 5))
    model.pos_embed.data.mul_(2)
    model.clear_cache()
    assert torch.equal(model.position_embedding((2, 5)), expected(model))


def test_gradient_goes_through_interpolation() -> None:
    model = small_vit()
    with torch.no_grad():
        model.position_embedding((2, 5))
    model(images(1, 3, 16, 40)).square().sum().backward()
    gradient = model.pos_embed.grad
    assert gradient is not None
    assert bool((gradient != 0).all())


def test_cache_is_no_inference_tensor(model) -> None:
    with torch.inference_mode():
        first = model.position_embedding((2, 5))
    assert not first.is_inference()
    model.head.weight.requires_grad_(True)
    model(images(1, 3, 16, 40)).sum().backward()
    assert model.head.weight.grad is not None


def test_parameters_made_in_inference_mode() -> None:
    with torch.inference_mode():
        model = small_vit()
        first = model.position_embedding((2, 5)).clone()
        model.pos_embed.mul_(2)
        assert torch.equal(model.position_embedding((2, 5)), expected(model))
        assert not torch.equal(first, expected(model))


def test_cache_is_no_part_of_state_copies_or_pickles(model) -> None:
    names = set(model.state_dict())
    size = _pickled_size(model)
    model.position_embedding((20, 20))
    assert set(model.state_dict()) == names
    assert _pickled_size(model) == size
    twin = copy.deepcopy(model)
    twin.pos_embed.mul_(3)
    assert torch.equal(twin.position_embedding((2, 5)), expected(twin))
    assert torch.equal(model.position_embedding((2, 5)), expected(model))


def _pickled_size(model) -> int:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    return buffer.tell()


def test_cache_is_bounded() -> None:
    cache, position = PositionCache(capacity=2), table(16)
    first = cache.get(position, (1, 1), (4, 4), num_prefix=0, method="bicubic")
    for side in (2, 1, 3):
        cache.get(position, (side, side), (4, 4), num_prefix=0, method="bicubic")
    assert len(cache._tables) == 2
    assert cache.get(position, (1, 1), (4, 4), num_prefix=0, method="bicubic") is first


def test_a_table_made_while_another_thread_writes_is_not_kept(model, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a pass returns that new weights overtake is its own affair; those after it have to see the new ones."""

    def overtaken(position: Tensor, *args, **kwargs) -> Tensor:
        made = resample_position(position, *args, **kwargs)
        writer = threading.Thread(target=lambda: position.mul_(2))
        writer.start()
        writer.join()
        return made

    with monkeypatch.context() as patched:
        patched.setattr(position_module, "resample_position", overtaken)
        model.position_embedding((2, 5))
    assert torch.equal(model.position_embedding((2, 5)), expected(model))


def test_a_table_is_not_kept_beside_those_of_newer_weights(model, monkeypatch: pytest.MonkeyPatch) -> None:
    model.position_embedding((5, 2))

    def overtaken(position: Tensor, *args, **kwargs) -> Tensor:
        made = resample_position(position, *args, **kwargs)
        monkeypatch.undo()
        position.mul_(2)
        model.position_embedding((5, 2))
        return made

    monkeypatch.setattr(position_module, "resample_position", overtaken)
    model.position_embedding((2, 5))
    assert torch.equal(model.position_embedding((2, 5)), expected(model))


def test_a_table_that_another_thread_gives_up() -> None:
    cache, position = PositionCache(capacity=1), table(16)
    clearing = [threading.Thread(target=cache.clear)]

    class Watched(OrderedDict):
        def get(self, key, default=None):
            found = super().get(key, default)
            if found is not None and clearing:
                clearing[0].start()
                clearing.pop().join(0.2)  # it may have to wait
            return found

    def get() -> Tensor:
        return cache.get(position, (1, 1), (4, 4), num_prefix=0, method="bicubic")

    cache._tables = Watched()
    first = get()
    assert torch.equal(get(), first) and not clearing


def test_a_table_on_the_gpu_is_there_for_every_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """As far as that shows without a GPU: a table is waited for before it is kept, and not kept from a capture."""
    cache, position = PositionCache(), table(16)
    waits: list[str] = []

    class Stream:
        def synchronize(self) -> None:
            waits.append("for the table" if not cache._tables else "too late")

    capturing = [True]
    monkeypatch.setattr(position_module, "_on_gpu", lambda tensor: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream())

    def get() -> Tensor:
        return cache.get(position, (2, 3), (4, 4), num_prefix=0, method="bicubic")

    in_graph = get()
    assert not waits and not cache._tables
    capturing[0] = False
    kept = get()
    assert waits == ["for the table"] and kept is not in_graph and torch.equal(kept, in_graph)
    assert get() is kept and len(waits) == 1


# --- whole models at other resolutions ------------------------------------------------------------


@pytest.mark.parametrize(
    "variant", [{}, {"no_embed_class": True, "num_register_tokens": 3}, {"num_register_tokens": 2}]
)
@pytest.mark.parametrize("size", [(16, 40), (64, 64), (8, 8)])
def test_other_resolutions_as_timms_dynamic_image_size(variant: dict, size: tuple[int, int]) -> None:
    ours = small_vit(**variant).float()
    theirs = timm_model(ours.config, dynamic_img_size=True)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = images(2, 3, *size, dtype=torch.float32)
    with torch.no_grad():
        assert relative(ours(x), theirs(x)) < 1e-5


def test_google_interpolation_by_config() -> None:
    ours = small_vit(position_interpolation="bilinear")
    expected = resample_position(ours.pos_embed, (2, 5), (4, 4), num_prefix=1, method="bilinear")[0]
    assert torch.equal(ours.position_embedding((2, 5)), expected)
