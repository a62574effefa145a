"""Image files in, uint8 tensors out.

A classifier gets whatever lies in a folder: rotated phone photos, palettes with holes in them, CMYK scans, 16-bit
greyscale, animations, half-downloaded files and files made to exhaust memory. Every file either becomes a tensor of the
size asked for, or raises :class:`ImageError` with one line that names the file and the reason, so that a caller can
report it and go on with the next one.

Pillow's process-wide settings are neither read nor changed for the size limit: it is checked here, on the size in the
file's header, before a single pixel is decoded.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

__all__ = ["MAX_PIXELS", "SUFFIXES", "DecodedImage", "ImageError", "find_images", "load_image", "printable"]

_COMMON_SUFFIXES = (".bmp", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
_OTHER_SUFFIXES = (".avif", ".dib", ".jp2", ".pbm", ".pgm", ".pnm", ".ppm")
SUFFIXES = frozenset(_COMMON_SUFFIXES + _OTHER_SUFFIXES)
"""Suffixes (lower case) that :func:`find_images` takes for images inside a folder."""

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "JPEG2000", "AVIF")
"""Formats that are decoded. Pillow knows more, but some start other programs (EPS runs Ghostscript)."""

MAX_PIXELS = 89_478_485
"""Largest image decoded, in pixels: a quarter of a gibibyte as RGB, the size at which Pillow starts to warn."""

RESIZE_MODES = ("crop", "squash", "pad")

# EXIF orientation -> what turns the stored image upright.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_EXIF_ORIENTATION = 0x0112
_TIFF_BITS_PER_SAMPLE, _TIFF_PHOTOMETRIC = 258, 262


class ImageError(ValueError):
    """One file that cannot be used. ``path`` is the file, ``reason`` one line; ``str()`` gives ``path: reason``."""

    def __init__(self, path: str | os.PathLike[str], reason: str) -> None:
        self.path = Path(path)
        self.reason = printable(" ".join(reason.split()))
        super().__init__(f"{printable(path)}: {self.reason}")


@dataclass(frozen=True)
class DecodedImage:
    """``pixels``: uint8 tensor [C, H, W]; ``note``: one line on what was left out of the file, or None."""

    pixels: torch.Tensor
    note: str | None = None


def printable(text: str | os.PathLike[str]) -> str:
    """``text`` as one line that any UTF-8 stream can print: undecodable bytes and control characters escaped."""
    plain = os.fsencode(os.fspath(text)).decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() or c == " " else c.encode("unicode_escape").decode("ascii") for c in plain)


def find_images(paths: Iterable[str | os.PathLike[str]]) -> tuple[list[Path], list[ImageError]]:
    """The image files behind ``paths`` in a fixed order, and what could not be read.

    A path to a file is taken as it is, whatever its suffix. A folder is searched with all folders below it for names
    with a suffix of :data:`SUFFIXES`, sorted by name; hidden names (leading dot) are left out. Links are followed, but
    no folder is entered twice, so loops of links end. The order of ``paths`` is kept; a folder without a single image,
    a missing path and an unreadable folder are reported. TypeError for what is no path, and for one path alone.
    """
    if isinstance(paths, (str, bytes, os.PathLike)) or not isinstance(paths, Iterable):
        raise TypeError(f"paths must be a list of paths, got {paths!r}")
    found: list[Path] = []
    errors: list[ImageError] = []
    for path in map(_path, paths):
        try:
            is_folder = stat.S_ISDIR(path.stat().st_mode)
        except (OSError, ValueError) as error:
            errors.append(ImageError(path, _system_reason(error)))
            continue
        if not is_folder:
            found.append(path)
            continue
        failures: list[ImageError] = []
        inside = list(_walk(path, set(), failures))
        found += inside
        errors += failures
        if not inside and not failures:
            errors.append(ImageError(path, f"no image files in this folder (looked for {', '.join(sorted(SUFFIXES))})"))
    return found, errors


def _path(path: object) -> Path:
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"a path must be a str or an os.PathLike, got {path!r}")
    return Path(path)


def _walk(folder: Path, entered: set[tuple[int, int]], errors: list[ImageError]) -> Iterator[Path]:
    try:
        status = folder.stat()
        if (status.st_dev, status.st_ino) in entered:
            return
        entered.add((status.st_dev, status.st_ino))
        names = sorted(os.listdir(folder))
    except OSError as error:
        errors.append(ImageError(folder, _system_reason(error)))
        return
    for name in names:
        path = folder / name
        if name.startswith("."):
            continue
        if path.is_dir():
            yield from _walk(path, entered, errors)
        elif path.suffix.lower() in SUFFIXES:
            yield path


def load_image(
    path: str | os.PathLike[str],
    image_size: int | tuple[int, int],
    *,
    channels: int = 3,
    resize: str = "crop",
    crop_fraction: float = 1.0,
    background: int | Sequence[int] = 255,
    max_pixels: float = MAX_PIXELS,
) -> DecodedImage:
    """Decode one file to a uint8 tensor ``[channels, H, W]``.

    ``image_size``
        H = W, or (H, W), in pixels.
    ``channels``
        3 (RGB) or 1 (grey: 0.299 R + 0.587 G + 0.114 B).
    ``resize``
        ``"crop"``: the centred region of the target's aspect ratio, ``crop_fraction`` of the largest one that fits, is
        scaled to the target (``Resize(size / crop_fraction)`` and ``CenterCrop(size)`` in one step, so that a strip of
        1 x 1,000,000 pixels never becomes an intermediate image); ``"squash"``: the whole image is scaled, its aspect
        ratio given up; ``"pad"``: the whole image is scaled, its aspect ratio kept, on the background. Scaling is
        bicubic with antialiasing, and left out where the size already fits.
    ``background``
        grey value or (R, G, B), 0..255, that transparent pixels are composited on, and that ``"pad"`` fills with.
        White unless told otherwise.
    ``max_pixels``
        largest width x height in the header that is decoded; ``math.inf`` for no limit.

    What is done to the pixels: EXIF orientation is applied. CMYK, YCCK, palettes, bilevel and greyscale become RGB (or
    grey); embedded colour profiles are ignored, as torchvision and timm ignore them. 16-bit samples are scaled to 8
    bits, never clipped. An animation or a file of several pages gives its first one and a note. Refused, with the
    reason: 32-bit integer and floating-point samples (no agreed full scale) and anything that does not decode.

    Raises :class:`ImageError`; ValueError or TypeError for arguments that no file could satisfy.
    """
    path = _path(path)
    height, width = _check_arguments(image_size, channels, resize, crop_fraction, max_pixels)
    channels, crop_fraction, fill = int(channels), float(crop_fraction), _background(background)
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise ImageError(path, "not a regular file")
        with open(path, "rb") as file:
            if not file.read(1):
                raise ImageError(path, "empty file")
            file.seek(0)
            with Image.open(file, formats=_known_formats()) as image:
                if image.width * image.height > max_pixels:
                    size = f"{image.width} x {image.height} pixels"
                    raise ImageError(path, f"{size} exceed the limit of {max_pixels} (possible decompression bomb)")
                note = _note(image)
                samples = str(image.tile[0][3]) if image.format == "PNG" and image.tile else ""
                image.load()
                keyed = _key_as_decoded(image, samples, file)
                flat = _upright(_to_8_bit(keyed, "L" if channels == 1 else "RGB", fill), image)
        fitted = _fit(flat, height, width, resize, crop_fraction, fill)
    except ImageError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(path, "more pixels than Pillow agrees to open (possible decompression bomb)") from error
    except UnidentifiedImageError as error:
        raise ImageError(path, f"not an image, damaged, or not one of {', '.join(_known_formats())}") from error
    except MemoryError as error:
        raise ImageError(path, "not enough memory to decode it") from error
    except Exception as error:
        # Decoders fed with damaged files raise nearly every built-in exception; each of them concerns this file alone.
        raise ImageError(path, _system_reason(error)) from error
    pixels = torch.from_numpy(np.array(fitted, dtype=np.uint8))
    return DecodedImage(pixels.reshape(height, width, channels).permute(2, 0, 1).contiguous(), note)


def _check_arguments(
    image_size: int | tuple[int, int], channels: int, resize: str, crop_fraction: float, max_pixels: float
) -> tuple[int, int]:
    pair = tuple(image_size) if isinstance(image_size, (tuple, list)) else (image_size, image_size)
    if len(pair) != 2 or not all(_is(Integral, v) for v in pair):
        raise TypeError(f"image_size must be an int or (H, W), got {image_size!r}")
    height, width = map(int, pair)
    if not (1 <= height < 2**31 and 1 <= width < 2**31):  # what Pillow can count to
        raise ValueError(f"image_size must be positive and below 2^31, got {image_size}")
    if not _is(Integral, channels):
        raise TypeError(f"channels must be the int 1 or 3, got {channels!r}")
    if channels not in (1, 3):
        raise ValueError(f"channels must be 1 or 3, got {channels}: image files have no other layout")
    if not isinstance(resize, str) or resize not in RESIZE_MODES:
        raise ValueError(f"resize must be one of {', '.join(RESIZE_MODES)}, got {resize!r}")
    for name, value in (("crop_fraction", crop_fraction), ("max_pixels", max_pixels)):
        if not _is(Real, value):
            raise TypeError(f"{name} must be a number, got {value!r}")
    if not 0 < crop_fraction <= 1:
        raise ValueError(f"crop_fraction must be in (0, 1], got {crop_fraction}")
    if not max_pixels > 0:  # NaN would be no limit
        raise ValueError(f"max_pixels must be positive, got {max_pixels}")
    return height, width


def _background(background: int | Sequence[int]) -> tuple[int, int, int]:
    values: tuple[Any, ...] = tuple(background) if isinstance(background, (tuple, list)) else (background,) * 3
    if len(values) != 3 or not all(_is(Integral, v) and 0 <= v <= 255 for v in values):
        raise ValueError(f"background must be a grey value or (R, G, B) in 0..255, got {background!r}")
    return int(values[0]), int(values[1]), int(values[2])


def _is(kind: type, value: object) -> bool:
    """Whether it is such a number, numpy's too; True and False are none."""
    return isinstance(value, kind) and not isinstance(value, bool)


