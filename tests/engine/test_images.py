"""Image files of every kind become uint8 tensors, or one line that names the file and the reason."""

from __future__ import annotations

import os
import struct
import warnings
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from vit_engine.images import MAX_PIXELS, ImageError, load_image, printable

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def quadrants(colours=(RED, GREEN, BLUE, WHITE), side=8):
    """An image whose four quadrants differ, so that every flip and rotation shows."""
    image = Image.new("RGB", (2 * side, 2 * side))
    for i, colour in enumerate(colours):
        image.paste(colour, (side * (i % 2), side * (i // 2), side * (i % 2) + side, side * (i // 2) + side))
    return image


def save(image, path, **options):
    """Write as exactly as the format can, so that colours survive."""
    exact = {".webp": {"lossless": True}, ".jpg": {"quality": 100, "subsampling": 0}}
    image.save(path, **exact.get(path.suffix, {}), **options)


def corners(pixels):
    """The colours of the four quadrants of [3, H, W], read in their centres."""
    quarter, three = pixels.shape[1] // 4, 3 * pixels.shape[1] // 4
    return [tuple(pixels[:, y, x].tolist()) for y in (quarter, three) for x in (quarter, three)]


def png(width, height, bits=8, colour_type=0, data=b""):
    """A PNG file with a header of our choice, which Pillow would refuse to write."""

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, bits, colour_type, 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress(data))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + pixels + chunk(b"IEND", b"")


def refusal(path, **options):
    with pytest.raises(ImageError) as caught:
        load_image(path, 8, **options)
    message = str(caught.value)
    assert message.startswith(printable(path) + ": ")
    assert "\n" not in message
    assert caught.value.path == path
    return caught.value.reason


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
def test_exif_orientation_is_applied(tmp_path, orientation, suffix):
    upright = quadrants()
    # How a camera held that way stores the upright scene: the inverse of what the tag tells a viewer to do.
    stored = {
        1: upright,
        2: upright.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        3: upright.transpose(Image.Transpose.ROTATE_180),
        4: upright.transpose(Image.Transpose.FLIP_TOP_BOTTOM),
        5: upright.transpose(Image.Transpose.TRANSPOSE),
        6: upright.transpose(Image.Transpose.ROTATE_90),
        7: upright.transpose(Image.Transpose.TRANSVERSE),
        8: upright.transpose(Image.Transpose.ROTATE_270),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"photo.{suffix}"
    save(stored, path, exif=exif)
    result = load_image(path, 16)
    got = np.array(corners(result.pixels), dtype=int)
    assert np.abs(got - np.array([RED, GREEN, BLUE, WHITE])).max() <= 3
    assert result.note is None


def test_orientation_swaps_the_sides(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    image = Image.new("RGB", (40, 20))
    image.paste(RED, (0, 0, 20, 20))  # left half red: upright, the top half is
    image.save(tmp_path / "a.png", exif=exif)
    pixels = load_image(tmp_path / "a.png", (40, 20)).pixels
    assert pixels.shape == (3, 40, 20)
    assert pixels[:, :19].float().mean((1, 2)).tolist() == [255, 0, 0]
    assert pixels[:, 21:].float().mean((1, 2)).tolist() == [0, 0, 0]


def test_broken_exif_does_not_cost_the_image(tmp_path):
    quadrants().save(tmp_path / "a.jpg", exif=b"Exif\x00\x00MM\x00\x2a\xff\xff\xff\xff", quality=100, subsampling=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert load_image(tmp_path / "a.jpg", 16).pixels.shape == (3, 16, 16)


@pytest.mark.parametrize(
    ("mode", "suffix", "value", "expected"),
    [
        ("L", "png", 77, (77, 77, 77)),
        ("L", "jpg", 77, (77, 77, 77)),
        ("1", "png", 1, (255, 255, 255)),
        ("CMYK", "jpg", (0, 255, 255, 0), (255, 0, 0)),
        ("CMYK", "tif", (255, 0, 255, 0), (0, 255, 0)),
        ("YCbCr", "jpg", (76, 85, 255), (254, 0, 0)),
        ("RGBA", "png", (10, 20, 30, 255), (10, 20, 30)),
        ("LA", "png", (90, 255), (90, 90, 90)),
    ],
)
def test_modes_become_rgb(tmp_path, mode, suffix, value, expected):
    path = tmp_path / f"a.{suffix}"
    Image.new(mode, (12, 10), value).save(path)
    pixels = load_image(path, 8).pixels
    assert (pixels.dtype, pixels.shape, pixels.is_contiguous()) == (torch.uint8, (3, 8, 8), True)
    assert (pixels.int() - torch.tensor(expected).view(3, 1, 1)).abs().max() <= 2


@pytest.mark.parametrize("colour", [RED, GREEN, BLUE, (100, 150, 200)])
def test_one_channel_is_luma(tmp_path, colour):
    Image.new("RGB", (9, 9), colour).save(tmp_path / "a.png")
    pixels = load_image(tmp_path / "a.png", 9, channels=1).pixels
    luma = 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2]
    assert pixels.shape == (1, 9, 9)
    assert (pixels.float() - luma).abs().max() <= 1


def test_transparency_shows_the_background(tmp_path):
    image = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    image.paste((200, 0, 0, 255), (0, 0, 4, 8))
    image.paste((0, 0, 0, 128), (6, 0, 8, 8))
    image.save(tmp_path / "a.png")
    white = load_image(tmp_path / "a.png", 8).pixels[:, 0]
    assert white[:, [0, 5]].T.tolist() == [[200, 0, 0], [255, 255, 255]]
    assert (white[:, 7].int() - 127).abs().max() <= 1
    assert load_image(tmp_path / "a.png", 8, background=(1, 2, 3)).pixels[:, 0, 5].tolist() == [1, 2, 3]
    assert load_image(tmp_path / "a.png", 8, background=0, channels=1).pixels[0, 0, 5].item() == 0


def test_transparent_palette_colours_and_keyed_greys(tmp_path):
    palette = Image.new("P", (8, 8), 0)
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.paste(1, (4, 0, 8, 8))
    palette.save(tmp_path / "p.png", transparency=b"\x00\xff")
    palette.save(tmp_path / "p.gif", transparency=0)
    for name in ("p.png", "p.gif"):
        pixels = load_image(tmp_path / name, 8).pixels
        assert pixels[:, 0, 0].tolist() == [255, 255, 255], name
        assert pixels[:, 0, 7].tolist() == [40, 50, 60], name
    grey = Image.new("L", (8, 8), 7)
    grey.paste(99, (4, 0, 8, 8))
    grey.save(tmp_path / "g.png", transparency=7)
    assert load_image(tmp_path / "g.png", 8).pixels[0, 0, [0, 7]].tolist() == [255, 99]
    wide = np.full((8, 8), 700, np.uint16)
    wide[:, 4:] = 65535
    Image.fromarray(wide).save(tmp_path / "w.png", transparency=65535)
    assert load_image(tmp_path / "w.png", 8, background=50).pixels[0, 0, [0, 7]].tolist() == [3, 50]


def sixteen_bits():
    return np.linspace(0, 65535, 64).round().astype(np.uint16).reshape(8, 8)


@pytest.mark.parametrize("name", ["a.png", "little.tif", "a.jp2", "a.pgm"])
def test_16_bit_is_scaled_not_clipped(tmp_path, name):
    values = sixteen_bits()
    if name.endswith("pgm"):
        (tmp_path / name).write_bytes(b"P5 8 8 65535\n" + values.astype(">u2").tobytes())
    else:
        Image.fromarray(values).save(tmp_path / name)
    expected = np.round(values * (255 / 65535))
    pixels = load_image(tmp_path / name, 8).pixels
    assert np.abs(pixels.numpy().astype(int) - expected).max() == 0


def test_16_bit_big_endian_and_white_is_zero_tiff(tmp_path):
    values = sixteen_bits()
    Image.frombytes("I;16B", (8, 8), values.astype(">u2").tobytes()).save(tmp_path / "big.tif")
    expected = np.round(values * (255 / 65535))
    assert np.array_equal(load_image(tmp_path / "big.tif", 8, channels=1).pixels[0].numpy(), expected)
    Image.fromarray(values).save(tmp_path / "inverted.tif", tiffinfo={262: 0})
    assert np.array_equal(load_image(tmp_path / "inverted.tif", 8, channels=1).pixels[0].numpy(), 255 - expected)


def test_16_bit_colour_png_is_scaled(tmp_path):
    rows = b"".join(b"\x00" + struct.pack(">3H", 65535, 32768, 257) * 8 for _ in range(8))
    (tmp_path / "a.png").write_bytes(png(8, 8, bits=16, colour_type=2, data=rows))
    assert load_image(tmp_path / "a.png", 8).pixels[:, 0, 0].tolist() == [255, 128, 1]


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_samples_without_a_full_scale_are_refused(tmp_path, dtype):
    Image.fromarray(np.full((8, 8), 1000, dtype)).save(tmp_path / "a.tif")
    assert "no agreed full scale" in refusal(tmp_path / "a.tif")


@pytest.mark.parametrize("suffix", ["gif", "webp", "png", "tif"])
def test_animation_gives_its_first_frame_and_a_note(tmp_path, suffix):
    frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, GREEN, BLUE)]
    path = tmp_path / f"a.{suffix}"
    save(frames[0], path, save_all=True, append_images=frames[1:])
    result = load_image(path, 8)
    assert result.pixels[:, 4, 4].tolist() == list(RED)
    assert result.note is not None
    assert "only" in result.note
    frames[0].save(path)
    assert load_image(path, 8).note is None


def test_photo_with_a_second_picture_behind_it_needs_no_note(tmp_path):
    first, second = quadrants(), Image.new("RGB", (16, 16), BLUE)
    first.save(tmp_path / "a.jpg", format="MPO", save_all=True, append_images=[second], quality=100)
    assert Image.open(tmp_path / "a.jpg").format == "MPO"
    result = load_image(tmp_path / "a.jpg", 16)
    assert result.note is None
    assert result.pixels[0, 4, 4] > 250


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif", "bmp", "ppm", "jp2"])
def test_truncated_files_are_refused(tmp_path, suffix):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    path = tmp_path / f"a.{suffix}"
    noise.save(path)
    whole = path.read_bytes()
    assert load_image(path, 8).pixels.shape == (3, 8, 8)
    for kept in (len(whole) // 2, 30, 1):
        path.write_bytes(whole[:kept])
        assert refusal(path)


def test_files_that_are_no_images_are_refused(tmp_path):
    for name, content, reason in [
        ("text.png", b"this is not an image\n", "not an image"),
        ("empty.jpg", b"", "empty file"),
        ("zeros.gif", bytes(1000), "not an image"),
        ("page.eps", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n", "not an image"),
    ]:
        (tmp_path / name).write_bytes(content)
        assert reason in refusal(tmp_path / name)
    assert refusal(tmp_path / "missing.png") == "No such file or directory"
    assert refusal(tmp_path) == "not a regular file"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_named_pipe_does_not_block(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    assert refusal(tmp_path / "a.png") == "not a regular file"


@pytest.mark.parametrize("side", [9_460, 12_000, 20_000])
def test_decompression_bomb_is_an_error_whatever_pillow_would_do(tmp_path, side, monkeypatch):
    path = tmp_path / "bomb.png"
    path.write_bytes(png(side, side, data=bytes(1000)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        assert "possible decompression bomb" in refusal(path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "possible decompression bomb" in refusal(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert f"{side} x {side} pixels exceed the limit of {MAX_PIXELS}" in refusal(path)


def test_the_size_limit_counts_pixels_and_changes_nothing_global(tmp_path):
    before = Image.MAX_IMAGE_PIXELS
    Image.new("L", (30, 20)).save(tmp_path / "a.png")
    assert load_image(tmp_path / "a.png", 8, max_pixels=600).pixels.shape == (3, 8, 8)
    assert "30 x 20 pixels exceed the limit of 599" in refusal(tmp_path / "a.png", max_pixels=599)
    assert before == Image.MAX_IMAGE_PIXELS


@pytest.mark.parametrize("resize", ["crop", "squash", "pad"])
@pytest.mark.parametrize("size", [(1, 60_000), (60_000, 1)])
def test_extreme_aspect_ratios_stay_small(tmp_path, resize, size):
    Image.new("L", size, 200).save(tmp_path / "a.png")
    pixels = load_image(tmp_path / "a.png", (12, 10), resize=resize).pixels
    assert pixels.shape == (3, 12, 10)
    assert 200 in pixels


def test_resize_modes(tmp_path):
    image = Image.new("RGB", (40, 20), WHITE)
    image.paste(RED, (10, 0, 30, 20))  # the central square
    image.save(tmp_path / "a.png")
    crop = load_image(tmp_path / "a.png", 20).pixels
    assert (crop == torch.tensor(RED).view(3, 1, 1)).all()
    squash = load_image(tmp_path / "a.png", 20, resize="squash").pixels
    assert squash[1, 10].tolist()[:4] == [255] * 4
    assert squash[1, 10].tolist()[7:13] == [0] * 6
    pad = load_image(tmp_path / "a.png", 20, resize="pad", background=9).pixels
    assert (pad[:, :5] == 9).all()
    assert (pad[:, 15:] == 9).all()
    assert pad[:, 10, 10].tolist() == list(RED)
    wide = load_image(tmp_path / "a.png", (10, 20)).pixels
    assert (wide[1, :, :4] == 255).all()
    part = load_image(tmp_path / "a.png", (10, 20), crop_fraction=0.5).pixels
    assert (part == torch.tensor(RED).view(3, 1, 1)).all()


def test_an_image_of_the_right_size_is_not_touched(tmp_path):
    values = np.random.default_rng(1).integers(0, 256, (7, 5), dtype=np.uint8)
    Image.fromarray(values).save(tmp_path / "a.png")
    for resize in ("crop", "squash", "pad"):
        pixels = load_image(tmp_path / "a.png", (7, 5), channels=1, resize=resize).pixels
        assert np.array_equal(pixels[0].numpy(), values)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"image_size": 0}, "image_size must be positive and below 2.31, got 0"),
        ({"image_size": 8, "channels": 4}, "channels must be 1 or 3, got 4"),
        ({"image_size": 8, "resize": "stretch"}, "resize must be one of crop, squash, pad, got 'stretch'"),
        ({"image_size": 8, "crop_fraction": 0.0}, r"crop_fraction must be in \(0, 1\], got 0.0"),
        ({"image_size": 8, "background": 256}, "background must be a grey value"),
        ({"image_size": 8, "background": (1, 2)}, "background must be a grey value"),
    ],
)
def test_impossible_arguments_are_not_blamed_on_the_file(tmp_path, options, text):
    Image.new("L", (8, 8)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match=text) as caught:
        load_image(tmp_path / "a.png", **options)
    assert not isinstance(caught.value, ImageError)


def test_messages_are_one_printable_line(tmp_path):
    path = tmp_path / "new\nline \x1b[31m ünï.png"
    path.write_bytes(b"x")
    assert ImageError(path, "first\n  second\t\x07").reason == "first second \\x07"
    assert "new\\nline \\x1b[31m ünï.png: not an image" in str(ImageError(path, "not an image"))
    raw = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.png")
    assert printable(raw).endswith("caf\\xe9.png")
    str(ImageError(raw, "x")).encode("utf-8")


@pytest.mark.parametrize("size", [1.5, (1.5, 2), "8", None, True, (8,), (8, 8, 3)], ids=str)
def test_sizes_that_are_none_are_not_blamed_on_the_file(tmp_path, size):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    with pytest.raises(TypeError, match="image_size must be an int or"):
        load_image(tmp_path / "a.png", size)
    assert load_image(tmp_path / "a.png", np.int64(4)).pixels.shape == (3, 4, 4)  # type: ignore[arg-type]
