"""The transparent value of a PNG is compared with the samples of the file, however many bits they have."""

from __future__ import annotations

import struct
import zlib

import pytest

from vit_engine.images import load_image


def png(bits: int, colour: int, width: int, row: bytes, key: bytes) -> bytes:
    """One row of samples (colour: 0 grey, 2 RGB) with a transparent value; Pillow cannot write these."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, 1, bits, colour, 0, 0, 0)
    parts = ((b"IHDR", header), (b"tRNS", key), (b"IDAT", zlib.compress(b"\0" + row)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(kind, data) for kind, data in parts)


# The rows, and what comes of them on a background of 9. Of RGB, samples 1 and 2 differ from the key in a low byte.
CASES = {
    "1 bit": (png(1, 0, 2, b"\x40", b"\0\1"), [0, 9]),
    "2 bits": (png(2, 0, 4, b"\x1b", b"\0\2"), [0, 85, 9, 255]),
    "4 bits": (png(4, 0, 4, b"\x02\x5f", b"\0\5"), [0, 34, 9, 255]),
    "8 bits": (png(8, 0, 4, b"\0\2\5\xff", b"\0\5"), [0, 2, 9, 255]),
    "RGB, 8 bits": (png(8, 2, 2, bytes(6), bytes(6)), [9, 9]),
    "RGB, 16 bits": (
        png(16, 2, 4, bytes.fromhex("010201020102 010301020102 010201020100 ff00ff00ff00"), b"\1\2" * 3),
        [9, 1, 1, 255],
    ),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("channels", [1, 3])
def test_the_transparent_value_shows_the_background(tmp_path, name, channels):
    content, expected = CASES[name]
    (tmp_path / "keyed.png").write_bytes(content)
    pixels = load_image(tmp_path / "keyed.png", (1, len(expected)), channels=channels, background=9).pixels
    assert pixels[0, 0].tolist() == expected