def _known_formats() -> list[str]:
    Image.init()  # A Pillow built without some codec does not know its format.
    return [name for name in FORMATS if name in Image.OPEN]


def _system_reason(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__


def _note(image: Image.Image) -> str | None:
    # MPO is a photo with a preview, depth map or second eye behind it: the first image is the photo.
    if image.format == "MPO":
        return None
    try:
        several = bool(getattr(image, "is_animated", False))
    except Exception:
        return None  # The second frame is damaged; the first decides whether the file is usable.
    if not several:
        return None
    return "several pages, only the first is used" if image.format == "TIFF" else "animated, only frame 1 is used"


def _upright(pixels: Image.Image, source: Image.Image) -> Image.Image:
    # Asked for after decoding: Pillow turns some TIFF files itself and then drops the tag.
    try:
        orientation = source.getexif().get(_EXIF_ORIENTATION, 1)
    except Exception:
        return pixels  # Metadata that cannot be read says nothing about the pixels, which could.
    method = _UPRIGHT.get(orientation)
    return pixels if method is None else pixels.transpose(method)


def _key_as_decoded(image: Image.Image, samples: str, file: IO[bytes]) -> Image.Image:
    """A PNG whose transparent value is given in samples as they are in the file, for pixels that Pillow has scaled.

    samples: Pillow's name for them. Of 2 or 4 bits the value is scaled as they were; of RGB in 16 bits Pillow keeps the
    high bytes, so that the low ones are read once more, and what is transparent becomes an alpha channel.
    """
    key = image.info.get("transparency")
    if samples in ("L;2", "L;4") and isinstance(key, int):
        image.info["transparency"] = key * 255 // (2 ** int(samples[-1]) - 1)
    if samples == "RGB;16B" and isinstance(key, tuple):
        file.seek(0)
        with Image.open(file, formats=["PNG"]) as again:
            again.tile = [(*again.tile[0][:3], "RGB;16L")]  # type: ignore[list-item]
            again.load()
            values = np.asarray(image).astype(np.int64) * 256 + np.asarray(again)
        alpha = np.where((values == key).all(-1), 0, 255).astype(np.uint8)
        image = image.copy()
        del image.info["transparency"]
        image.putalpha(Image.fromarray(alpha))
    return image


def _to_8_bit(image: Image.Image, mode: str, background: tuple[int, int, int]) -> Image.Image:
    """``image`` as opaque 8-bit ``mode`` ("L" or "RGB")."""
    source = image
    if image.mode.startswith("I") or image.mode == "F":
        source = _scale_16_bit(image)
    keyed = source.mode in ("1", "L", "P", "RGB") and "transparency" in source.info
    if keyed or source.mode in ("LA", "La", "PA", "RGBA", "RGBa"):
        layer = source.convert("LA").convert("RGBA") if source.mode == "La" else source.convert("RGBA")
        source = Image.alpha_composite(Image.new("RGBA", layer.size, (*background, 255)), layer)
    if source.mode in ("CMYK", "P", "YCbCr", "RGBX", "LAB"):
        source = source.convert("RGB")
    return source if source.mode == mode else source.convert(mode)


def _scale_16_bit(image: Image.Image) -> Image.Image:
    """An image of 16-bit grey samples as "L" ("LA" with a transparent value): round(v * 255 / full scale)."""
    tags = getattr(image, "tag_v2", {})
    # In mode "I" only PNG and PPM promise 16 bits; a TIFF in that mode holds signed or 32-bit numbers.
    if not image.mode.startswith("I;16") and not (image.mode == "I" and image.format in ("PNG", "PPM")):
        raise ValueError("32-bit or floating-point samples have no agreed full scale: convert the file to 8 or 16 bits")
    bits = tags.get(_TIFF_BITS_PER_SAMPLE, (16,))[0]
    full = 2**bits - 1
    values = np.asarray(image).astype(np.int64)
    grey = (values.clip(0, full) * 255 + full // 2) // full
    if tags.get(_TIFF_PHOTOMETRIC) == 0:  # white is zero, which Pillow undoes for 8 bits only
        grey = 255 - grey
    scaled = Image.fromarray(grey.astype(np.uint8))
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        scaled.putalpha(Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)))
    return scaled


def _fit(
    image: Image.Image, height: int, width: int, resize: str, crop_fraction: float, fill: tuple[int, int, int]
) -> Image.Image:
    cubic = Image.Resampling.BICUBIC
    if resize == "squash":
        return image if image.size == (width, height) else image.resize((width, height), cubic)
    if resize == "crop":
        scale = crop_fraction * min(image.width / width, image.height / height)
        box_width, box_height = min(scale * width, image.width), min(scale * height, image.height)
        left, top = (image.width - box_width) / 2, (image.height - box_height) / 2
        return image.resize((width, height), cubic, box=(left, top, left + box_width, top + box_height))
    scale = min(width / image.width, height / image.height)
    inner = min(width, max(1, round(image.width * scale))), min(height, max(1, round(image.height * scale)))
    canvas = Image.new("RGB", (width, height), fill).convert(image.mode)
    canvas.paste(image.resize(inner, cubic), ((width - inner[0]) // 2, (height - inner[1]) // 2))
    return canvas
