"""Arguments of load_image that no file could satisfy: named as such, whatever the file."""

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vit_engine.images import ImageError, find_images, load_image


@pytest.fixture
def file(tmp_path: Path) -> Path:
    Image.new("RGBA", (8, 8), (10, 20, 30, 128)).save(tmp_path / "a.png")
    return tmp_path / "a.png"


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"crop_fraction": "1"}, TypeError, "crop_fraction must be a number, got '1'"),
        ({"crop_fraction": None}, TypeError, "crop_fraction must be a number, got None"),
        ({"crop_fraction": True}, TypeError, "crop_fraction must be a number, got True"),
        ({"crop_fraction": 1j}, TypeError, "crop_fraction must be a number, got 1j"),
        ({"crop_fraction": math.nan}, ValueError, r"crop_fraction must be in \(0, 1\], got nan"),
        ({"crop_fraction": 1.5}, ValueError, r"crop_fraction must be in \(0, 1\], got 1.5"),
        ({"background": None}, ValueError, "background must be a grey value or .* got None"),
        ({"background": 1.5}, ValueError, "background must be a grey value or .* got 1.5"),
        ({"background": True}, ValueError, "background must be a grey value or .* got True"),
        # Sets have no order, and these bytes are no colour.
        ({"background": {1, 2, 3}}, ValueError, "background must be a grey value or .* got {1, 2, 3}"),
        ({"background": b"abc"}, ValueError, "background must be a grey value or .* got b'abc'"),
        ({"max_pixels": None}, TypeError, "max_pixels must be a number, got None"),
        ({"max_pixels": "9"}, TypeError, "max_pixels must be a number, got '9'"),
        ({"max_pixels": math.nan}, ValueError, "max_pixels must be positive, got nan"),
        ({"max_pixels": 0}, ValueError, "max_pixels must be positive, got 0"),
        ({"channels": 3.0}, TypeError, "channels must be the int 1 or 3, got 3.0"),
        ({"channels": True}, TypeError, "channels must be the int 1 or 3, got True"),
        ({"resize": np.array(["crop", "pad"])}, ValueError, "resize must be one of crop, squash, pad, got array"),
        ({"image_size": 2**31}, ValueError, "image_size must be positive and below 2.31, got 2147483648"),
    ],
    ids=str,
)
def test_what_no_file_could_satisfy_is_named(
    file: Path, options: dict[str, Any], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text) as caught:
        load_image(file, **{"image_size": 8, **options})
    assert not isinstance(caught.value, ImageError)


@pytest.mark.parametrize("path", [3, None, b"a.png"])
def test_what_is_no_path_is_named(path: Any) -> None:
    for call in (lambda: load_image(path, 8), lambda: find_images([path])):
        with pytest.raises(TypeError, match=f"a path must be a str or an os.PathLike, got {path!r}"):
            call()


@pytest.mark.parametrize("paths", ["a.png", Path("a.png"), b"a.png", None, 3])
def test_one_path_is_no_list_of_paths(paths: Any) -> None:
    with pytest.raises(TypeError, match=f"paths must be a list of paths, got {re.escape(repr(paths))}"):
        find_images(paths)


def test_numbers_of_numpy_are_numbers(file: Path) -> None:
    options: dict[str, Any] = {
        "channels": np.int64(3),
        "background": np.uint8(200),
        "crop_fraction": np.float32(0.5),
        "max_pixels": np.int32(64),
    }
    plain = load_image(file, 4, background=200, crop_fraction=0.5).pixels
    assert plain.equal(load_image(file, 4, **options).pixels)
    assert plain.equal(load_image(file, 4, background=(200, 200, 200), crop_fraction=0.5, max_pixels=math.inf).pixels)
